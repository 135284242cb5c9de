"""Update rules: what an optimizer does to flat pieces of a parameter group, in one pass.

    rule = rule_of(optimizer)                  None: no rule does exactly what this optimizer does
    rule.states(torch.bfloat16)                what to allocate beside the masters, zeros
    rule.apply(Chunk(...))                     one pass: hf_speed.ops.update, on CPU or CUDA
    rule.to_float(...), rule.from_float(...)   moments for checkpoints, whatever they are kept in

A chunk is cut into spans: stretches with the settings and the step of one parameter group, or
untouched. The settings are the optimizer's own param_groups, read at every step, so that schedulers
work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_speed.errors import ConfigError
from hf_speed.ops.reference import BLOCK, RULES, Moment, decode_blocks, encode_blocks
from hf_speed.ops.spans import Row, adagrad_row, adam_row, lion_row, sgd_row, span_table
from hf_speed.ops.update import update_
from hf_speed.optim.lion import Lion

MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
"""What moments may be kept in. uint8: 8-bit codes, one fp32 scale for 256 of them."""


class Span(NamedTuple):
    """Consecutive elements of a chunk that share settings."""

    stop: int
    """Where the span ends; it begins where the one before ends."""

    settings: Mapping[str, Any] | None
    """The param_group; None: master and moments stay as they are."""

    step: int
    """Which update this is, counted from 1."""


class Chunk(NamedTuple):
    """A stretch of a group's flat part: 1-D contiguous tensors of n elements on one device."""

    master: Tensor
    """(n,) float32."""

    grad: Tensor
    """(n,) float32, bfloat16 or float16."""

    states: Mapping[str, Tensor]
    """By the names of `UpdateRule.states`."""

    out: Tensor | None
    """(n,) bfloat16 or float16: takes the rounded master, also of untouched spans."""

    spans: Sequence[Span]
    """Cover the n elements."""

    grad_scale: float
    """Multiplies the gradient: clip times unscale."""

    seed: int
    """Of stochastic rounding (bfloat16 moments), 0 <= seed < 2**64; a new one for every step."""

    offset: int
    """Of the first element in the group's part, a multiple of 4096."""


class StateSpec(NamedTuple):
    """A state tensor of a rule: ceil(n / block) elements of dtype for n parameters."""

    name: str
    dtype: torch.dtype
    block: int


class UpdateRule(Protocol):
    """What the engine calls."""

    def states(self, moment_dtype: torch.dtype) -> tuple[StateSpec, ...]:
        """What to keep beside each master; of zeros at first."""
        ...

    def apply(self, chunk: Chunk) -> None:
        """Update a chunk in place, and write its `out`."""
        ...

    def to_float(self, name: str, states: Mapping[str, Tensor]) -> Tensor:
        """The fp32 values of the moment `name`, a tensor of its own."""
        ...

    def from_float(self, name: str, values: Tensor, states: Mapping[str, Tensor]) -> None:
        """Write fp32 values into the moment `name`, rounded to nearest."""
        ...


class _Rule:
    """A rule of `hf_speed.ops`: its name there, its moments' names here, and its rows."""

    def __init__(
        self, rule: str, moments: tuple[str, ...], row: Callable[[Span, float], Row]
    ) -> None:
        self._rule = rule
        self._moments = moments
        self._row = row

    def __repr__(self) -> str:
        return f"UpdateRule({self._rule!r})"

    def states(self, moment_dtype: torch.dtype) -> tuple[StateSpec, ...]:
        """What to keep beside each master; of zeros at first.

        Raises:
            ConfigError: moments cannot be kept in this dtype.
        """
        if moment_dtype not in MOMENT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in MOMENT_DTYPES)
            raise ConfigError(
                f"Moments cannot be kept in {moment_dtype}: the update kernels know {names}. Set "
                "offload.moments to float32, bfloat16 or int8."
            )
        specs = []
        for name in self._moments:
            specs.append(StateSpec(name, moment_dtype, 1))
            if moment_dtype == torch.uint8:
                specs.append(StateSpec(_scales_name(name), torch.float32, BLOCK))
        return tuple(specs)

    def apply(self, chunk: Chunk) -> None:
        """Update a chunk in place, and write its `out`.

        Raises:
            ValueError: the tensors do not fit together.
        """
        # Most spans of a chunk share the settings and the step of one group.
        rows: dict[tuple[int, int], Row | None] = {}
        for span in chunk.spans:
            key = (id(span.settings), span.step)
            if key not in rows:
                touched = span.settings is not None
                rows[key] = self._row(span, chunk.grad_scale) if touched else None
        update_(
            self._rule,
            chunk.master,
            chunk.grad,
            [self._moment(name, chunk.states) for name in self._moments],
            span_table([(each.stop, rows[id(each.settings), each.step]) for each in chunk.spans]),
            out=chunk.out,
            seed=chunk.seed,
            offset=chunk.offset,
        )

    def to_float(self, name: str, states: Mapping[str, Tensor]) -> Tensor:
        """The fp32 values of the moment `name`, a tensor of its own."""
        values, scales = self._moment(name, states)
        if scales is None:
            return values.to(torch.float32, copy=True)
        return decode_blocks(values, scales, signed=self._is_signed(name))

    def from_float(self, name: str, values: Tensor, states: Mapping[str, Tensor]) -> None:
        """Write fp32 values into the moment `name`, rounded to nearest."""
        moment = self._moment(name, states)
        if moment.scales is None:
            moment.values.copy_(values)
            return
        codes, scales = encode_blocks(values, signed=self._is_signed(name))
        moment.values.copy_(codes)
        moment.scales.copy_(scales)

    def _is_signed(self, name: str) -> bool:
        return RULES[self._rule].signed[self._moments.index(name)]

    @staticmethod
    def _moment(name: str, states: Mapping[str, Tensor]) -> Moment:
        return Moment(states[name], states.get(_scales_name(name)))


def _scales_name(name: str) -> str:
    return f"{name}.scale"


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """The rule that does what `optimizer` does, in all of its groups; None if there is none.

    Known are torch's AdamW, Adam, SGD and Adagrad, and Lion of this package: by their exact class,
    since a subclass may do anything.
    """
    groups = optimizer.param_groups
    maker = _MAKERS.get(type(optimizer))
    if maker is None or not groups or any(_is_beyond(group) for group in groups):
        return None
    return maker(groups)


_BEYOND = ("amsgrad", "differentiable")
"""Settings that ask for what no kernel does. `foreach`, `fused` and `capturable` only say how."""


def _is_beyond(group: Mapping[str, Any]) -> bool:
    return any(group.get(name) for name in _BEYOND) or any(
        torch.is_complex(param) for param in group["params"]
    )


_Groups = Sequence[Mapping[str, Any]]


def _adam_rule(_: _Groups) -> UpdateRule:
    def row(span: Span, grad_scale: float) -> Row:
        settings = _settings(span)
        decoupled = bool(settings["decoupled_weight_decay"])
        return adam_row(settings, step=span.step, grad_scale=grad_scale, decoupled=decoupled)

    return _Rule("adam", ("exp_avg", "exp_avg_sq"), row)


def _lion_rule(_: _Groups) -> UpdateRule:
    return _Rule(
        "lion", ("exp_avg",), lambda span, scale: lion_row(_settings(span), grad_scale=scale)
    )


def _adagrad_rule(groups: _Groups) -> UpdateRule | None:
    # The sums begin at zero here, as all states do.
    if any(group["initial_accumulator_value"] for group in groups):
        return None

    def row(span: Span, grad_scale: float) -> Row:
        return adagrad_row(_settings(span), step=span.step, grad_scale=grad_scale)

    return _Rule("adagrad", ("sum",), row)


def _sgd_rule(groups: _Groups) -> UpdateRule:
    def row(span: Span, grad_scale: float) -> Row:
        return sgd_row(_settings(span), step=span.step, grad_scale=grad_scale)

    if any(group["momentum"] for group in groups):
        return _Rule("sgd", ("momentum_buffer",), row)
    return _Rule("sgd_plain", (), row)


def _settings(span: Span) -> Mapping[str, Any]:
    return span.settings or {}


_MAKERS: Mapping[type[torch.optim.Optimizer], Callable[[_Groups], UpdateRule | None]] = {
    torch.optim.AdamW: _adam_rule,
    torch.optim.Adam: _adam_rule,
    torch.optim.SGD: _sgd_rule,
    torch.optim.Adagrad: _adagrad_rule,
    Lion: _lion_rule,
}
