"""The oracle: equal to torch.optim, its 8-bit code sound, its rounding fair, its sums exact."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_speed.ops import reference
from hf_speed.ops.reference import (
    BLOCK,
    RULES,
    Moment,
    decode_blocks,
    encode_blocks,
    random_bits,
    round_stochastic,
    square_sum,
    update_,
)
from hf_speed.ops.spans import SpanTable, span_table
from tests.ops.chunks import (
    GRAD_DTYPES,
    MOMENT_DTYPES,
    OUT_DTYPES,
    Chunk,
    adam_columns,
    differences,
    fresh_moments,
    random_chunk,
    random_stops,
    row,
)
from tests.ops.chunks import settings as group_of

N = 500

# ---------------------------------------------------------------- rules

TORCH: dict[str, tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": ("adam", torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.999)}),
    "adam": ("adam", torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
    "adam, late lerp": ("adam", torch.optim.Adam, {"betas": (0.3, 0.95), "maximize": True}),
    "adam, no momentum": ("adam", torch.optim.AdamW, {"betas": (0.0, 0.9)}),
    "adagrad": ("adagrad", torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.01}),
    "sgd": ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd, nesterov": ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd, plain": ("sgd_plain", torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd, plain with a buffer": ("sgd", torch.optim.SGD, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("case", TORCH)
def test_rule_follows_torch(case: str) -> None:
    """To 1e-6 of each element's size, or of what the steps moved it; torch contracts and we do not.

    A weight that has crossed zero keeps the rounding errors of the size that it had.
    """
    rule, kind, changes = TORCH[case]
    torch.manual_seed(0)
    start = torch.randn(N)
    parameter = nn.Parameter(start.clone())
    optimizer = kind([parameter], **{"lr": 1e-2, **changes})
    ours, moments = start.clone(), fresh_moments(rule, N, torch.float32)
    for step in range(1, 21):
        gradient = torch.randn(N)
        parameter.grad = gradient.clone()
        optimizer.step()
        group = {**optimizer.param_groups[0], "decoupled": kind is torch.optim.AdamW}
        table = span_table([(N, row(rule, group, step=step))])
        update_(rule, ours, gradient, moments, table)
    error = (ours - parameter.detach()).abs()
    assert (error <= 1e-6 * (start.abs() + (parameter.detach() - start).abs())).all()
    assert not torch.allclose(ours, start, rtol=1e-2)


def test_adam_without_momentum_keeps_the_gradient_itself() -> None:
    gradient, moments = torch.randn(N), fresh_moments("adam", N, torch.float32)
    moments[0].values.fill_(1e8)
    table = span_table([(N, row("adam", group_of(betas=(0.0, 0.9)), step=5))])
    update_("adam", torch.randn(N), gradient, moments, table)
    assert torch.equal(moments[0].values, gradient)


def test_lion_moves_each_weight_by_the_learning_rate() -> None:
    master = torch.tensor([1.0, 1.0, 1.0])
    moments = fresh_moments("lion", 3, torch.float32)
    table = span_table([(3, row("lion", group_of(lr=0.5, weight_decay=0.5), step=1))])
    update_("lion", master, torch.tensor([7.0, 0.0, -1e-9]), moments, table)
    assert master.tolist() == [0.25, 0.75, 1.25]
    assert torch.allclose(moments[0].values, torch.tensor([0.07, 0.0, -1e-11]))


def test_gradient_is_scaled_before_anything_else() -> None:
    one, other = (random_chunk("adam", N, [N], seed=4) for _ in range(2))
    halved = span_table([(N, row("adam", group_of(), step=1, grad_scale=0.5))])
    whole = span_table([(N, row("adam", group_of(), step=1))])
    update_("adam", *one._replace(table=halved)[:4])
    update_("adam", *other._replace(table=whole, grad=other.grad * 0.5)[:4])
    assert differences(one, other) == []
    assert adam_columns(halved).scale.tolist() == [0.5]


def test_root_is_rounded_to_nearest() -> None:
    """As numpy's; torch's own on the CPU is one unit off for some numbers."""
    bits = torch.randint(0, 0x7F800000, (100_000,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    assert np.array_equal(reference.root(values).numpy(), np.sqrt(values.numpy()))


# ---------------------------------------------------------------- spans and chunks


@given(data=st.data())
@settings(max_examples=60)
def test_chunks_together_equal_the_whole(data: st.DataObject) -> None:
    """Any rule, size, kinds and spans: cut at a block, two updates are the one, to the bit."""
    rule = data.draw(st.sampled_from(list(RULES)))
    kinds = {
        "moment_dtype": data.draw(st.sampled_from(MOMENT_DTYPES)),
        "grad_dtype": data.draw(st.sampled_from(GRAD_DTYPES)),
        "out_dtype": data.draw(st.sampled_from(OUT_DTYPES)),
    }
    n = data.draw(st.integers(1, 1500))
    seed = data.draw(st.integers(0, 2**64 - 1))
    stops = random_stops(n, data.draw(st.integers(1, 8)), torch.Generator().manual_seed(n))
    whole = random_chunk(rule, n, stops, **kinds, seed=seed % 1000)
    pieces = whole.copy()
    cut = BLOCK * data.draw(st.integers(0, n // BLOCK))
    offset = BLOCK * data.draw(st.integers(0, 2**30))
    for step in range(2):
        seed = (seed + step) % 2**64
        update_(rule, *whole[:4], out=whole.out, seed=seed, offset=offset)
        for start, stop in ((0, cut), (cut, n)):
            if start < stop:
                piece = _piece(pieces, start, stop)
                update_(rule, *piece[:4], out=piece.out, seed=seed, offset=offset + start)
    assert differences(whole, pieces) == []


def _piece(chunk: Chunk, start: int, stop: int) -> Chunk:
    """The elements [start, stop) of a chunk, in the same memory."""
    stops, rows = chunk.table
    kept = (stops > start) & (torch.cat([stops.new_zeros(1), stops[:-1]]) < stop)
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    return Chunk(
        chunk.master[start:stop],
        chunk.grad[start:stop],
        [
            Moment(values[start:stop], None if scales is None else scales[blocks])
            for values, scales in chunk.moments
        ],
        SpanTable(stops[kept].clamp(max=stop) - start, rows[kept]),
        None if chunk.out is None else chunk.out[start:stop],
    )


@pytest.mark.parametrize("kind", MOMENT_DTYPES)
def test_untouched_spans_keep_their_numbers(kind: torch.dtype) -> None:
    """In an 8-bit block that others touch, to the block's precision; `out` is written for all."""
    chunk = random_chunk("adam", 1024, [1024], moment_dtype=kind, out_dtype=torch.bfloat16)
    first = span_table([(1024, row("adam", group_of(), step=1))])
    update_("adam", *chunk._replace(table=first)[:4], seed=1)
    before = chunk.copy()
    table = span_table([(300, row("adam", group_of(), step=2)), (1024, None)])
    update_("adam", *chunk._replace(table=table)[:4], out=chunk.out, seed=2)
    assert torch.equal(chunk.master[300:], before.master[300:])
    assert not torch.equal(chunk.master[:300], before.master[:300])
    assert torch.equal(chunk.out, chunk.master.bfloat16())
    kept = 512 if kind == torch.uint8 else 300
    for moment, old in zip(chunk.moments, before.moments, strict=True):
        assert not torch.equal(moment.values[:kept], old.values[:kept])
        assert torch.equal(moment.values[kept:], old.values[kept:])
        if moment.scales is not None:
            assert torch.equal(moment.scales[2:], old.scales[2:])
    for position, is_signed in enumerate(RULES["adam"].signed):
        was, now = (
            reference.load_moment(which.moments[position], signed=is_signed)[300:512]
            for which in (before, chunk)
        )
        assert torch.allclose(was, now, rtol=0.1, atol=float(was.abs().max()) * 0.01)


# ---------------------------------------------------------------- 8 bits


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3.3e7, 3.4e38])
@pytest.mark.parametrize("signed", [True, False])
def test_encoding_what_was_decoded_gives_the_same_bytes(scale: float, *, signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    if signed:
        codes[128] = 129  # -128 is no code.
    values = decode_blocks(codes, torch.tensor([scale]), signed=signed)
    again, scales = encode_blocks(values, signed=signed)
    assert torch.equal(again, codes)
    assert torch.equal(scales, torch.tensor([scale]))


def test_zeroed_memory_decodes_to_zeros() -> None:
    for signed in (True, False):
        values = decode_blocks(torch.zeros(N, dtype=torch.uint8), torch.zeros(2), signed=signed)
        assert torch.equal(values, torch.zeros(N))
        codes, scales = encode_blocks(values, signed=signed)
        assert not codes.any()
        assert not scales.any()


@pytest.mark.parametrize("signed", [True, False])
def test_quantisation_error_is_bounded(signed: bool) -> None:  # noqa: FBT001  A parameter.
    """Half a step of the root, seen through the power; the largest of each block is exact."""
    values = torch.randn(N, generator=torch.Generator().manual_seed(0)).double() ** 5
    values = (values if signed else values.abs()).float()
    codes, scales = encode_blocks(values, signed=signed)
    decoded = decode_blocks(codes, scales, signed=signed)
    x = (values.abs() / scales.repeat_interleave(BLOCK)[:N]).double()
    power, top = (2, 127) if signed else (4, 255)
    root = x ** (1 / power)
    low = (root - 0.50001 / top).clamp(min=0) ** power
    high = (root + 0.50001 / top).clamp(min=1.00001 / top if not signed else 0) ** power
    decoded_x = (decoded.abs() / scales.repeat_interleave(BLOCK)[:N]).double()
    assert ((decoded_x >= low * (1 - 1e-6)) & (decoded_x <= high * (1 + 1e-6))).all()
    assert torch.equal(decoded.sign()[decoded != 0], values.sign()[decoded != 0])
    for block, found in zip(values.split(BLOCK), decoded.split(BLOCK), strict=True):
        largest = int(block.abs().argmax())
        assert found[largest] == block[largest]


def test_positive_second_moments_never_become_zero() -> None:
    values = torch.tensor([1.0, 1e-20, 1e-44, 0.0])
    codes, scales = encode_blocks(values, signed=False)
    assert codes.tolist() == [255, 1, 1, 0]
    assert decode_blocks(codes, scales, signed=False)[3] == 0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_moments_stay_visible(bad: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[7] = bad
    codes, scales = encode_blocks(values, signed=True)
    decoded = decode_blocks(codes, scales, signed=True)
    assert not decoded[:BLOCK].isfinite().any()
    assert torch.equal(decoded[BLOCK:], torch.ones(BLOCK))


def test_a_common_decay_does_not_stall_in_the_code() -> None:
    """Second moments that only decay must shrink though 0.1% is less than half a step."""
    moments = fresh_moments("adam", BLOCK, torch.uint8)
    master, gradient = torch.zeros(BLOCK), torch.randn(BLOCK)
    for step in range(1, 1001):
        table = span_table([(BLOCK, row("adam", group_of(betas=(0.9, 0.999)), step=step))])
        update_("adam", master, gradient if step == 1 else torch.zeros(BLOCK), moments, table)
    second = reference.load_moment(moments[1], signed=False)
    # The code's error on either side; the decay itself is exact, 0.999**999 = 0.368.
    assert torch.allclose(second, 1e-3 * 0.999**999 * gradient**2, rtol=0.3, atol=1e-9)


# ---------------------------------------------------------------- stochastic rounding


def test_stochastic_rounding_is_fair() -> None:
    """The mean over many elements is the value; each result is one of its two neighbours."""
    draws = 1 << 18
    bits = random_bits(12345, 1 << 40, draws)
    for value in (0.1531, -0.4112, 3.1e-39, 1.0039):
        for half in (bits & 0xFFFF, bits >> 16):
            rounded = round_stochastic(torch.full((draws,), value), half).double()
            neighbours = rounded.unique()
            assert len(neighbours) == 2
            step = float(neighbours[1] - neighbours[0])
            assert abs(float(rounded.mean()) - value) < 4 * step / draws**0.5


def test_bf16_numbers_and_non_finite_ones_are_kept() -> None:
    kept = torch.tensor([0.0, -0.0, 1.5, -(2.0**127), torch.inf, -torch.inf])
    for bits in (0, 1, 0xFFFF):
        rounded = round_stochastic(kept, torch.full((6,), bits))
        assert torch.equal(rounded.view(torch.int16), kept.bfloat16().view(torch.int16))
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastic(payload, torch.full((3,), 0xFFFF)).isnan().all()


def test_random_bits_belong_to_the_element() -> None:
    whole = random_bits(7, (1 << 32) - 300, 1000)
    assert torch.equal(whole[512:700], random_bits(7, (1 << 32) + 212, 188))


def test_random_bits_follow_the_written_recipe() -> None:
    """In Python's integers, from the docstring."""
    seed, index = 0xDEADBEEF12345678, (5 << 32) + 77
    key1, key2 = reference.random_keys(seed)
    low, high, mask = index & 0xFFFFFFFF, index >> 32, 0xFFFFFFFF
    x = low ^ key1 ^ (high * 0x85EBCA6B & mask)
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = (x + key2 + high * 0x9E3779B9) & mask
    x = x * 0x846CA68B & mask
    assert random_bits(seed, index, 1).tolist() == [x ^ (x >> 16)]


@pytest.mark.parametrize(
    "other",
    [
        lambda n: random_bits(2, 0, n),
        lambda n: random_bits(1 + (1 << 32), 0, n),
        lambda n: random_bits(1, 1, n),
        lambda n: random_bits(1, 1 << 32, n),
        lambda n: random_bits(1, 0, n) >> 16,
    ],
    ids=["next seed", "seed's upper word", "next element", "index's upper word", "other half"],
)
def test_random_bits_are_uniform_and_unrelated(other: Callable[[int], Tensor]) -> None:
    n = 1 << 16
    one, two = (bits.double() % 65536 / 65536 for bits in (random_bits(1, 0, n), other(n)))
    counts = torch.histc(two.float(), 64, 0, 1)
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert chi_square < 130  # 63 degrees of freedom: one in a million beyond.
    correlation = float(((one - 0.5) * (two - 0.5)).mean() * 12)
    assert abs(correlation) < 5 / n**0.5


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("n", [0, 1, 4096, 5000, 20_000])
def test_square_sum_is_exact_to_fp64_rounding(n: int, dtype: torch.dtype) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    total = square_sum(values)
    assert total.dtype == torch.float64
    assert total.shape == ()
    exact = float(sum(float(value) ** 2 for value in values))
    assert float(total) == pytest.approx(exact, rel=1e-13)


def test_square_sum_adds_rows_then_halves_of_lanes() -> None:
    """Squares that fp64 cannot add in another order with the same result."""
    values = torch.zeros(4096)
    # Lane 0: 1, then 2**-54 twice, each too small to change 1. Lane 16: the same 2**-54.
    values[0], values[32], values[64], values[16] = 1.0, 2.0**-27, 2.0**-27, 2.0**-27
    assert float(square_sum(values)) == 1.0
    # Both small ones in lane 16 first make 2**-53 and tie; a third decides.
    values[32] = values[64] = 0.0
    values[48] = values[80] = values[112] = 2.0**-27
    assert float(square_sum(values)) == 1.0 + 2.0**-52


@pytest.mark.parametrize("kind", MOMENT_DTYPES[:2])
def test_span_norms_measure_the_master_and_the_step(kind: torch.dtype) -> None:
    chunk = random_chunk("adam", N, [N], moment_dtype=kind, seed=2)
    group = group_of(decoupled=True, weight_decay=0.0, lr=1.0)
    table = span_table(
        [(100, row("adam", group, step=1)), (300, None), (N, row("adam", group, step=1))]
    )
    chunk = chunk._replace(table=table)
    norms, before = reference.span_norms(*chunk[:4]), chunk.copy()
    update_("adam", *chunk[:4])
    for span, (start, stop) in enumerate([(0, 100), (100, 300), (300, N)]):
        moved = (chunk.master - before.master)[start:stop].double().square().sum()
        assert float(norms[span, 1]) == pytest.approx(float(moved), rel=1e-5)
        held = before.master[start:stop].double().square().sum() * (span != 1)
        assert float(norms[span, 0]) == pytest.approx(float(held), rel=1e-12)
