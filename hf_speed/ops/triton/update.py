"""One chunk's update on a CUDA device: `reference.update_` with the same arguments, bitwise equal.

    update_(rule, master, grad, moments, table, *, out=None, seed=0, offset=0) -> None

One program updates TILE_BLOCKS blocks of 256 elements: reads master, gradient and moments once,
walks the spans that meet its tile (mostly one), and writes each once.

    launcher -> update_kernel -> numbers.load_* -> arithmetic.apply_rule, a span at a time
                              -> numbers.store_*
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_speed.ops.reference import BLOCK, RULES, Moment, random_keys
from hf_speed.ops.spans import ROW, SpanTable, require_cover
from hf_speed.ops.triton.arithmetic import apply_rule
from hf_speed.ops.triton.numbers import (
    load_float,
    load_moment,
    random_bits,
    store_moment,
    store_rounded,
)

TILE_BLOCKS = 2
"""Blocks of 256 elements to a program: 4 to each of its 128 threads, one 16-byte access of fp32."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""How the kernels are compiled. Fused multiply-adds would round once where C++ rounds twice."""

# ruff: noqa: N803  Triton's convention for constants.


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
    """Update one chunk in place, on the current stream of its device.

    Args:
        rule: a key of `reference.RULES`.
        master: (n,) float32, contiguous like every tensor here.
        grad: (n,) float32, bfloat16 or float16.
        moments: as many as `reference.RULES[rule].signed`.
        table: its spans; moved to the device here if it is not there yet.
        out: (n,) bfloat16 or float16, or None.
        seed: of the stochastic rounding, 0 <= seed < 2**64.
        offset: index of the chunk's first element within its group, a multiple of 256.

    Raises:
        ValueError: the table does not cover the chunk. Asked of tables on the CPU only; elements
            that a table on the device leaves out stay untouched.
    """
    n = len(master)
    if not table.stops.is_cuda:
        require_cover(table, n)
    if n == 0:
        return
    stops = table.stops.to(master.device, non_blocking=True)
    rows = table.rows.to(master.device, non_blocking=True)
    first, second = [*(pointers(moment) for moment in moments), (None, None), (None, None)][:2]
    launch: Any = update_kernel[(triton.cdiv(n, TILE_BLOCKS * BLOCK),)]
    with torch.cuda.device_of(master):
        launch(
            master,
            words(grad),
            None if out is None else words(out),
            *first,
            *second,
            stops,
            rows,
            n,
            len(stops),
            offset,
            *(key - (key >> 31 << 32) for key in random_keys(seed)),
            RULE=rule,
            FIRST_SIGNED=RULES[rule].signed[:1] == (True,),
            ROW=ROW,
            BLOCKS=TILE_BLOCKS,
            **OPTIONS,
        )


def words(values: Tensor) -> Tensor:
    """A bfloat16 tensor as int16, any other as it is: what kernels take."""
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def pointers(moment: Moment) -> tuple[Tensor, Tensor | None]:
    """A moment as kernels take it."""
    return words(moment.values), moment.scales


@triton.jit
def update_kernel(  # noqa: PLR0913  A kernel takes every address and size that it works on.
    master_ptr: "Any",
    grad_ptr: "Any",
    out_ptr: "Any",
    first_ptr: "Any",
    first_scales: "Any",
    second_ptr: "Any",
    second_scales: "Any",
    stops_ptr: "Any",
    rows_ptr: "Any",
    n: tl.int64,  # pyrefly: ignore[not-a-type]
    num_spans: tl.int32,  # pyrefly: ignore[not-a-type]
    offset: tl.int64,  # pyrefly: ignore[not-a-type]
    key1: tl.int32,  # pyrefly: ignore[not-a-type]
    key2: tl.int32,  # pyrefly: ignore[not-a-type]
    RULE: tl.constexpr,
    FIRST_SIGNED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Update one tile of (BLOCKS, 256) elements. Absent tensors are None; bfloat16 is int16."""
    begin = tl.program_id(0).to(tl.int64) * (BLOCKS * 256)
    lanes = tl.arange(0, BLOCKS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    index = begin + lanes
    exists = index < n
    p0 = tl.load(master_ptr + index, mask=exists, other=0.0)
    gradient = load_float(grad_ptr, index, exists)
    m0 = tl.zeros_like(p0)
    v0 = tl.zeros_like(p0)
    if first_ptr is not None:
        m0 = load_moment(first_ptr, first_scales, index, exists, FIRST_SIGNED)
    if second_ptr is not None:
        v0 = load_moment(second_ptr, second_scales, index, exists, False)  # noqa: FBT003
    p, m, v = p0, m0, v0
    touched = index < 0
    end = tl.minimum(begin + BLOCKS * 256, n.to(tl.int64))
    span = _first_span(stops_ptr, num_spans, begin)
    while (begin < end) & (span < num_spans):
        stop = tl.load(stops_ptr + span)
        row = rows_ptr + span * ROW
        # Of an untouched span nothing is here.
        here = (index >= begin) & (index < tl.where(tl.load(row) != 0, stop, begin)) & exists
        p1, m1, v1 = apply_rule(p0, gradient * tl.load(row + 1), m0, v0, row, RULE)
        p, m, v = tl.where(here, p1, p), tl.where(here, m1, m), tl.where(here, v1, v)
        touched = touched | here
        begin = stop
        span += 1
    bits = random_bits(
        offset + index, key1.to(tl.uint32, bitcast=True), key2.to(tl.uint32, bitcast=True)
    )
    tl.store(master_ptr + index, p, mask=exists)
    if first_ptr is not None:
        store_moment(first_ptr, first_scales, index, m, touched, exists, bits, FIRST_SIGNED)
    if second_ptr is not None:
        store_moment(second_ptr, second_scales, index, v, touched, exists, bits >> 16, False)  # noqa: FBT003
    if out_ptr is not None:
        store_rounded(out_ptr, index, p, exists)


@triton.jit
def _first_span(stops_ptr: tl.tensor, num_spans: tl.tensor, element: tl.tensor) -> tl.tensor:
    """The span that holds `element`: the first whose stop lies above it."""
    low = num_spans * 0
    high = num_spans - 1
    while low < high:
        middle = (low + high) // 2
        above = tl.load(stops_ptr + middle) > element
        low = tl.where(above, low, middle + 1)
        high = tl.where(above, middle, high)
    return low
