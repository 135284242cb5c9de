"""The update kernels in plain torch: the oracle that C++ and Triton must equal bitwise.

Every line is one IEEE-754 operation in fp32 (add, subtract, multiply, divide, square root, each
rounded to nearest even, subnormals kept), in the order written, never fused (no FMA). An
implementation that does the same operations is equal bit for bit, whatever its vector width,
threads, chunk sizes or device. What may differ: the payload of a NaN.

    g     = float(grad) * scale                  read, exact
    m, v  = decode(moments)                      fp32 | bf16: exact | 8 bits: `decode_blocks`
    p, m, v = one of RULES                       the arithmetic of `adam`, `lion`, `adagrad`, `sgd`
    moments = encode(m, v)                       fp32 | bf16: `round_stochastic` | `encode_blocks`
    out   = p rounded to nearest even            bf16 or fp16, or nothing

The numbers of a parameter group reach a kernel as one row of fp32 coefficients per span
(`hf_speed.ops.spans`), so the arithmetic on doubles (bias corrections, 1 - lr * weight_decay) is
done once, on the host, for all of them.

Sources: Adam arXiv:1412.6980, AdamW arXiv:1711.05101, Lion arXiv:2302.06675, block-wise 8-bit
states arXiv:2110.02861, the zero point of second moments arXiv:2309.01507 section 4.1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.ops.spans import (
    AdagradRow,
    AdamRow,
    LionRow,
    SgdRow,
    SpanTable,
)

BLOCK = 256
"""Elements that share one fp32 scale in an 8-bit moment."""

SUM_LANES, SUM_ROWS = 32, 128
"""`square_sum` adds SUM_ROWS rows of SUM_LANES numbers at a time."""


class Moment(NamedTuple):
    """One moment of a chunk of n elements, in memory."""

    values: Tensor
    """(n,) float32, bfloat16, or uint8 codes."""

    scales: Tensor | None = None
    """(ceil(n / BLOCK),) float32 beside uint8 codes; otherwise None."""


class Rule(NamedTuple):
    """An update rule: its arithmetic, and the kind of each moment in order."""

    arithmetic: Callable[..., tuple[Tensor, ...]]
    """(p, g, *moments, row) -> (p, *moments), elementwise in fp32."""

    row: type
    """The NamedTuple of coefficients that the arithmetic reads."""

    signed: tuple[bool, ...]
    """Of each moment: does its 8-bit code carry a sign?"""


def root(x: Tensor) -> Tensor:
    """The square root, rounded to nearest even, of fp32.

    In fp64, whose rounding to fp32 is that of the exact root. torch's own fp32 square root on the
    CPU is not rounded to nearest: MKL's is one unit off for a fifth of all numbers.
    """
    return torch.sqrt(x.double()).float()


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, row: AdamRow) -> tuple[Tensor, ...]:
    """Adam (row.decay = 1) and AdamW (row.l2 = 0), in the order of torch.optim's.

    torch's lerp: from the nearer end, so that beta1 = 0 gives m = g exactly.
    """
    g = g + row.l2 * p
    p = p * row.decay
    m, denominator, v = _adam_averages(g, m, v, row)
    p = p - (row.step_size * m) / denominator
    return p, m, v


def _adam_averages(g: Tensor, m: Tensor, v: Tensor, row: AdamRow) -> tuple[Tensor, Tensor, Tensor]:
    base = torch.where(row.from_grad != 0, g, m)
    m = base + row.lerp * (g - m)
    v = v * row.beta2 + (row.rest2 * g) * g
    denominator = root(v) * row.root_correction + row.eps
    return m, denominator, v


def lion(p: Tensor, g: Tensor, m: Tensor, row: LionRow) -> tuple[Tensor, ...]:
    """Lion. The sign of 0 is 0 (and of NaN: 0)."""
    mixed = m * row.beta1 + row.rest1 * g
    sign = (mixed > 0).float() - (mixed < 0).float()
    p = p * row.decay
    p = p - row.lr * sign
    m = m * row.beta2 + row.rest2 * g
    return p, m


def adagrad(p: Tensor, g: Tensor, s: Tensor, row: AdagradRow) -> tuple[Tensor, ...]:
    """Adagrad, in the order of torch.optim's."""
    g = g + row.l2 * p
    s = s + g * g
    p = p - (row.step_size * g) / (root(s) + row.eps)
    return p, s


def sgd(p: Tensor, g: Tensor, m: Tensor, row: SgdRow) -> tuple[Tensor, ...]:
    """SGD with momentum, dampening and Nesterov, in the order of torch.optim's.

    Nesterov or not is (row.of_grad, row.of_momentum) = (1, momentum) or (0, 1).
    """
    g = g + row.l2 * p
    m = m * row.momentum + row.undamped * g
    p = p - row.lr * (row.of_grad * g + row.of_momentum * m)
    return p, m


def sgd_plain(p: Tensor, g: Tensor, row: SgdRow) -> tuple[Tensor, ...]:
    """SGD that keeps no momentum."""
    g = g + row.l2 * p
    p = p - row.lr * g
    return (p,)


RULES: dict[str, Rule] = {
    "adam": Rule(adam, AdamRow, (True, False)),
    "lion": Rule(lion, LionRow, (True,)),
    "adagrad": Rule(adagrad, AdagradRow, (False,)),
    "sgd": Rule(sgd, SgdRow, (True,)),
    "sgd_plain": Rule(sgd_plain, SgdRow, ()),
}
"""Every rule by name: moments are exp_avg, exp_avg_sq | exp_avg | sum | momentum_buffer | none."""


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
    """Update one chunk in place: the contract of every backend.

    An element of an untouched span keeps its master and its moments; its `out` is written like any
    other. An 8-bit block with a touched element is encoded anew as a whole; one without keeps its
    bytes.

    Args:
        rule: a key of RULES.
        master: (n,) float32.
        grad: (n,) float32, bfloat16 or float16.
        moments: as RULES[rule].signed counts them.
        table: spans that together cover the n elements, and their coefficients.
        out: (n,) bfloat16 or float16, takes the rounded master; None: not wanted.
        seed: of the stochastic rounding, 0 <= seed < 2**64; a new one for every step.
        offset: index of the chunk's first element within its group, a multiple of BLOCK.
    """
    arithmetic, row_type, signed = RULES[rule]
    rows = table.rows[element_spans(table, len(master))]
    row = row_type(*rows.T[1 : 1 + len(row_type._fields)])
    touched = rows[:, 0] != 0
    g = grad.float() * row.scale
    before = [
        load_moment(moment, signed=is_signed)
        for moment, is_signed in zip(moments, signed, strict=True)
    ]
    p, *after = arithmetic(master, g, *before, row)
    master.copy_(torch.where(touched, p, master))
    bits = random_bits(seed, offset, len(master), device=master.device)
    for position, moment in enumerate(moments):
        store_moment(
            moment,
            torch.where(touched, after[position], before[position]),
            touched,
            (bits >> (16 * position)) & 0xFFFF,
            signed=signed[position],
        )
    if out is not None:
        out.copy_(master.to(out.dtype))


def element_spans(table: SpanTable, n: int) -> Tensor:
    """(n,) int64: the span that holds each element; span k is [stops[k - 1], stops[k])."""
    elements = torch.arange(n, device=table.stops.device)
    return torch.searchsorted(table.stops, elements, right=True)


def load_moment(moment: Moment, *, signed: bool) -> Tensor:
    """The fp32 values of a moment."""
    if moment.scales is None:
        return moment.values.float()
    return decode_blocks(moment.values, moment.scales, signed=signed)


def store_moment(
    moment: Moment, values: Tensor, touched: Tensor, bits: Tensor, *, signed: bool
) -> None:
    """Write fp32 `values` into a moment, where `touched`.

    Args:
        moment: written in place.
        values: (n,) float32, of untouched elements the values that the moment holds.
        touched: (n,) bool.
        bits: (n,) int64 in [0, 2**16), for the stochastic rounding of bfloat16.
        signed: whether 8-bit codes carry a sign.
    """
    if moment.scales is not None:
        codes, scales = encode_blocks(values, signed=signed)
        written = _blocks(touched, fill=False).any(dim=1)
        moment.scales.copy_(torch.where(written, scales, moment.scales))
        whole = written.repeat_interleave(BLOCK)[: len(values)]
        moment.values.copy_(torch.where(whole, codes, moment.values))
        return
    rounded = values if moment.values.dtype == torch.float32 else round_stochastic(values, bits)
    moment.values.copy_(torch.where(touched, rounded, moment.values))


# ---------------------------------------------------------------- 8 bits


def encode_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise to 8 bits, 256 elements a block, through a root.

    The scale of a block is its largest magnitude. With x = |value| / scale in [0, 1], the code is

        signed    c = floor(sqrt(x) * 127 + 0.5), negated where value < 0, as a two's complement
                  byte
        unsigned  c = floor(sqrt(sqrt(x)) * 255 + 0.5), at least 1 where value > 0

    so that the relative error grows only with the square (fourth) root of how far a value lies
    below the largest of its block: 0.8% half a step at the top, 8% at a hundredth (signed) or a
    ten-thousandth (unsigned). Both compand a gradient's magnitude alike: the square root of |g| and
    the fourth root of g * g. A second moment above zero never becomes zero, which would make its
    step explode. The largest element is kept exactly, so a decay common to the block is carried by
    the scale and cannot stall in the rounding. Encoding what was decoded gives the same codes. A
    block of zeros has scale 0 and codes 0: freshly zeroed memory is a moment of zeros.

    A block that holds an infinity or a NaN gets that scale; its codes are then unspecified, and
    what they decode to is not finite or not a number.

    Args:
        values: (n,) float32; the last block may be short.
        signed: for first moments; unsigned ones must not be negative.

    Returns:
        (n,) uint8 codes and (ceil(n / 256),) float32 scales.
    """
    blocks = _blocks(values, fill=0.0)
    # As integers, so that a NaN is larger than every number: its bits are.
    magnitudes = blocks.view(torch.int32) & 0x7FFFFFFF
    scales = magnitudes.amax(dim=1).view(torch.float32)
    divisor = torch.where(scales > 0, scales, 1.0)[:, None]
    x = blocks.abs() / divisor
    if signed:
        codes = torch.floor(root(x) * 127.0 + 0.5)
        codes = torch.where(blocks < 0, -codes, codes)
    else:
        codes = torch.floor(root(root(x)) * 255.0 + 0.5)
        codes = torch.where(blocks > 0, codes.clamp(min=1.0), codes)
    # A cast of NaN to an integer differs between machines.
    codes = torch.nan_to_num(codes).to(torch.int32) & 0xFF
    return codes.to(torch.uint8).flatten()[: len(values)].contiguous(), scales


def decode_blocks(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The inverse of `encode_blocks`: the code's entry in `decode_table` times the scale."""
    table = decode_table(signed=signed).to(codes.device)
    spread = scales.repeat_interleave(BLOCK)[: len(codes)]
    return table[codes.long()] * spread


def decode_table(*, signed: bool) -> Tensor:
    """(256,) float32: what each byte stands for in a block of scale 1.

    signed: with c the byte as two's complement and t = |c| / 127, it is t * t, negated where c < 0.
    unsigned: with t = c / 255 and u = t * t, it is u * u.
    """
    byte = torch.arange(256)
    if signed:
        c = torch.where(byte >= 128, byte - 256, byte).float()
        t = c.abs() / 127.0
        return torch.where(c < 0, -(t * t), t * t)
    t = byte.float() / 255.0
    u = t * t
    return u * u


def _blocks(values: Tensor, *, fill: float) -> Tensor:
    """(ceil(n / BLOCK), BLOCK), the last one filled up."""
    padding = -len(values) % BLOCK
    return torch.cat([values, values.new_full((padding,), fill)]).view(-1, BLOCK)


# ---------------------------------------------------------------- stochastic rounding


def round_stochastic(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up in magnitude as often as the value lies towards the larger one.

    The bits of the value plus 16 random bits, as one 32-bit integer; the upper half of the sum is
    the result. A bf16 value is kept; so is an infinity. A NaN becomes a quiet NaN of its sign.

    Args:
        values: (n,) float32.
        bits: (n,) int64 in [0, 2**16).

    Returns:
        (n,) bfloat16.
    """
    word = values.view(torch.int32).long() & 0xFFFFFFFF
    is_nan = (word & 0x7FFFFFFF) > 0x7F800000
    upper = torch.where(is_nan, (word >> 16) | 0x0040, (word + bits) >> 16)
    # To the signed 16-bit integer of the same bits.
    return ((upper ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def random_keys(seed: int) -> tuple[int, int]:
    """The two 32-bit keys of a seed, computed once per chunk on the host.

    Different seeds have different keys, and each key depends on the whole seed: an element's bits
    at two steps are unrelated, whichever word of the seed counts the steps.
    """
    lower = _mix(seed & 0xFFFFFFFF)
    first = _mix((seed >> 32) ^ lower)
    return first, _mix(first ^ lower ^ 0x9E3779B9)


def random_bits(seed: int, offset: int, n: int, *, device: torch.device | None = None) -> Tensor:
    """(n,) int64 in [0, 2**32): 32 random bits for elements offset ... offset + n - 1.

    A function of seed and element only, so it does not depend on how a group is cut into chunks.
    All in 32-bit unsigned arithmetic that wraps. With (k1, k2) = random_keys(seed) and the
    element's 64-bit index split into words low and high:

        x = low ^ k1 ^ (high * 0x85EBCA6B);  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15
        x += k2 + high * 0x9E3779B9
        x *= 0x846CA68B;  x ^= x >> 16

    The first moment takes bits 0-15, the second bits 16-31.
    """
    key1, key2 = random_keys(seed)
    index = torch.arange(offset, offset + n, device=device)
    high = index >> 32
    x = (index & 0xFFFFFFFF) ^ key1 ^ _multiply(high, 0x85EBCA6B)
    x = x ^ (x >> 16)
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = (x + key2 + _multiply(high, 0x9E3779B9)) & 0xFFFFFFFF
    x = _multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """The product modulo 2**32; halves keep int64 from overflowing."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _mix(x: int) -> int:
    """A bijective hash of 32 bits (lowbias32)."""
    x ^= x >> 16
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


# ---------------------------------------------------------------- sums of squares


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares in one fixed order, as a float64 scalar.

    The square of an fp32 number is exact in fp64, so multiply-add and fused multiply-add agree.
    `_tile_sums` turns the squares into one number per 4096 of them, then those into one per 4096 of
    them, until one is left (of no values: 0).

    Args:
        values: (n,) float32, bfloat16 or float16.
    """
    sums = _tile_sums(values.double() * values.double())
    while len(sums) > 1:
        sums = _tile_sums(sums)
    return sums[0]


def span_norms(master: Tensor, grad: Tensor, moments: Sequence[Moment], table: SpanTable) -> Tensor:
    """Sums of squares of each span's master and of Adam's next direction, for LAMB.

    The direction is (step_size * m) / denominator + l2 * p, with m and the denominator as `adam`
    computes them from a gradient without l2 * p. Each sum is `square_sum` over the whole chunk with
    zeros outside of the span.

    Args:
        master: (n,) float32.
        grad: (n,) float32, bfloat16 or float16.
        moments: exp_avg and exp_avg_sq, float32 or bfloat16.
        table: spans with rows of Adam.

    Returns:
        (num_spans, 2) float64; zeros for untouched spans.
    """
    span = element_spans(table, len(master))
    rows = table.rows[span]
    row = AdamRow(*rows.T[1 : 1 + len(AdamRow._fields)])
    g = grad.float() * row.scale
    m, v = (load_moment(moment, signed=True) for moment in moments)
    m, denominator, _ = _adam_averages(g, m, v, row)
    direction = (row.step_size * m) / denominator + row.l2 * master
    norms = torch.zeros(len(table.stops), 2, dtype=torch.float64, device=master.device)
    for position in range(len(norms)):
        inside = (span == position) & (rows[:, 0] != 0)
        norms[position, 0] = square_sum(torch.where(inside, master, 0.0))
        norms[position, 1] = square_sum(torch.where(inside, direction, 0.0))
    return norms


def _tile_sums(values: Tensor) -> Tensor:
    """(ceil(n / 4096),) float64, at least one: sums over tiles of 4096, the last filled with zeros.

    A tile is SUM_ROWS rows of SUM_LANES. Each lane adds its rows from first to last, beginning with
    row 0; then the upper half of the lanes is added to the lower half (lane i + lane i + 16, ...)
    until one is left.
    """
    tile = SUM_LANES * SUM_ROWS
    padding = -len(values) % tile if len(values) else tile
    rows = torch.cat([values, values.new_zeros(padding)]).view(-1, SUM_ROWS, SUM_LANES)
    lanes = rows[:, 0]
    for row in range(1, SUM_ROWS):
        lanes = lanes + rows[:, row]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
