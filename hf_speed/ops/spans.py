"""Spans: which elements of a chunk share which numbers.

A chunk is cut into consecutive spans, one per stretch of elements of one parameter group. What a
kernel needs of a group is one row of fp32 coefficients, computed here in doubles from the settings
as torch.optim names them, and rounded once. All backends read these rows, so they agree.

    settings of a group, step -> AdamRow ... -> SpanTable(stops, rows) -> kernel
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROW = 12
"""fp32 numbers in a row: 1.0 or 0.0 (touched or not), the fields of a row type, zeros."""


class AdamRow(NamedTuple):
    """Columns 1 ... 10 of a row of Adam or AdamW."""

    scale: Any
    """Factor of the gradient: clip times unscale, negated where the group maximises."""

    l2: Any
    """weight_decay of Adam; 0 for AdamW."""

    decay: Any
    """1 - lr * weight_decay of AdamW; 1 for Adam."""

    lerp: Any
    """1 - beta1 where that is below 0.5, otherwise -beta1."""

    from_grad: Any
    """0 where 1 - beta1 is below 0.5, otherwise 1: which end `lerp` starts from."""

    beta2: Any
    rest2: Any
    """1 - beta2."""

    step_size: Any
    """lr / (1 - beta1 ** step)."""

    root_correction: Any
    """1 / sqrt(1 - beta2 ** step)."""

    eps: Any


class LionRow(NamedTuple):
    """Columns 1 ... 7 of a row of Lion; `rest` is 1 - beta."""

    scale: Any
    decay: Any
    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    lr: Any


class AdagradRow(NamedTuple):
    """Columns 1 ... 4 of a row of Adagrad."""

    scale: Any
    l2: Any
    step_size: Any
    """lr / (1 + (step - 1) * lr_decay)."""

    eps: Any


class SgdRow(NamedTuple):
    """Columns 1 ... 7 of a row of SGD, with momentum or without."""

    scale: Any
    l2: Any
    momentum: Any
    """0 at the first step, which only stores the gradient."""

    undamped: Any
    """1 - dampening; 1 at the first step and without momentum."""

    of_grad: Any
    of_momentum: Any
    """The direction is of_grad * g + of_momentum * m: (1, momentum) with Nesterov, else (0, 1)."""

    lr: Any


Row = AdamRow | LionRow | AdagradRow | SgdRow


class SpanTable(NamedTuple):
    """The spans of a chunk of n elements, as the kernels read them."""

    stops: Tensor
    """(num_spans,) int64, strictly increasing, the last is n: span k is [stops[k-1], stops[k])."""

    rows: Tensor
    """(num_spans, ROW) float32."""


def span_table(
    spans: Sequence[tuple[int, Row | None]], device: torch.device | str = "cpu"
) -> SpanTable:
    """Pack spans, each (stop, row); a row of None leaves its elements untouched."""
    filled = [() if row is None else (1.0, *row) for _, row in spans]
    numbers = [(*row, *(0.0,) * (ROW - len(row))) for row in filled]
    rows = torch.tensor(numbers, dtype=torch.float64).float().view(-1, ROW)
    stops = torch.tensor([stop for stop, _ in spans], dtype=torch.int64)
    return SpanTable(stops.to(device), rows.to(device))


def require_cover(table: SpanTable, n: int) -> None:
    """Raise a ValueError unless the spans of `table` cover n elements, in order."""
    stops = table.stops.tolist()
    increasing = all(low < high for low, high in zip([0, *stops], stops, strict=False))
    if stops[-1:] != [n] * bool(n) or not increasing or table.rows.shape != (len(stops), ROW):
        raise ValueError(
            f"The spans of a chunk of {n} elements must stop at increasing elements, the last at "
            f"{n}, with a row of {ROW} numbers each; these stop at {stops} and have rows "
            f"{tuple(table.rows.shape)}."
        )


def adam_row(
    settings: Mapping[str, Any], *, step: int, grad_scale: float, decoupled: bool
) -> AdamRow:
    """The row of a group of torch.optim.AdamW (`decoupled`) or Adam at its `step`, from 1."""
    lr, decay = float(settings["lr"]), float(settings["weight_decay"])
    beta1, beta2 = (float(beta) for beta in settings["betas"])
    from_grad = 1.0 - beta1 >= 0.5
    return AdamRow(
        scale=_signed(grad_scale, settings),
        l2=0.0 if decoupled else decay,
        decay=1.0 - lr * decay if decoupled else 1.0,
        lerp=-beta1 if from_grad else 1.0 - beta1,
        from_grad=float(from_grad),
        beta2=beta2,
        rest2=1.0 - beta2,
        step_size=lr / (1.0 - beta1**step),
        root_correction=1.0 / math.sqrt(1.0 - beta2**step),
        eps=float(settings["eps"]),
    )


def lion_row(settings: Mapping[str, Any], *, grad_scale: float) -> LionRow:
    """The row of a group of Lion."""
    lr = float(settings["lr"])
    beta1, beta2 = (float(beta) for beta in settings["betas"])
    return LionRow(
        scale=_signed(grad_scale, settings),
        decay=1.0 - lr * float(settings["weight_decay"]),
        beta1=beta1,
        rest1=1.0 - beta1,
        beta2=beta2,
        rest2=1.0 - beta2,
        lr=lr,
    )


def adagrad_row(settings: Mapping[str, Any], *, step: int, grad_scale: float) -> AdagradRow:
    """The row of a group of torch.optim.Adagrad at its `step`, from 1."""
    return AdagradRow(
        scale=_signed(grad_scale, settings),
        l2=float(settings["weight_decay"]),
        step_size=float(settings["lr"]) / (1.0 + (step - 1) * float(settings["lr_decay"])),
        eps=float(settings["eps"]),
    )


def sgd_row(settings: Mapping[str, Any], *, step: int, grad_scale: float) -> SgdRow:
    """The row of a group of torch.optim.SGD at its `step`, from 1.

    torch's first step stores the gradient undamped; without momentum every step does.
    """
    momentum = float(settings["momentum"])
    stores_only = step == 1 or momentum == 0.0
    return SgdRow(
        scale=_signed(grad_scale, settings),
        l2=float(settings["weight_decay"]),
        momentum=0.0 if stores_only else momentum,
        undamped=1.0 if stores_only else 1.0 - float(settings["dampening"]),
        of_grad=float(bool(settings["nesterov"])),
        of_momentum=momentum if settings["nesterov"] else 1.0,
        lr=float(settings["lr"]),
    )


def _signed(grad_scale: float, settings: Mapping[str, Any]) -> float:
    return -grad_scale if settings.get("maximize") else grad_scale
