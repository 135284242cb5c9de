"""Weight gradients computed later are those that torch computes at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_speed.nn.deferred import Queue, deferred_linear

SHAPES = ((5,), (3, 5), (2, 3, 5), (2, 2, 3, 5))


class _Result:
    """Output and gradients of one linear, with torch's own backward or a deferred one."""

    def __init__(self, module: nn.Module, x: Tensor, queue: Queue | None) -> None:
        self.x = x.clone().requires_grad_()
        transposed = isinstance(module, Conv1D)
        if queue is None:
            self.y = module(self.x)
        else:
            self.y = deferred_linear(
                self.x, module.weight, module.bias, queue, transposed=transposed
            )
        self.y.backward(torch.linspace(-1, 1, self.y.numel()).view_as(self.y).to(self.y.dtype))
        if queue is not None:
            assert module.weight.grad is None
            assert len(queue) == 1
            queue.drain()
            assert len(queue) == 0
        self.gradients = [self.x.grad, *(each.grad for each in module.parameters())]
        module.zero_grad()

    def assert_same_bits(self, other: "_Result") -> None:
        assert torch.equal(self.y, other.y)
        for mine, theirs in zip(self.gradients, other.gradients, strict=True):
            assert mine is not None
            assert theirs is not None
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_deferred_gradients_are_torchs_bitwise(make: type[nn.Module], shape: tuple[int]) -> None:
    torch.manual_seed(0)
    module, x = make(5, 7), torch.randn(shape)
    _Result(module, x, Queue()).assert_same_bits(_Result(module, x, None))


@pytest.mark.parametrize("shape", [(64, 96), (4, 33, 96)], ids=str)
def test_deferred_gradients_are_torchs_bitwise_without_bias_and_at_size(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(96, 160, bias=False), torch.randn(shape)
    _Result(module, x, Queue()).assert_same_bits(_Result(module, x, None))


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_under_autocast_the_gradients_are_cast_as_torch_casts_them(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = make(16, 24), torch.randn(4, 6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = _Result(module, x, Queue()), _Result(module, x, None)
    assert ours.y.dtype == torch.bfloat16
    assert torch.equal(ours.y, theirs.y)
    for mine, torchs in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, torchs, rtol=2e-2, atol=2e-2)


def test_draining_fires_accumulation_hooks_oldest_first_and_sums() -> None:
    torch.manual_seed(0)
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(3, 4)
    queue, seen = Queue(), []
    for name, module in (("first", first), ("second", second)):
        module.weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))

    def run(queue: Queue | None) -> None:
        hidden = deferred_linear(x, first.weight, first.bias, queue)
        deferred_linear(hidden, second.weight, second.bias, queue).sum().backward()

    run(queue)
    run(queue)
    assert seen == []
    queue.drain(1)
    assert seen == ["second"]
    assert len(queue) == 3
    queue.drain()
    # One backward: what is owed to a parameter is summed before its hook runs, once.
    assert seen == ["second", "second", "first"]
    ours = [each.grad.clone() for each in (*first.parameters(), *second.parameters())]
    first.zero_grad(), second.zero_grad()
    run(None)
    run(None)
    for mine, each in zip(ours, (*first.parameters(), *second.parameters()), strict=True):
        torch.testing.assert_close(mine, each.grad, rtol=1e-6, atol=1e-7)


def test_a_queue_can_be_drained_inside_a_backward() -> None:
    linear, queue, x = nn.Linear(3, 3), Queue(), torch.randn(2, 3, requires_grad=True)
    y = deferred_linear(x * 1.0, linear.weight, linear.bias, queue)
    inner = y.grad_fn.next_functions[0][0]
    inner.register_hook(lambda *_: queue.drain())
    y.sum().backward()
    assert len(queue) == 0
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, torch.ones(3, 2) @ x.detach())


def test_nothing_is_deferred_where_no_gradient_is_due() -> None:
    queue, x = Queue(), torch.randn(2, 3, requires_grad=True)
    frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
    deferred_linear(x, frozen.weight, frozen.bias, queue).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3) @ frozen.weight)
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        assert not deferred_linear(x, linear.weight, linear.bias, queue).requires_grad
    # A weight made from others has a graph of its own, which a later backward would not find.
    deferred_linear(x, linear.weight * 2, linear.bias, queue).sum().backward()
    assert linear.weight.grad is not None
    assert len(queue) == 0


def test_a_frozen_bias_gets_no_gradient_and_an_input_without_one_none() -> None:
    linear, queue, x = nn.Linear(3, 3), Queue(), torch.randn(2, 3)
    linear.bias.requires_grad_(requires_grad=False)
    deferred_linear(x, linear.weight, linear.bias, queue).sum().backward()
    queue.drain()
    assert linear.bias.grad is None
    assert torch.equal(linear.weight.grad, torch.ones(3, 2) @ x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_linears_defer_once(use_reentrant: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    linear, queue, x = nn.Linear(3, 3), Queue(), torch.randn(2, 3, requires_grad=True)

    def block(value: Tensor) -> Tensor:
        return deferred_linear(value, linear.weight, linear.bias, queue).tanh()

    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert len(queue) == 1
    queue.drain()
    ours = linear.weight.grad.clone()
    linear.zero_grad()
    linear(x).tanh().sum().backward()
    assert torch.equal(ours, linear.weight.grad)
