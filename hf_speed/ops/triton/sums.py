"""`reference.square_sum` on a CUDA device, in the same order of additions."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_speed.ops.reference import SUM_LANES, SUM_ROWS
from hf_speed.ops.triton.numbers import load_float
from hf_speed.ops.triton.update import OPTIONS, words

TILES = 4
"""Tiles of 4096 numbers to a program: 128 lanes, one to a thread."""

UNROLL = 8
"""Rows whose loads are in flight together."""

# ruff: noqa: N803  Triton's convention for constants.


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares of (n,) float32, bfloat16 or float16 values, as a float64 scalar."""
    sums = _tile_sums(words(values), square=True)
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
        launch(
            values,
            sums,
            len(values),
            num_tiles,
            SQUARE=square,
            LANES=SUM_LANES,
            ROWS=SUM_ROWS,
            TILES=TILES,
            UNROLL=UNROLL,
            **OPTIONS,
        )
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
    tl.static_assert(LANES == 32)
    total = _halve(total, TILES, 16)
    total = _halve(total, TILES, 8)
    total = _halve(total, TILES, 4)
    total = _halve(total, TILES, 2)
    total = _halve(total, TILES, 1)
    tl.store(sums_ptr + tile, tl.reshape(total, (TILES,)), mask=tile < num_tiles)


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
