"""How numbers lie in memory: bf16 with random rounding, 8-bit blocks, and the random bits.

A bf16 tensor reaches a kernel as int16 and is widened and rounded here with integer arithmetic: one
code for the compiler and for Triton's interpreter, which computes bf16 itself wrongly.

Annotations in quotes: Triton resolves the others itself, and knows no Any.
"""

from typing import Any

import triton
import triton.language as tl

# ruff: noqa: N803  Triton's convention for constants.


@triton.jit
def random_bits(index: tl.tensor, key1: tl.tensor, key2: tl.tensor) -> tl.tensor:
    """32 random bits for each 64-bit element index: `reference.random_bits`."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    x = low ^ key1 ^ (high * tl.full((1, 1), 0x85EBCA6B, tl.uint32))
    x = x ^ (x >> 16)
    x = x * tl.full((1, 1), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x + key2 + high * tl.full((1, 1), 0x9E3779B9, tl.uint32)
    x = x * tl.full((1, 1), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def load_float(pointer: "Any", index: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Read float32, float16, or bfloat16 given as int16; exact."""
    values = tl.load(pointer + index, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        word = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        values = word.to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def store_rounded(pointer: "Any", index: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Write float16, or bfloat16 given as int16, rounded to nearest even."""
    if pointer.dtype.element_ty == tl.int16:
        word = x.to(tl.uint32, bitcast=True)
        odd = (word >> 16) & 1
        _store_upper(pointer, index, word, odd + 0x7FFF, mask)
    else:
        tl.store(pointer + index, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_upper(
    pointer: "Any", index: tl.tensor, word: tl.tensor, addend: tl.tensor, mask: tl.tensor
) -> None:
    """Write the upper halves of word + addend; a NaN stays one."""
    is_nan = (word & 0x7FFFFFFF) > 0x7F800000
    upper = tl.where(is_nan, (word >> 16) | 0x0040, (word + addend) >> 16)
    tl.store(pointer + index, upper.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)


@triton.jit
def load_moment(
    pointer: "Any",
    scales: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    SIGNED: tl.constexpr,
) -> tl.tensor:
    """Read a moment of any kind as fp32; `index` is (blocks, 256) where `scales` is given."""
    if scales is None:
        values = load_float(pointer, index, mask)
    else:
        block, exists = _blocks(index, mask)
        spread = tl.load(scales + block, mask=exists, other=0.0)
        codes = tl.load(pointer + index, mask=mask, other=0)
        if SIGNED:
            c = codes.to(tl.int8, bitcast=True).to(tl.float32)
            t = tl.div_rn(tl.abs(c), tl.full((1, 1), 127.0, tl.float32))
            square = t * t
            values = tl.where(c < 0, -square, square) * spread[:, None]
        else:
            t = tl.div_rn(codes.to(tl.float32), tl.full((1, 1), 255.0, tl.float32))
            u = t * t
            values = (u * u) * spread[:, None]
    return values


@triton.jit
def store_moment(
    pointer: "Any",
    scales: tl.tensor,
    index: tl.tensor,
    values: tl.tensor,
    touched: tl.tensor,
    mask: tl.tensor,
    bits: tl.tensor,
    SIGNED: tl.constexpr,
) -> None:
    """Write a moment of any kind: `reference.store_moment`.

    Untouched elements are written back as they were (rounding keeps a bf16 number): a mask that
    follows the spans would split every store into single elements. `bits` holds random bits in its
    lower half.
    """
    if scales is not None:
        block, exists = _blocks(index, mask)
        codes, scale = _encode(tl.where(mask, values, 0.0), SIGNED)
        written = tl.max(touched.to(tl.int32), axis=1) != 0
        before = tl.load(pointer + index, mask=mask, other=0)
        tl.store(pointer + index, tl.where(written[:, None], codes, before), mask=mask)
        tl.store(scales + block, scale, mask=exists & written)
    elif pointer.dtype.element_ty == tl.int16:
        word = values.to(tl.uint32, bitcast=True)
        _store_upper(pointer, index, word, bits & 0xFFFF, mask)
    else:
        tl.store(pointer + index, values, mask=mask)


@triton.jit
def _blocks(index: tl.tensor, mask: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of each row of a tile: its block's number, and whether it has an element."""
    return tl.min(index, axis=1) // 256, tl.max(mask.to(tl.int32), axis=1) != 0


@triton.jit
def _encode(values: tl.tensor, SIGNED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Codes and scales of (blocks, 256) values: `reference.encode_blocks`."""
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    divisor = tl.where(scale > 0, scale, 1.0)[:, None]
    x = tl.div_rn(magnitudes.to(tl.float32, bitcast=True), divisor)
    x = tl.where(x <= 1.0, x, 0.0)
    # The cast cuts towards zero: the floor, as nothing here is negative.
    if SIGNED:
        codes = (tl.sqrt_rn(x) * 127.0 + 0.5).to(tl.int32)
        codes = tl.where(values < 0, -codes, codes)
    else:
        codes = (tl.sqrt_rn(tl.sqrt_rn(x)) * 255.0 + 0.5).to(tl.int32)
        codes = tl.where((values > 0) & (codes == 0), 1, codes)
    return (codes & 0xFF).to(tl.uint8), scale
