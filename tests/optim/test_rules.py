"""Update rules do what the optimizer does, in pieces, in any moment dtype, and only then exist."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_speed.errors import ConfigError
from hf_speed.optim import Chunk, Lion, Span, StateSpec, UpdateRule, rule_of

Optimizer = torch.optim.Optimizer

KNOWN: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99)),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "Adam, decoupled": lambda params: torch.optim.Adam(
        params, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "Adam, ascending": lambda params: torch.optim.Adam(params, lr=1e-2, maximize=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, weight_decay=0.1),
    "SGD, momentum": lambda params: torch.optim.SGD(
        params, lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1
    ),
    "SGD, nesterov": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, lr_decay=0.1, weight_decay=0.1),
    "Lion": lambda params: Lion(params, lr=1e-3, weight_decay=0.1),
}

N = 10_000


def _states(rule: UpdateRule, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        spec.name: torch.zeros(-(-n // spec.block), dtype=spec.dtype) for spec in rule.states(dtype)
    }


def _rule(optimizer: Optimizer) -> UpdateRule:
    rule = rule_of(optimizer)
    assert rule is not None
    return rule


def _apply(
    rule: UpdateRule,
    master: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    spans: list[Span],
    **others: Any,
) -> None:
    fields = {"out": None, "grad_scale": 1.0, "seed": 0, "offset": 0, **others}
    rule.apply(Chunk(master=master, grad=grad, states=states, spans=spans, **fields))


# ---------------------------------------------------------------- what a rule does


@pytest.mark.parametrize("name", KNOWN)
def test_a_rule_follows_its_optimizer(name: str) -> None:
    """Ten steps under a schedule: to 1e-6 of an element's size and of the way that it went."""
    torch.manual_seed(0)
    start = torch.randn(N)
    parameter = nn.Parameter(start.clone())
    optimizer = KNOWN[name]([parameter])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rule, master, out = _rule(optimizer), start.clone(), torch.empty(N, dtype=torch.bfloat16)
    states, way = _states(rule, N), start.abs()
    for step in range(1, 11):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(N)
        span = Span(N, optimizer.param_groups[0], step)
        # The scale is a power of two, so it leaves no rounding behind.
        _apply(rule, master, parameter.grad * 4.0, states, [span], out=out, grad_scale=0.25)
        optimizer.step()
        schedule.step()
        way += (parameter.detach() - before).abs()
    assert ((master - parameter.detach()).abs() <= 1e-6 * way).all()
    assert torch.equal(out, master.bfloat16())
    assert not torch.allclose(master, start, rtol=1e-3)
    for name_of_state, state in states.items():
        kept = optimizer.state[parameter][name_of_state]
        assert torch.allclose(state, kept, rtol=1e-5, atol=1e-6), name_of_state


def test_every_span_has_its_own_settings_and_step() -> None:
    """Three parameters in two groups, one without a gradient, in one chunk."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n)) for n in (100, 300, 50)]
    groups = [
        {"params": parameters[:1], "lr": 1e-2, "weight_decay": 0.3},
        {"params": parameters[1:], "lr": 1e-3, "betas": (0.5, 0.9)},
    ]
    optimizer = torch.optim.AdamW(groups)
    rule, states = _rule(optimizer), _states(_rule(optimizer), 450)
    master = torch.cat([each.detach() for each in parameters])
    for step in range(1, 4):
        for each in parameters:
            each.grad = torch.randn_like(each)
        grad = torch.cat([each.grad for each in parameters if each.grad is not None])
        if step == 2:
            parameters[1].grad = None
        first, second = optimizer.param_groups
        spans = [
            Span(100, first, step),
            # It missed a step, so its count is one behind.
            Span(400, None if step == 2 else second, step - (step > 2)),
            Span(450, second, step),
        ]
        _apply(rule, master, grad, states, spans)
        optimizer.step()
    theirs = torch.cat([each.detach() for each in parameters])
    assert torch.allclose(master, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD, momentum", "Adagrad"])
def test_small_moments_train_like_float32(name: str, moments: torch.dtype) -> None:
    """Regression by 200 steps: the loss falls a hundredfold, and as far as with fp32 moments."""
    torch.manual_seed(0)
    features = torch.randn(64, 300)
    targets = features @ torch.randn(300)

    def loss_with(dtype: torch.dtype) -> float:
        parameter = nn.Parameter(torch.zeros(300))
        optimizer = KNOWN[name]([parameter])
        optimizer.param_groups[0].update(weight_decay=0.0, lr_decay=0.0)
        optimizer.param_groups[0]["lr"] = {"Adagrad": 0.5, "Lion": 0.01}.get(name, 0.02)
        rule, states = _rule(optimizer), _states(_rule(optimizer), 300, dtype)
        for step in range(1, 201):
            parameter.grad = None
            ((features @ parameter - targets) ** 2).mean().backward()
            assert parameter.grad is not None
            span = Span(300, optimizer.param_groups[0], step)
            _apply(rule, parameter.detach(), parameter.grad, states, [span], seed=step)
        return float(((features @ parameter.detach() - targets) ** 2).mean())

    start = float((targets**2).mean())
    full, small = loss_with(torch.float32), loss_with(moments)
    assert full < start / 100
    assert small < max(2 * full, start / 100)


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_16_bits_is_read_as_it_is(grads: torch.dtype) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    rule = _rule(optimizer)
    grad = torch.randn(N).to(grads)
    ours, theirs = torch.zeros(N), torch.zeros(N)
    spans = [Span(N, optimizer.param_groups[0], 1)]
    _apply(rule, ours, grad, _states(rule, N), spans)
    _apply(rule, theirs, grad.float(), _states(rule, N), spans)
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- states


def test_states_are_named_as_torch_names_them() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    for make in KNOWN.values():
        optimizer = make([parameter])
        parameter.grad = torch.ones(3)
        optimizer.step()
        kept = {
            name for name, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor) and name != "step"
        }  # fmt: skip
        names = {spec.name for spec in _rule(optimizer).states(torch.float32)}
        assert names == kept


def test_8_bit_states_add_scales() -> None:
    rule = _rule(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    assert rule.states(torch.uint8) == (
        StateSpec("exp_avg", torch.uint8, 1),
        StateSpec("exp_avg.scale", torch.float32, 256),
        StateSpec("exp_avg_sq", torch.uint8, 1),
        StateSpec("exp_avg_sq.scale", torch.float32, 256),
    )
    assert _rule(torch.optim.SGD([nn.Parameter(torch.zeros(1))])).states(torch.uint8) == ()


def test_another_moment_dtype_is_refused() -> None:
    rule = _rule(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(
        ConfigError,
        match=r"cannot be kept in torch.float16: .* float32, bfloat16, uint8. Set offload.moments",
    ):
        rule.states(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_survives_a_checkpoint(name: str, dtype: torch.dtype) -> None:
    """Out to fp32 and back is the identity; in from any fp32 is rounding to nearest."""
    rule = _rule(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    states = _states(rule, 1000, dtype)
    torch.manual_seed(0)
    # No smaller than a tenth of the largest, so that 8 bits hold each to a few percent.
    values = torch.rand(1000) + 0.1
    rule.from_float(name, values, states)
    read = rule.to_float(name, states)
    assert read.dtype == torch.float32
    largest = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.uint8: 0.03}[dtype]
    assert ((read - values).abs() <= largest * values).all()
    before = {key: value.clone() for key, value in states.items()}
    rule.from_float(name, read, states)
    assert all(torch.equal(states[key], before[key]) for key in states)
    assert states[name].data_ptr() != read.data_ptr()
    others = {"exp_avg", "exp_avg_sq"} - {name}
    assert all(not rule.to_float(other, states).any() for other in others)


# ---------------------------------------------------------------- which optimizers have one


class _Tuned(torch.optim.AdamW):
    """A subclass may do anything."""


UNKNOWN: dict[str, Callable[[Any], Optimizer]] = {
    "a subclass": _Tuned,
    "another class": torch.optim.RMSprop,
    "amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "differentiable": lambda params: torch.optim.SGD(params, differentiable=True),
    "sums that begin above zero": lambda params: torch.optim.Adagrad(
        params, initial_accumulator_value=0.1
    ),
    "one group that cannot": lambda params: torch.optim.Adam(
        [{"params": params}, {"params": [nn.Parameter(torch.zeros(1))], "amsgrad": True}]
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_optimizer_that_no_rule_equals_has_none(name: str) -> None:
    assert rule_of(UNKNOWN[name]([nn.Parameter(torch.zeros(2))])) is None


def test_complex_parameters_have_no_rule() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert rule_of(torch.optim.AdamW([parameter])) is None


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}])
def test_how_torch_runs_its_optimizer_does_not_matter(how: dict[str, bool]) -> None:
    assert rule_of(torch.optim.AdamW([nn.Parameter(torch.zeros(2))], **how)) is not None


def test_one_group_with_momentum_gives_all_a_buffer() -> None:
    """The others follow their plain rule all the same."""
    parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    groups = [{"params": parameters[:1], "momentum": 0.9}, {"params": parameters[1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    rule, master, states = _rule(optimizer), torch.ones(8), _states(_rule(optimizer), 8)
    for step in (1, 2):
        spans = [
            Span(4 * (index + 1), group, step) for index, group in enumerate(optimizer.param_groups)
        ]
        _apply(rule, master, torch.ones(8), states, spans)
        for parameter in parameters:
            parameter.grad = torch.ones(4)
        optimizer.step()
    assert torch.allclose(master, torch.cat([each.detach() for each in parameters]), rtol=1e-6)


def test_a_rule_says_which_it_is() -> None:
    assert repr(_rule(Lion([nn.Parameter(torch.zeros(1))]))) == "UpdateRule('lion')"
