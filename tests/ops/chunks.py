"""Random chunks for the tests of the update kernels, and their comparison."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.ops.reference import BLOCK, RULES, Moment
from hf_speed.ops.spans import (
    AdamRow,
    Row,
    SpanTable,
    adagrad_row,
    adam_row,
    lion_row,
    sgd_row,
    span_table,
)

MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
GRAD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUT_DTYPES = (torch.bfloat16, torch.float16, None)


class Chunk(NamedTuple):
    """The arguments of an update."""

    master: Tensor
    grad: Tensor
    moments: list[Moment]
    table: SpanTable
    out: Tensor | None

    def copy(self, device: str = "cpu") -> "Chunk":
        """A second one in other memory; the table stays."""
        return Chunk(
            self.master.to(device, copy=True),
            self.grad.to(device, copy=True),
            [
                Moment(
                    values.to(device, copy=True),
                    None if scales is None else scales.to(device, copy=True),
                )
                for values, scales in self.moments
            ],
            self.table,
            None if self.out is None else self.out.to(device, copy=True),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What an update may have written, by name."""
        found = {"master": self.master}
        for position, (values, scales) in enumerate(self.moments):
            found[f"moment {position}"] = values
            if scales is not None:
                found[f"scales {position}"] = scales
        return found if self.out is None else {**found, "out": self.out}


def settings(**changes: Any) -> dict[str, Any]:
    """A parameter group with the settings of every rule."""
    defaults = {
        "lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "maximize": False,
        "momentum": 0.9, "dampening": 0.1, "nesterov": False, "lr_decay": 0.1,
    }  # fmt: skip
    return {**defaults, **changes}


def row(rule: str, group: dict[str, Any], *, step: int, grad_scale: float = 1.0) -> Row:
    """The row of `group`; the rule adam decouples its decay where group["decoupled"]."""
    if rule == "adam":
        decoupled = bool(group.get("decoupled", True))
        return adam_row(group, step=step, grad_scale=grad_scale, decoupled=decoupled)
    if rule == "lion":
        return lion_row(group, grad_scale=grad_scale)
    if rule == "adagrad":
        return adagrad_row(group, step=step, grad_scale=grad_scale)
    if rule == "sgd_plain":
        group = {**group, "momentum": 0.0, "nesterov": False}
    return sgd_row(group, step=step, grad_scale=grad_scale)


def random_row(rule: str, pick: torch.Generator) -> Row:
    """The row of a group with random settings."""

    def real(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=pick))

    def coin() -> bool:
        return real(0, 1) < 0.5

    group = settings(
        lr=10 ** real(-4, -1),
        weight_decay=real(0, 0.3) * coin(),
        betas=(real(0, 0.99), real(0.8, 0.9999)),
        eps=10 ** real(-10, -6),
        maximize=coin(),
        momentum=real(0.1, 0.99),
        dampening=real(0, 0.5) * coin(),
        nesterov=coin(),
        decoupled=coin(),
    )
    return row(rule, group, step=1 + int(real(0, 50)), grad_scale=real(0.01, 2))


def random_table(rule: str, stops: Sequence[int], pick: torch.Generator) -> SpanTable:
    """Spans that end at `stops`, a third of them untouched."""
    return span_table(
        [
            (stop, None if float(torch.rand((), generator=pick)) < 0.33 else random_row(rule, pick))
            for stop in stops
        ]
    )


def fresh_moments(rule: str, n: int, dtype: torch.dtype) -> list[Moment]:
    """Moments of zeros."""
    scales = (torch.zeros(-(-n // BLOCK)) for _ in RULES[rule].signed)
    return [
        Moment(torch.zeros(n, dtype=dtype), each if dtype == torch.uint8 else None)
        for each in scales
    ]


def random_chunk(
    rule: str,
    n: int,
    stops: Sequence[int],
    *,
    moment_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Chunk:
    """A chunk of normal numbers whose size differs by block, with moments of zeros."""
    pick = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(-(-n // BLOCK), generator=pick) * 4 - 3)
    spread = sizes.repeat_interleave(BLOCK)[:n]
    return Chunk(
        master=torch.randn(n, generator=pick),
        grad=(torch.randn(n, generator=pick) * spread).to(grad_dtype),
        moments=fresh_moments(rule, n, moment_dtype),
        table=random_table(rule, stops, pick),
        out=None if out_dtype is None else torch.zeros(n, dtype=out_dtype),
    )


def random_stops(n: int, num_spans: int, pick: torch.Generator) -> list[int]:
    """Increasing stops of at most `num_spans` spans that cover n elements."""
    inner = torch.randint(1, max(2, n), (num_spans - 1,), generator=pick).tolist()
    return sorted({*(stop for stop in inner if stop < n), n})


def differences(one: Chunk, other: Chunk) -> list[str]:
    """Which tensors differ in a bit (NaNs are equal), for an assertion to print."""
    found = []
    theirs = other.tensors()
    for name, mine in one.tensors().items():
        yours = theirs[name].to(mine.device)
        same_bits = _bits(mine) == _bits(yours)
        unequal = ~(same_bits | (mine.isnan() & yours.isnan()))
        if unequal.any():
            at = int(unequal.nonzero()[0])
            found.append(f"{name}: {int(unequal.sum())}, first [{at}] {mine[at]} {yours[at]}")
    return found


def _bits(values: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return values.view(integers[values.element_size()])


def adam_columns(table: SpanTable) -> AdamRow:
    """The columns of a table of Adam, one number a span."""
    return AdamRow(*table.rows.T[1 : 1 + len(AdamRow._fields)])
