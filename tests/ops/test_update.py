"""The native update kernels equal the oracle bit for bit, whatever runs them and however."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_speed.ops import reference, update_cpu
from hf_speed.ops.reference import RULES, Moment
from hf_speed.ops.spans import SpanTable, adam_row, span_table
from hf_speed.ops.update import span_norms, square_sum, update_
from tests.ops.chunks import (
    GRAD_DTYPES,
    MOMENT_DTYPES,
    OUT_DTYPES,
    Chunk,
    differences,
    random_chunk,
    random_stops,
    row,
    settings,
)

ISAS = ["scalar", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if update_cpu.ISAS[request.param] > update_cpu.ISAS[update_cpu.best_isa()]:
        pytest.skip(f"needs a CPU with {request.param}")
    return request.param


def _native(rule: str, chunk: Chunk, *, isa: str = "best", threads: int = 2, **where: Any) -> None:
    made = update_cpu.request(rule, *chunk[:4], out=chunk.out, **where)
    update_cpu.run(made, num_threads=threads, isa=isa)


def _reference(rule: str, chunk: Chunk, **where: Any) -> None:
    reference.update_(rule, *chunk[:4], out=chunk.out, **where)


def _chunks(rule: str, moment: torch.dtype) -> Iterator[Chunk]:
    """Sizes with and without whole vectors, blocks, tiles; every gradient and parameter dtype."""
    pick = torch.Generator().manual_seed(0)
    sizes = (1, 31, 255, 256, 4096, 5003, 70_001, 131_072, 140_000)
    kinds = itertools.cycle(itertools.product(GRAD_DTYPES, OUT_DTYPES))
    for seed, n in enumerate(sizes):
        grad, out = next(kinds)
        stops = random_stops(n, 1 + 3 * seed, pick)
        yield random_chunk(
            rule, n, stops, moment_dtype=moment, grad_dtype=grad, out_dtype=out, seed=seed
        )


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_native_equals_reference_bitwise(rule: str, moment: torch.dtype, isa: str) -> None:
    for position, ours in enumerate(_chunks(rule, moment)):
        theirs = ours.copy()
        for step in range(3):
            where = {"seed": (step << 62) + position, "offset": 4096 * position}
            _native(rule, ours, isa=isa, threads=1 + position % 2, **where)
            _reference(rule, theirs, **where)
        assert differences(ours, theirs) == [], len(ours.master)


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
def test_an_index_may_pass_2_to_the_32_within_a_chunk(moment: torch.dtype, isa: str) -> None:
    ours = random_chunk("adam", 9000, [9000], moment_dtype=moment)
    theirs = ours.copy()
    offset = (7 << 32) - 4096 - 256
    _native("adam", ours, isa=isa, seed=1, offset=offset)
    _reference("adam", theirs, seed=1, offset=offset)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("moment", MOMENT_DTYPES[:2], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_subnormals_infinities_and_nans_travel(rule: str, moment: torch.dtype, isa: str) -> None:
    n = 20_000
    bits = torch.randint(-(2**31), 2**31, (2, n), generator=torch.Generator().manual_seed(1))
    wild = bits.to(torch.int32).view(torch.float32)
    ours = random_chunk(rule, n, [n], moment_dtype=moment, out_dtype=torch.bfloat16)
    table = span_table([(n, row(rule, settings(), step=1))])
    ours = ours._replace(master=wild[0].clone(), grad=wild[1].clone(), table=table)
    theirs = ours.copy()
    for step in range(2):
        _native(rule, ours, isa=isa, seed=step)
        _reference(rule, theirs, seed=step)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_written_as_torch_does(
    dtype: torch.dtype, isa: str
) -> None:
    """SGD without decay and lr = 1 from 0: the master is minus the gradient, `out` its rounding."""
    integers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    every, following = integers.view(dtype), (integers + 1).view(dtype)
    middle = ((every.double() + following.double()) / 2).float()
    above = torch.nextafter(middle, torch.tensor(float("inf")))
    below = torch.nextafter(middle, torch.tensor(float("-inf")))
    table = span_table([(1 << 16, row("sgd_plain", settings(lr=1.0, weight_decay=0.0), step=1))])
    for grad in (every, middle, above, below):
        chunk = Chunk(torch.zeros(1 << 16), grad, [], table, torch.empty_like(every))
        _native("sgd_plain", chunk, isa=isa)
        expected = chunk.copy()
        expected.master.copy_(0.0 - grad.float())
        assert expected.out is not None
        expected.out.copy_(expected.master)
        assert differences(chunk, expected) == []


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
@pytest.mark.parametrize("skip", [1, 3, 8])
def test_memory_that_is_not_aligned_gives_the_same(
    skip: int, moment: torch.dtype, isa: str
) -> None:
    n = 4099
    ours = random_chunk("adam", n, [77, n], moment_dtype=moment, out_dtype=torch.bfloat16)
    theirs = ours.copy()

    def moved(values: Tensor) -> Tensor:
        return torch.empty(len(values) + skip, dtype=values.dtype)[skip:].copy_(values)

    assert ours.out is not None
    moments = [each._replace(values=moved(each.values)) for each in ours.moments]
    ours = Chunk(moved(ours.master), moved(ours.grad), moments, ours.table, moved(ours.out))
    _native("adam", ours, isa=isa)
    _reference("adam", theirs)
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
def test_a_chunk_may_be_cut_anywhere_that_is_a_multiple_of_4096(
    moment: torch.dtype, isa: str
) -> None:
    n, cut = 20_000, 8192
    table = span_table([(n, row("adam", settings(), step=2))])
    whole = random_chunk("adam", n, [n], moment_dtype=moment, out_dtype=torch.float16)
    whole = whole._replace(table=table)
    expected = whole.copy()
    _native("adam", expected, isa=isa, seed=5, offset=4096)
    for start, stop in ((0, cut), (cut, n)):
        _native("adam", _part(whole, start, stop), isa=isa, seed=5, offset=4096 + start)
    assert differences(whole, expected) == []


def _part(chunk: Chunk, start: int, stop: int) -> Chunk:
    blocks = slice(start // 256, -(-stop // 256))
    moments = [
        Moment(values[start:stop], None if scales is None else scales[blocks])
        for values, scales in chunk.moments
    ]
    table = chunk.table._replace(stops=torch.tensor([stop - start]))
    out = None if chunk.out is None else chunk.out[start:stop]
    return Chunk(chunk.master[start:stop], chunk.grad[start:stop], moments, table, out)


def test_a_large_parameter_is_written_past_the_caches(isa: str) -> None:
    """From 2**20 elements on, where the parameter starts a cache line."""
    n = (1 << 20) + 77
    raw = torch.empty(n + 64, dtype=torch.bfloat16)
    skip = (-raw.data_ptr() % 64) // 2
    chunk = random_chunk("sgd_plain", n, [n], out_dtype=torch.bfloat16)
    table = span_table([(n, row("sgd_plain", settings(), step=1))])
    chunk = chunk._replace(table=table, out=raw[skip : skip + n])
    _native("sgd_plain", chunk, isa=isa)
    assert chunk.out is not None
    assert torch.equal(chunk.out, chunk.master.bfloat16())


# ---------------------------------------------------------------- untouched spans


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
def test_an_untouched_span_keeps_its_bytes_but_its_parameter_is_written(
    moment: torch.dtype, isa: str
) -> None:
    """Spans that start and end within a block, a vector, and at blocks."""
    n = 3000
    touched = row("adam", settings(), step=1)
    table = span_table([(256, touched), (1024, None), (1031, touched), (2000, None), (n, touched)])
    chunk = random_chunk("adam", n, [n], moment_dtype=moment, out_dtype=torch.bfloat16)
    chunk = chunk._replace(table=table)
    before = chunk.copy()
    _native("adam", chunk, isa=isa)
    for kept in (slice(256, 1024), slice(1031, 2000)):
        assert torch.equal(chunk.master[kept], before.master[kept])
    assert chunk.out is not None
    assert torch.equal(chunk.out, chunk.master.bfloat16())
    # Whole blocks of 256 without a touched element: 1 ... 3 and 5, 6.
    for ours, theirs in zip(chunk.moments, before.moments, strict=True):
        for kept in (slice(256, 1024), slice(1280, 1792)):
            assert torch.equal(ours.values[kept], theirs.values[kept])


# ---------------------------------------------------------------- threads and surroundings


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    chunk = random_chunk("adam", 400_000, [400_000], moment_dtype=torch.bfloat16)
    alone = chunk.copy()
    _native("adam", alone, threads=1)
    for threads in (2, 3, 16):
        many = chunk.copy()
        _native("adam", many, threads=threads)
        assert differences(many, alone) == []


def test_several_python_threads_update_at_once() -> None:
    chunks = [random_chunk("lion", 300_000, [300_000], seed=seed) for seed in range(4)]
    expected = [chunk.copy() for chunk in chunks]
    threads = [
        threading.Thread(target=lambda chunk=chunk: [_native("lion", chunk) for _ in range(5)])
        for chunk in chunks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for chunk, theirs in zip(chunks, expected, strict=True):
        for _ in range(5):
            _native("lion", theirs, threads=1)
        assert differences(chunk, theirs) == []


@contextmanager
def _flushed() -> Iterator[bool]:
    """Subnormals become zeros in this thread, where the machine can do that."""
    yield torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


def test_the_callers_floating_point_mode_does_not_matter(isa: str) -> None:
    n = 1000
    table = span_table([(n, row("sgd_plain", settings(lr=1.0, weight_decay=0.0), step=1))])
    grad = torch.full((n,), 1e-41)
    chunk = Chunk(torch.zeros(n), grad, [], table, None)
    with _flushed() as is_flushed:
        _native("sgd_plain", chunk, isa=isa)
        kept = chunk.master.view(torch.int32).clone()
        # The mode of the caller is as it was.
        assert not is_flushed or float(grad[0] * 1.0) == 0.0
    assert torch.equal(kept.view(torch.float32), -grad)


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_square_sum_equals_the_reference_bitwise(dtype: torch.dtype, isa: str) -> None:
    for n in (0, 1, 31, 4095, 4096, 4097, 300_001):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        for threads in (1, 2):
            total = update_cpu.square_sum(values, num_threads=threads, isa=isa)
            assert total == reference.square_sum(values), n


def test_square_sum_of_more_tiles_than_a_tile_holds() -> None:
    """Small whole numbers, whose sums are exact in any order."""
    times = 4096 * 256 + 313
    values = torch.arange(16, dtype=torch.bfloat16).repeat(times)
    assert square_sum(values) == times * sum(k * k for k in range(16))


@pytest.mark.parametrize("moment", MOMENT_DTYPES[:2], ids=str)
def test_span_norms_equal_the_reference_bitwise(moment: torch.dtype, isa: str) -> None:
    pick = torch.Generator().manual_seed(3)
    for n in (1, 100, 4096, 50_001):
        chunk = random_chunk("adam", n, random_stops(n, 5, pick), moment_dtype=moment, seed=n)
        _native("adam", chunk, seed=1)
        before = chunk.copy()
        made = update_cpu.request("adam", *chunk[:4])
        norms = update_cpu.span_norms(made, num_threads=2, isa=isa)
        assert torch.equal(norms, reference.span_norms(*chunk[:4]))
        assert differences(chunk, before) == []


def test_lamb_is_span_norms_and_then_adamw_with_a_rate_per_span() -> None:
    """Against LAMB as its paper writes it, two parameters, five steps."""
    stops, lr, decay, betas, eps = [300, 1000], 0.01, 0.1, (0.9, 0.99), 1e-6
    group = settings(lr=lr, weight_decay=decay, betas=betas, eps=eps)
    chunk = random_chunk("adam", 1000, stops)
    weights = [part.double() for part in chunk.master.tensor_split([300])]
    averages = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step in range(1, 6):
        chunk.grad.copy_(torch.randn(1000, generator=torch.Generator().manual_seed(step)))
        gradients = chunk.grad.double().tensor_split([300])
        for weight, gradient, (m, v) in zip(weights, gradients, averages, strict=True):
            m.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
            v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            unbiased = (v / (1 - betas[1] ** step)).sqrt() + eps
            direction = m / (1 - betas[0] ** step) / unbiased + decay * weight
            weight.sub_(lr * weight.norm() / direction.norm() * direction)

        probe = adam_row({**group, "lr": 1.0}, step=step, grad_scale=1.0, decoupled=False)
        table = span_table([(stop, probe) for stop in stops])
        squares = span_norms(*chunk[:3], table)
        rates = lr * (squares[:, 0] / squares[:, 1]).sqrt()
        rows = [
            adam_row({**group, "lr": rate}, step=step, grad_scale=1.0, decoupled=True)
            for rate in rates.tolist()
        ]
        update_("adam", *chunk[:3], span_table(list(zip(stops, rows, strict=True))))
    assert torch.allclose(chunk.master.double(), torch.cat(weights), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- the library's operators


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["adam", "lion", "sgd_plain"])
def test_the_operator_update_is_sound(rule: str, moment: torch.dtype) -> None:
    master, grad, moments, table, out = random_chunk(
        rule, 512, [100, 512], moment_dtype=moment, out_dtype=torch.bfloat16
    )
    values = [each.values for each in moments]
    scales = [each.scales for each in moments if each.scales is not None]
    arguments = (rule, master, grad, values, scales, out, table.stops, table.rows, -1, 256)
    torch.library.opcheck(torch.ops.hf_speed.update_.default, arguments)


def test_the_operator_square_sum_is_sound() -> None:
    torch.library.opcheck(torch.ops.hf_speed.square_sum.default, (torch.randn(100),))


def test_a_seed_uses_all_of_its_64_bits() -> None:
    chunk = random_chunk("adam", 4096, [4096], moment_dtype=torch.bfloat16)
    chunk = chunk._replace(table=span_table([(4096, row("adam", settings(), step=1))]))
    theirs = chunk.copy()
    update_("adam", *chunk[:4], seed=(1 << 64) - 1)
    _reference("adam", theirs, seed=(1 << 64) - 1)
    assert differences(chunk, theirs) == []


# ---------------------------------------------------------------- what does not fit


def _adam_chunk(**changes: Any) -> dict[str, Any]:
    chunk = random_chunk("adam", 512, [512], out_dtype=torch.bfloat16)
    return {"rule": "adam", **chunk._asdict(), "offset": 0, **changes}


def _moments(dtype: torch.dtype, other: torch.dtype) -> list[Moment]:
    scales = {torch.uint8: torch.zeros(2)}
    return [Moment(torch.zeros(512, dtype=kind), scales.get(kind)) for kind in (dtype, other)]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"rule": "adamax"}, "rule 'adamax' is not one of adam, lion, adagrad, sgd, sgd_plain"),
    "master": (
        {"master": torch.zeros(512, dtype=torch.float64)},
        r"master must be contiguous \(512,\) float32, .* it is contiguous \(512,\) torch.float64",
    ),
    "shape": (
        {"grad": torch.zeros(511)},
        r"grad must be contiguous \(512,\) float32 or bfloat16 or float16, .* \(511,\)",
    ),
    "strides": ({"grad": torch.zeros(1024)[::2]}, r"grad must be contiguous .* it is strided"),
    "count": (
        {"moments": _moments(torch.float32, torch.float32)[:1]},
        "rule 'adam' has 2 moments, but 1 were given",
    ),
    "moment": (
        {"moments": _moments(torch.float16, torch.float16)},
        "a moment must be contiguous .* float32 or bfloat16 or uint8",
    ),
    "no scales": (
        {"moments": [Moment(torch.zeros(512, dtype=torch.uint8))] * 2},
        "a moment has scales if, and only if, it is uint8",
    ),
    "short scales": (
        {"moments": [Moment(torch.zeros(512, dtype=torch.uint8), torch.zeros(1))] * 2},
        r"a moment's scales must be contiguous \(2,\) float32",
    ),
    "mixed": (
        {"moments": _moments(torch.float32, torch.bfloat16)},
        "the moments of a chunk must share one dtype",
    ),
    "out": ({"out": torch.zeros(512)}, "out must be contiguous .* bfloat16 or float16"),
    "device": (
        {"grad": torch.zeros(512, device="meta")},
        "the tensors of a chunk must all lie on cpu, as master does",
    ),
    "offset": ({"offset": 100}, "offset=100 is not a multiple of 256, from 0"),
    "short spans": (
        {"table": SpanTable(torch.tensor([511]), torch.zeros(1, 12))},
        "update_ was given spans that do not cover the chunk in order; nothing was written",
    ),
    "spans in disorder": (
        {"table": SpanTable(torch.tensor([400, 400, 512]), torch.zeros(3, 12))},
        "update_ was given spans that do not cover the chunk in order; nothing was written",
    ),
    "span rows": (
        {"table": SpanTable(torch.tensor([512]), torch.zeros(2, 12))},
        r"spans must be contiguous \(num_spans,\) int64 stops and \(num_spans, 12\) float32 rows",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_chunk_that_does_not_fit_together_is_refused(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    fields = _adam_chunk(**changes)
    before = fields["master"].clone()
    rule = fields.pop("rule")
    with pytest.raises(ValueError, match=message):
        update_(rule, **fields)
    assert torch.equal(fields["master"], before)


def test_an_instruction_set_that_the_machine_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(update_cpu.ISAS, "avx1024", 9)
    with pytest.raises(ValueError, match="an instruction set that this machine does not have"):
        _native("lion", random_chunk("lion", 8, [8]), isa="avx1024")


def test_span_norms_refuse_8_bit_moments() -> None:
    chunk = random_chunk("adam", 8, [8], moment_dtype=torch.uint8)
    with pytest.raises(ValueError, match="span_norms reads float32 or bfloat16 moments, not 8-bit"):
        span_norms(*chunk[:4])


def test_square_sum_refuses_what_is_not_flat() -> None:
    with pytest.raises(ValueError, match=r"takes a flat float tensor; this is .* \(2, 2\)"):
        square_sum(torch.zeros(2, 2))
