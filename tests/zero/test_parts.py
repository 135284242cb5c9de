"""The small parts: buffers, released parameters, elementwise optimizers, norms."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.errors import ConfigError, ShardedParameterError
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.journal import Journal
from hf_speed.zero.elementwise import require_elementwise
from hf_speed.zero.norm import any_overflow, global_norm, norms_of
from hf_speed.zero.parameter import ShardedParameter, hide, placeholder_of, publish, released_class
from hf_speed.zero.pool import BufferPool

CPU = torch.device("cpu")


def test_a_buffer_comes_back_and_is_handed_out_again() -> None:
    pool = BufferPool(CPU)
    first = pool.take(8, torch.float32)
    address = first.data_ptr()
    pool.give(first)
    del first
    assert pool.take(8, torch.float32).data_ptr() == address
    assert pool.take(8, torch.float16).data_ptr() != address
    assert pool.bytes_allocated == pool.peak_bytes == 32 + 16


def test_a_buffer_with_a_view_that_escaped_is_not_handed_out_again() -> None:
    pool = BufferPool(CPU)
    buffer = pool.take(8, torch.float32).fill_(3.0)
    view = buffer[2:4]
    pool.give(buffer)
    del buffer
    other = pool.take(8, torch.float32).fill_(0.0)
    assert view.tolist() == [3.0, 3.0]
    assert pool.bytes_allocated == other.nbytes


def test_clear_frees_what_is_not_in_use() -> None:
    pool = BufferPool(CPU)
    held, free = pool.take(4, torch.float32), pool.take(6, torch.float32)
    pool.give(free)
    pool.clear()
    assert pool.bytes_allocated == held.nbytes


def _hidden(parameter: nn.Parameter, name: str) -> None:
    placeholder = placeholder_of(parameter.shape, dtype=parameter.dtype, device=CPU)
    hide(parameter, placeholder, released_class({id(parameter): name}))


def test_a_released_parameter_keeps_identity_metadata_and_gradient_but_no_memory() -> None:
    parameter = nn.Parameter(torch.randn(300, 200))
    parameter.grad = torch.ones(300, 200)
    values = parameter.data
    _hidden(parameter, "a.b")
    assert isinstance(parameter, ShardedParameter)
    assert parameter.shape == (300, 200)
    assert parameter.size(1) == 200
    assert torch.is_floating_point(parameter)
    assert parameter.grad.sum() == 60000
    assert {parameter: 1}[parameter] == 1
    assert len({parameter, parameter}) == 1
    with pytest.raises(ShardedParameterError, match=r"sum needs the values of a\.b of shape"):
        parameter.sum()
    publish(parameter, values)
    assert type(parameter) is nn.Parameter
    assert parameter.data_ptr() == values.data_ptr()


def test_two_engines_name_their_own_parameters() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    _hidden(one, "one")
    _hidden(other, "other")
    with pytest.raises(ShardedParameterError, match="values of one of"):
        one.clone()
    with pytest.raises(ShardedParameterError, match="values of other of"):
        copy.copy(torch.stack([torch.zeros(2), other]))


def test_a_placeholder_is_one_element_and_loud() -> None:
    placeholder = placeholder_of((50, 40), dtype=torch.bfloat16, device=CPU)
    assert placeholder.shape == (50, 40)
    assert placeholder.untyped_storage().nbytes() == 2
    assert placeholder.isnan().all()


class SignMomentum(Optimizer):
    """Someone's own optimizer: elementwise, of a class that nobody has listed."""

    def __init__(self, params: list[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * buffer.sign())


class NormalisedDescent(SignMomentum):
    """Divides by the norm of the whole tensor."""

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


class Unrepeatable(SignMomentum):
    """Cannot be made a second time from its defaults."""

    def __init__(self, params: list[nn.Parameter], secret: object) -> None:
        super().__init__(params)
        self.secret = secret


def _weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 4))]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        torch.optim.NAdam,
        torch.optim.Adamax,
        torch.optim.Adadelta,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.Rprop,
        SignMomentum,
    ],
)
def test_elementwise_optimizers_are_recognised_by_trial(make: type[Optimizer]) -> None:
    require_elementwise(make(_weights()), stage=1)


def test_optimizers_of_whole_tensors_are_refused_by_trial() -> None:
    with pytest.raises(ConfigError, match="NormalisedDescent needs whole tensors"):
        require_elementwise(NormalisedDescent(_weights()), stage=2)
    with pytest.raises(ConfigError, match="Adafactor needs whole tensors"):
        require_elementwise(torch.optim.Adafactor(_weights()), stage=3)


def test_an_optimizer_that_cannot_be_tried_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"Unrepeatable could not be shown .* 'secret'"):
        require_elementwise(Unrepeatable(_weights(), object()), stage=3)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_norm_of_many_tensors_is_that_of_one(norm_type: float) -> None:
    gradients = [torch.randn(5), torch.randn(3, 2), torch.tensor(2.5)]
    flat = torch.cat([each.flatten() for each in gradients])
    norm = _norm(gradients, norm_type)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(flat, norm_type))


def _norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    journal = Journal(enabled=False)
    norms = norms_of(gradients, norm_type)
    return global_norm(norms, norm_type=norm_type, group=IDENTITY, journal=journal, device=CPU)


def test_norm_without_gradients_is_zero_and_16_bit_ones_do_not_overflow_it() -> None:
    assert _norm([], 2.0) == 0.0
    assert torch.isfinite(_norm([torch.full((100,), 6e4, dtype=torch.float16)], 2.0))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_any_infinity_or_nan_is_an_overflow(bad: float) -> None:
    good = [torch.ones(3), torch.full((2,), 6e4, dtype=torch.float16)]
    largest = float("inf")
    assert any_overflow(norms_of(good, largest), device=CPU) == 0.0
    worse = [*good, torch.tensor([0.0, bad])]
    assert any_overflow(norms_of(worse, largest), device=CPU) == 1.0
    assert any_overflow([], device=CPU) == 0.0
