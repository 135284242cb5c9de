"""Saved tensors that travel come back as they were, and leave when their graph does."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from hf_speed.errors import OffloadError
from hf_speed.offload import ActivationOffload, HostStore, Store, Ticket
from tests.offload.tiers import TIERS

MIB = 1 << 20


class Block(nn.Module):
    """A transformer block: views of one tensor, a residual, a tensor that three layers save."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.drop(self.out(mixed))
        return hidden + self.mlp(self.norm(hidden))


def _gradients(
    model: nn.ModuleList, context: contextlib.AbstractContextManager[object], checkpoints: str
) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    leaf = hidden
    with context:
        for block in model:
            if checkpoints == "none":
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=checkpoints == "reentrant")
        loss = hidden.square().mean()
    loss.backward()
    parameters = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *(grad.clone() for grad in (leaf.grad, *parameters) if grad is not None)]


@pytest.mark.parametrize("window_bytes", [0, 20_000, MIB])
@pytest.mark.parametrize("tier", ["host", "host, memory used again", "disk", "disk, staged"])
def test_gradients_are_the_same_to_the_bit(tier: str, window_bytes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(Block(32) for _ in range(3))
    for checkpoints in ("none", "reentrant", "not reentrant"):
        plain = _gradients(model, contextlib.nullcontext(), checkpoints)
        offload = ActivationOffload(
            TIERS[tier](tmp_path), min_bytes=1024, window_bytes=window_bytes
        )
        for _ in range(2):
            moved = _gradients(model, offload.hooks(), checkpoints)
            assert len(moved) == len(plain) > 30
            assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
        hidden_bytes = 4 * 16 * 32 * 4
        if checkpoints == "none":
            assert offload.peak_bytes > 3 * 8 * hidden_bytes
        else:  # the input of each block, and that of the loss
            leaves_stay = hidden_bytes
            assert offload.peak_bytes == 4 * hidden_bytes - leaves_stay
        assert offload.num_bytes == 0
        offload.close()


class Recorder(HostStore):
    """A host store that says what it was asked, and whose commits end when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.open = True

    def commit(self, key: str, value: Tensor, start: int = 0) -> Ticket:
        """See `Store`."""
        self.calls.append(f"commit {key}")
        return super().commit(key, value, start) if self.open else Slow(self, key, value)

    def fetch(self, key: str, out: Tensor, start: int = 0) -> Ticket:
        """See `Store`."""
        self.calls.append(f"fetch {key}")
        return super().fetch(key, out, start)


class Slow:
    """A commit that copies when someone waits for it."""

    def __init__(self, store: Recorder, key: str, value: Tensor) -> None:
        self._start: Callable[[], Ticket] = lambda: HostStore.commit(store, key, value)
        self._ended = False

    def done(self) -> bool:
        """See `Ticket`."""
        return self._ended

    def wait(self) -> None:
        """See `Ticket`."""
        if not self._ended:
            self._start()
            self._ended = True


def _offload(store: Store | None = None, **settings: object) -> ActivationOffload:
    return ActivationOffload(store or HostStore(), **{"min_bytes": 64, **settings})  # type: ignore[arg-type]


def test_what_is_saved_twice_is_stored_once() -> None:
    offload = _offload()
    x = torch.randn(100, requires_grad=True) + 0
    with offload.hooks():
        sine = x.sin()  # saves x
        power = (x * sine).exp()  # saves x and sine, and what it gives
        y = power * x  # saves power and x
    assert offload.num_bytes == 3 * x.nbytes
    del sine, power, y
    assert offload.num_bytes == 0


def test_views_of_one_memory_are_stored_once() -> None:
    offload = _offload()
    whole = torch.randn(8, 96)
    handles = [offload.pack(part) for part in (*whole.chunk(3, dim=1), whole.t(), whole[1:])]
    assert offload.num_bytes == whole.nbytes
    for handle, part in zip(handles, (*whole.chunk(3, dim=1), whole.t(), whole[1:]), strict=True):
        back = offload.unpack(handle)
        assert back.data_ptr() != part.data_ptr()
        assert (back.shape, back.stride(), back.dtype) == (part.shape, part.stride(), part.dtype)
        assert torch.equal(back, part)


def test_a_small_part_of_a_large_memory_travels_alone() -> None:
    offload = _offload()
    whole = torch.randn(1000, 20)
    handle = offload.pack(whole[7:11, 3:])
    assert offload.num_bytes == (3 * 20 + 17) * 4
    assert torch.equal(offload.unpack(handle), whole[7:11, 3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_any_dtype_and_stride_comes_back(dtype: torch.dtype) -> None:
    offload = _offload()
    base = torch.arange(24_000).reshape(20, 30, 40).to(dtype)
    for tensor in (
        base,
        base.permute(2, 0, 1),
        base[:, ::3],
        base[4],
        base[..., :1].expand(20, 30, 7),
        base.view(torch.uint8)[1:, 2:],
    ):
        handle = offload.pack(tensor)
        assert not isinstance(handle, Tensor)
        back = offload.unpack(handle)
        assert (back.stride(), back.dtype) == (tensor.stride(), tensor.dtype)
        assert torch.equal(back, tensor)


def test_what_should_stay_stays() -> None:
    kept = torch.randn(100)
    offload = _offload(keeps=lambda tensor: tensor.data_ptr() == kept.data_ptr())
    weight = nn.Parameter(torch.randn(50, 50))
    frozen = nn.Parameter(torch.randn(50, 50), requires_grad=False)
    stay = [
        kept,
        weight,
        weight.t(),
        frozen[2:],
        torch.randn(50, 50, requires_grad=True),
        torch.randn(3),
        torch.randn(1, 3).expand(1000, 3),
        torch.empty(100, 100, device="meta"),
        torch.randn(10, 10, dtype=torch.complex64).conj(),
        torch.randn(10, 10).to_sparse(),
    ]
    for tensor in stay:
        assert offload.pack(tensor) is tensor
        assert offload.unpack(tensor) is tensor
    assert offload.num_bytes == 0
    assert offload.pack(torch.randn(100)) is not None
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with offload.hooks():
        out = model(torch.randn(8, 40))
    assert offload.num_bytes == 2 * 8 * 40 * 4  # both inputs, no weight
    del out


def test_the_memory_is_free_while_its_tensor_is_away() -> None:
    offload = _offload()
    x = torch.randn(1000, requires_grad=True)
    with offload.hooks():
        hidden = x * 2
        memory = StorageWeakRef(hidden.untyped_storage())
        loss = hidden.square().sum()
        del hidden
    assert memory.expired()
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 8 * x.detach())


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_graph_that_dies_without_a_backward_takes_its_bytes_along(
    tier: str, tmp_path: Path
) -> None:
    offload = _offload(TIERS[tier](tmp_path))
    for _ in range(3):
        with offload.hooks():
            loss = (torch.randn(1000, requires_grad=True) * 2).exp().square().sum()
        assert offload.num_bytes == 4000
        del loss
        assert offload.num_bytes == 0
    offload.close()


def test_a_graph_that_dies_on_another_thread_or_in_a_cycle_takes_its_bytes_along() -> None:
    offload = _offload()
    with offload.hooks():
        losses = [(torch.randn(1000, requires_grad=True) * 2).square().sum() for _ in range(2)]
    thread = threading.Thread(target=losses.pop)
    thread.start()
    thread.join()
    assert offload.num_bytes == 4000
    cycle: list[object] = [losses.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert offload.num_bytes == 0


def test_a_second_backward_finds_everything_again() -> None:
    offload = _offload(window_bytes=5000)
    x = torch.randn(1000, requires_grad=True)
    with offload.hooks():
        loss = (x * 2).exp().square().mul(0.5).sin().sum()
    grads = []
    for _ in range(3):
        x.grad = None
        loss.backward(retain_graph=True)
        assert x.grad is not None
        grads.append(x.grad.clone())
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    x.grad = None
    plain = (x * 2).exp().square().mul(0.5).sin().sum()
    (expected,) = torch.autograd.grad(plain, x, create_graph=True)
    assert torch.equal(first, expected)
    assert torch.equal(second, torch.autograd.grad(expected.sum(), x)[0])


def test_the_backward_finds_the_next_tensors_on_their_way() -> None:
    store = Recorder()
    offload = _offload(store, window_bytes=2 * 400)
    handles = [offload.pack(torch.full((100,), float(index))) for index in range(6)]
    assert store.calls == [f"commit saved{index}" for index in range(6)]
    store.calls.clear()
    for index in reversed(range(6)):
        tensor = offload.unpack(handles.pop())
        assert (tensor == index).all()
        ahead = {f"fetch saved{each}" for each in range(6) if each >= index - 2}
        assert set(store.calls) == ahead
    assert len(store.calls) == 6


def test_a_tensor_that_is_needed_again_soon_stays_and_a_late_one_does_not() -> None:
    store = Recorder()
    offload = _offload(store, window_bytes=400)
    early, late = torch.randn(100), torch.randn(100)
    handles = [offload.pack(early), offload.pack(late), offload.pack(late), offload.pack(early)]
    store.calls.clear()
    for handle, expected in zip(handles[::-1], (early, late, late, early), strict=True):
        assert torch.equal(offload.unpack(handle), expected)
    assert store.calls.count("fetch saved1") == 1
    assert store.calls.count("fetch saved0") == 2


def test_a_tensor_that_has_not_left_is_not_fetched() -> None:
    store = Recorder()
    store.open = False
    offload = _offload(store)
    tensor = torch.randn(100)
    handle = offload.pack(tensor)
    assert offload.unpack(handle).data_ptr() == tensor.data_ptr()
    assert store.calls == ["commit saved0"]


def test_no_more_than_the_window_is_on_its_way_out() -> None:
    store = Recorder()
    store.open = False
    offload = _offload(store, window_bytes=1000)
    memories = []
    handles = []
    for _ in range(5):
        tensor = torch.randn(100)
        memories.append(StorageWeakRef(tensor.untyped_storage()))
        handles.append(offload.pack(tensor))
        del tensor
    assert [memory.expired() for memory in memories] == [True, True, False, False, False]


def test_a_change_before_the_backward_is_never_a_wrong_number() -> None:
    store = Recorder()
    store.open = False
    offload = _offload(store, window_bytes=100)
    tensor = torch.zeros(100)
    handle = offload.pack(tensor)
    tensor.add_(1)
    with pytest.raises(OffloadError, match=r"was changed in place before its backward. Change a c"):
        offload.unpack(handle)
    offload.pack(torch.zeros(100))  # has the first one's commit end
    with pytest.raises(OffloadError, match="was changed in place before its backward"):
        offload.unpack(handle)
    store.open = True
    again = offload.pack(tensor)  # at another version it is another tensor
    tensor.add_(1)
    assert (offload.unpack(again) == 1).all()


def test_an_error_of_the_disk_reaches_the_step(tmp_path: Path) -> None:
    store = TIERS["disk"](tmp_path)
    offload = _offload(store)
    handle = offload.pack(torch.randn(10_000))
    second = offload.pack(torch.randn(10_000))
    store.fetch("saved0", torch.empty(40_000, dtype=torch.uint8)).wait()
    for fd in store._file._fds:  # type: ignore[attr-defined]
        os.ftruncate(fd, 0)
    with pytest.raises(OffloadError, match="the fetch of 'saved0' failed on"):
        offload.unpack(handle)
    del handle, second
    gc.collect()  # the error's traceback held the handle
    assert offload.num_bytes == 0
    offload.close()


def test_after_close_nothing_moves() -> None:
    offload = _offload()
    handle = offload.pack(torch.randn(100))
    offload.close()
    tensor = torch.randn(100)
    assert offload.pack(tensor) is tensor
    with pytest.raises(OffloadError, match="this store of the host tier is closed"):
        offload.unpack(handle)
    del handle
    assert offload.num_bytes == 0
