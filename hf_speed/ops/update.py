"""One pass over a chunk: read gradient, master and moments; write master, moments and parameter.

    update_(rule, master, grad, moments, table)     checks, then torch.ops.hf_speed.update_
        CPU: hf_speed.ops.update_cpu, csrc/         CUDA: hf_speed.ops.triton.update
    span_norms, square_sum                          what LAMB and clipping need to know before

`hf_speed.ops.reference` is the specification; every backend equals it bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_speed.ops import update_cpu
from hf_speed.ops.reference import BLOCK, RULES, Moment
from hf_speed.ops.spans import SpanTable

_GRADS = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.bfloat16, torch.uint8)
_OUTS = (torch.bfloat16, torch.float16)


def update_(
    rule: str,
    master: Tensor,
    grad: Tensor,
    moments: Sequence[Moment],
    table: SpanTable,
    *,
    out: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> None:
    """Update one chunk in place, on the device where it lies; see `reference.update_`.

    Args:
        rule: a key of `reference.RULES`.
        master: (n,) float32.
        grad: (n,) float32, bfloat16 or float16.
        moments: as the rule counts them; all float32, all bfloat16, or all uint8 with scales.
        table: spans that cover the n elements. On the CPU, or where the chunk lies.
        out: (n,) bfloat16 or float16, takes the rounded master; None: not wanted.
        seed: of stochastic rounding, 0 <= seed < 2**64; a new one for every step.
        offset: index of the chunk's first element within its group, a multiple of 256.

    Raises:
        ValueError: the tensors do not fit together.
    """
    check(rule, master, grad, moments, out)
    if offset < 0 or offset % BLOCK:
        raise ValueError(f"offset={offset} is not a multiple of {BLOCK}, from 0.")
    torch.ops.hf_speed.update_(
        rule,
        master,
        grad,
        [moment.values for moment in moments],
        [moment.scales for moment in moments if moment.scales is not None],
        out,
        table.stops,
        table.rows,
        # The schema's integers are signed.
        seed - (1 << 64) if seed >= 1 << 63 else seed,
        offset,
    )


def span_norms(master: Tensor, grad: Tensor, moments: Sequence[Moment], table: SpanTable) -> Tensor:
    """Sums of squares of each span's master and of Adam's next direction: what LAMB scales by.

    The direction is step_size * m / denominator + l2 * p, where l2 is not added to the gradient.
    With the step_size of lr = 1 and l2 = weight_decay it is LAMB's, and LAMB's update is AdamW's
    with lr * |p| / |direction| as the learning rate of the span. Nothing is written.

    Args:
        master: (n,) float32.
        grad: (n,) float32, bfloat16 or float16.
        moments: exp_avg and exp_avg_sq, float32 or bfloat16.
        table: spans with rows of Adam, on the CPU.

    Returns:
        (num_spans, 2) float64 where the master lies; zeros for spans that are not touched.

    Raises:
        ValueError: the tensors do not fit together.

    Source: LAMB, arXiv:1904.00962, algorithm 2.
    """
    check("adam", master, grad, moments, None)
    if any(moment.scales is not None for moment in moments):
        raise ValueError("span_norms reads float32 or bfloat16 moments, not 8-bit ones.")
    if master.is_cuda:
        from hf_speed.ops.triton import sums as sums_cuda

        return sums_cuda.span_norms(master, grad, moments, table)
    return update_cpu.span_norms(update_cpu.request("adam", master, grad, moments, table))


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares in one fixed order, as a float64 scalar on the device of `values`.

    Args:
        values: (n,) contiguous float32, bfloat16 or float16.

    Raises:
        ValueError: another shape or dtype.
    """
    if values.dim() != 1 or not values.is_contiguous() or values.dtype not in _GRADS:
        raise ValueError(f"square_sum takes a flat float tensor; this is {_describe(values)}.")
    return torch.ops.hf_speed.square_sum(values)


def check(
    rule: str, master: Tensor, grad: Tensor, moments: Sequence[Moment], out: Tensor | None
) -> None:
    """Raise a ValueError that names the first tensor of a chunk that does not fit the others."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}.")
    n = master.numel()
    _check_flat("master", master, numel=n, dtypes=(torch.float32,))
    _check_flat("grad", grad, numel=n, dtypes=_GRADS)
    if len(moments) != len(RULES[rule].signed):
        raise ValueError(
            f"rule {rule!r} has {len(RULES[rule].signed)} moments, but {len(moments)} were given."
        )
    for moment in moments:
        _check_moment(moment, n)
    if len({moment.values.dtype for moment in moments}) > 1:
        raise ValueError("the moments of a chunk must share one dtype.")
    if out is not None:
        _check_flat("out", out, numel=n, dtypes=_OUTS)
    others = [grad, out, *(values for moment in moments for values in moment)]
    if any(other is not None and other.device != master.device for other in others):
        raise ValueError(f"the tensors of a chunk must all lie on {master.device}, as master does.")


def _check_moment(moment: Moment, n: int) -> None:
    _check_flat("a moment", moment.values, numel=n, dtypes=_MOMENTS)
    if (moment.values.dtype == torch.uint8) != (moment.scales is not None):
        raise ValueError("a moment has scales if, and only if, it is uint8.")
    if moment.scales is not None:
        blocks = -(-n // BLOCK)
        _check_flat("a moment's scales", moment.scales, numel=blocks, dtypes=(torch.float32,))


def _check_flat(name: str, values: Tensor, *, numel: int, dtypes: Sequence[torch.dtype]) -> None:
    if values.shape == (numel,) and values.is_contiguous() and values.dtype in dtypes:
        return
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ValueError(
        f"{name} must be contiguous ({numel},) {wanted}, to go with the chunk's master; it is "
        f"{_describe(values)}."
    )


def _describe(values: Tensor) -> str:
    layout = "contiguous" if values.is_contiguous() else "strided"
    return f"{layout} {tuple(values.shape)} {values.dtype} on {values.device}"


# ---------------------------------------------------------------- the library's operators


@torch.library.custom_op(
    "hf_speed::update_", mutates_args=("master", "values", "scales", "out"), device_types="cpu"
)
def _update_op(  # noqa: PLR0913  A schema is flat: a NamedTuple's tensors come one by one.
    rule: str,
    master: Tensor,
    grad: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    out: Tensor | None,
    stops: Tensor,
    rows: Tensor,
    seed: int,
    offset: int,
) -> None:
    moments, table = _paired(values, scales), SpanTable(stops, rows)
    update_cpu.run(
        update_cpu.request(
            rule, master, grad, moments, table, out=out, seed=seed % (1 << 64), offset=offset
        )
    )


@_update_op.register_kernel("cuda")
def _(  # noqa: PLR0913  As above.
    rule: str,
    master: Tensor,
    grad: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    out: Tensor | None,
    stops: Tensor,
    rows: Tensor,
    seed: int,
    offset: int,
) -> None:
    from hf_speed.ops.triton import update as update_cuda

    moments, table = _paired(values, scales), SpanTable(stops, rows)
    update_cuda.update_(
        rule, master, grad, moments, table, out=out, seed=seed % (1 << 64), offset=offset
    )


@_update_op.register_fake
def _(*_: object) -> None:
    return None


def _paired(values: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Moment]:
    """Moments from the flat lists of a schema: scales are there for all or for none."""
    return [
        Moment(each, scales[position] if scales else None) for position, each in enumerate(values)
    ]


@torch.library.custom_op("hf_speed::square_sum", mutates_args=(), device_types="cpu")
def _square_sum_op(values: Tensor) -> Tensor:
    return update_cpu.square_sum(values)


@_square_sum_op.register_kernel("cuda")
def _(values: Tensor) -> Tensor:
    from hf_speed.ops.triton import sums as sums_cuda

    return sums_cuda.square_sum(values)


@_square_sum_op.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty((), dtype=torch.float64)
