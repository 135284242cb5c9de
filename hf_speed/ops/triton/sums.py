"""`reference.square_sum` and `span_norms` on a CUDA device, in the same order of additions."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_speed.ops.reference import SUM_LANES, SUM_ROWS, Moment
from hf_speed.ops.spans import ROW, SpanTable, require_cover
from hf_speed.ops.triton.arithmetic import adam_direction
from hf_speed.ops.triton.numbers import load_float
from hf_speed.ops.triton.update import OPTIONS, words

TILES = 4
"""Tiles of 4096 numbers to a program: 128 lanes, one to a thread."""

UNROLL = 8
"""Rows whose loads are in flight together."""

SHAPE: dict[str, int] = {
    "LANES": SUM_LANES,
    "ROWS": SUM_ROWS,
    "TILES": TILES,
    "UNROLL": UNROLL,
}
"""The constants of both kernels."""

# ruff: noqa: N803  Triton's convention for constants.


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares of (n,) float32, bfloat16 or float16 values, as a float64 scalar."""
    return _fold(_tile_sums(words(values), square=True))


def span_norms(master: Tensor, grad: Tensor, moments: Sequence[Moment], table: SpanTable) -> Tensor:
    """Sums of squares of each span's master and of Adam's next direction.

    Two to five kernels a span; nothing waits for the device.

    Args:
        master: (n,) float32.
        grad: (n,) float32, bfloat16 or float16.
        moments: exp_avg and exp_avg_sq, float32 or bfloat16.
        table: spans with rows of Adam, on the CPU.

    Returns:
        (num_spans, 2) float64 on the device of `master`; zeros for untouched spans.

    Raises:
        ValueError: the table does not cover the chunk.
    """
    require_cover(table, len(master))
    stops, tile = table.stops.tolist(), SUM_LANES * SUM_ROWS
    rows = table.rows.to(master.device, non_blocking=True)
    norms = torch.zeros(len(stops), 2, dtype=torch.float64, device=master.device)
    tensors = [words(each) for each in (master, grad, moments[0].values, moments[1].values)]
    for span, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        if not bool(table.rows[span, 0]):
            continue
        first_tile, num_tiles = begin // tile, (end - 1) // tile - begin // tile + 1
        sums = norms.new_zeros(2, -(-len(master) // tile))
        launch: Any = norms_kernel[(triton.cdiv(num_tiles, TILES),)]
        with torch.cuda.device_of(master):
            launch(
                *tensors, rows, *sums, span, begin, end, first_tile, num_tiles,
                WIDTH=ROW, **SHAPE, **OPTIONS,
            )  # fmt: skip
        norms[span, 0], norms[span, 1] = _fold(sums[0]), _fold(sums[1])
    return norms


def _fold(sums: Tensor) -> Tensor:
    while len(sums) > 1:
        sums = _tile_sums(sums, square=False)
    return sums[0]


def _tile_sums(values: Tensor, *, square: bool) -> Tensor:
    num_tiles = max(1, -(-len(values) // (SUM_LANES * SUM_ROWS)))
    sums = torch.zeros(num_tiles, dtype=torch.float64, device=values.device)
    if len(values) == 0:
        return sums
    launch: Any = tile_sum_kernel[(triton.cdiv(num_tiles, TILES),)]
    with torch.cuda.device_of(values):
        launch(values, sums, len(values), num_tiles, SQUARE=square, **SHAPE, **OPTIONS)
    return sums


@triton.jit
def tile_sum_kernel(  # noqa: PLR0913  A kernel takes every address and size that it works on.
    values_ptr: "Any",
    sums_ptr: "Any",
    n: tl.int64,  # pyrefly: ignore[not-a-type]
    num_tiles: tl.int64,  # pyrefly: ignore[not-a-type]
    SQUARE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Add up TILES tiles of (ROWS, LANES): rows in order, then lanes by halves."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    start = tile[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    total = _read(values_ptr, start, n, SQUARE)
    for row in tl.range(1, ROWS, loop_unroll_factor=UNROLL):
        total = total + _read(values_ptr, start + row * LANES, n, SQUARE)
    tl.store(sums_ptr + tile, _add_lanes(total, LANES, TILES), mask=tile < num_tiles)


@triton.jit
def norms_kernel(  # noqa: PLR0913  As above.
    master_ptr: "Any",
    grad_ptr: "Any",
    first_ptr: "Any",
    second_ptr: "Any",
    rows_ptr: "Any",
    master_sums: "Any",
    direction_sums: "Any",
    span: tl.int64,  # pyrefly: ignore[not-a-type]
    begin: tl.int64,  # pyrefly: ignore[not-a-type]
    end: tl.int64,  # pyrefly: ignore[not-a-type]
    first_tile: tl.int64,  # pyrefly: ignore[not-a-type]
    num_tiles: tl.int64,  # pyrefly: ignore[not-a-type]
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Add up squares of masters and directions in [begin, end), by tiles of the whole chunk."""
    count = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    tile = first_tile + count
    start = tile[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    coefficients = rows_ptr + span * WIDTH
    masters = tl.zeros((TILES, LANES), tl.float64)
    directions = tl.zeros((TILES, LANES), tl.float64)
    for row in tl.range(0, ROWS, loop_unroll_factor=UNROLL):
        index = start + row * LANES
        inside = (index >= begin) & (index < end)
        p = load_float(master_ptr, index, inside)
        g = load_float(grad_ptr, index, inside) * tl.load(coefficients + 1)
        m = load_float(first_ptr, index, inside)
        v = load_float(second_ptr, index, inside)
        u = adam_direction(p, g, m, v, coefficients)
        u = tl.where(inside, u, 0.0).to(tl.float64)
        p = p.to(tl.float64)
        masters = masters + p * p
        directions = directions + u * u
    exists = count < num_tiles
    tl.store(master_sums + tile, _add_lanes(masters, LANES, TILES), mask=exists)
    tl.store(direction_sums + tile, _add_lanes(directions, LANES, TILES), mask=exists)


@triton.jit
def _add_lanes(total: tl.tensor, LANES: tl.constexpr, TILES: tl.constexpr) -> tl.tensor:
    tl.static_assert(LANES == 32)
    total = _halve(total, TILES, 16)
    total = _halve(total, TILES, 8)
    total = _halve(total, TILES, 4)
    total = _halve(total, TILES, 2)
    total = _halve(total, TILES, 1)
    return tl.reshape(total, (TILES,))


@triton.jit
def _halve(lanes: tl.tensor, TILES: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """Add the upper half of (TILES, 2 * HALF) lanes to the lower."""
    halves = tl.reshape(lanes, (TILES, 2, HALF))
    low, high = tl.split(tl.permute(halves, (0, 2, 1)))
    return low + high


@triton.jit
def _read(values_ptr: tl.tensor, index: tl.tensor, n: tl.tensor, SQUARE: tl.constexpr) -> tl.tensor:
    """Values at `index` in fp64, squared or as they are; zeros beyond n."""
    exists = index < n
    if SQUARE:
        x = load_float(values_ptr, index, exists).to(tl.float64)
        x = x * x
    else:
        x = tl.load(values_ptr + index, mask=exists, other=0.0)
    return x
