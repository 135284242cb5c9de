"""On a GPU: the compiled Triton kernels equal the native CPU kernels bit for bit."""

from typing import Any

import pytest
import torch

from hf_speed.ops.reference import RULES
from hf_speed.ops.spans import span_table
from hf_speed.ops.update import span_norms, square_sum, update_
from tests.ops.chunks import (
    GRAD_DTYPES,
    MOMENT_DTYPES,
    OUT_DTYPES,
    Chunk,
    differences,
    fresh_moments,
    random_chunk,
    random_row,
    random_stops,
    row,
    settings,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def _step(rule: str, chunk: Chunk, **where: Any) -> None:
    update_(rule, *chunk[:4], out=chunk.out, **where)


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_cpu_bitwise(rule: str, moment: torch.dtype) -> None:
    """Sizes with and without a whole vector, every gradient and parameter dtype, three steps."""
    pick = torch.Generator().manual_seed(0)
    for seed, n in enumerate((1, 255, 256, 4096, 5003, 100_000, 1_000_003)):
        cpu = random_chunk(
            rule,
            n,
            random_stops(n, 7, pick),
            moment_dtype=moment,
            grad_dtype=GRAD_DTYPES[seed % 3],
            out_dtype=OUT_DTYPES[seed // 2 % 3],
            seed=seed,
        )
        cuda = cpu.copy(DEVICE)
        for step in range(3):
            where = {"seed": (step << 33) + seed, "offset": 4096 * seed}
            _step(rule, cpu, **where)
            _step(rule, cuda, **where)
        assert differences(cpu, cuda) == [], n


@pytest.mark.parametrize("moment", MOMENT_DTYPES, ids=str)
def test_a_split_between_cpu_and_gpu_is_exact(moment: torch.dtype) -> None:
    """A group of which the CPU updates the first part and the GPU the rest, against the GPU."""
    n, cut = 50_000, 4096 * 5
    table = span_table([(n, row("adam", settings(), step=3))])
    whole = random_chunk("adam", n, [n], moment_dtype=moment, out_dtype=torch.bfloat16)
    whole = whole._replace(table=table).copy(DEVICE)
    parts = [_part(whole, 0, cut).copy("cpu"), _part(whole, cut, n).copy(DEVICE)]
    _step("adam", whole, seed=9, offset=8192)
    for part, offset in zip(parts, (8192, 8192 + cut), strict=True):
        _step("adam", part, seed=9, offset=offset)
    assert differences(parts[0], _part(whole, 0, cut)) == []
    assert differences(parts[1], _part(whole, cut, n)) == []


def _part(chunk: Chunk, start: int, stop: int) -> Chunk:
    blocks = slice(start // 256, -(-stop // 256))
    return Chunk(
        chunk.master[start:stop],
        chunk.grad[start:stop],
        [
            moment._replace(
                values=moment.values[start:stop],
                scales=None if moment.scales is None else moment.scales[blocks],
            )
            for moment in chunk.moments
        ],
        chunk.table._replace(stops=torch.tensor([stop - start])),
        None if chunk.out is None else chunk.out[start:stop],
    )


def test_a_tensor_that_is_not_aligned_gives_the_same() -> None:
    """A view that begins at an odd element is compiled without vectors."""
    n = 4099
    table = span_table([(n, row("adam", settings(), step=1))])
    cpu = random_chunk("adam", n, [n], out_dtype=torch.bfloat16)._replace(table=table)
    cuda = Chunk(
        torch.empty(n + 1, device=DEVICE)[1:].copy_(cpu.master),
        torch.empty(n + 3, device=DEVICE)[3:].copy_(cpu.grad),
        cpu.copy(DEVICE).moments,
        table,
        torch.empty(n + 1, device=DEVICE, dtype=torch.bfloat16)[1:],
    )
    _step("adam", cpu)
    _step("adam", cuda)
    assert differences(cpu, cuda) == []


def test_extreme_numbers_equal_bitwise() -> None:
    """Subnormals are kept, infinities and NaNs travel."""
    n = 65_536
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(1))
    for moment in MOMENT_DTYPES[:2]:
        table = span_table([(n, row("adam", settings(), step=1))])
        cpu = random_chunk("adam", n, [n], moment_dtype=moment, out_dtype=torch.bfloat16)
        cpu = cpu._replace(grad=bits.to(torch.int32).view(torch.float32), table=table)
        cuda = cpu.copy(DEVICE)
        for step in range(2):
            _step("adam", cpu, seed=step)
            _step("adam", cuda, seed=step)
        assert differences(cpu, cuda) == []


def test_elements_beyond_2_to_the_32_have_their_own_bits() -> None:
    """The element's index reaches the rounding in 64 bits."""
    table = span_table([(4096, row("adam", settings(), step=1))])
    chunk = random_chunk("adam", 4096, [4096], moment_dtype=torch.bfloat16)._replace(table=table)
    near, far = chunk.copy(DEVICE), chunk.copy(DEVICE)
    _step("adam", chunk, seed=1, offset=(1 << 32) - 2048)
    _step("adam", near, seed=1, offset=0)
    _step("adam", far, seed=1, offset=(1 << 32) - 2048)
    assert differences(chunk, far) == []
    assert differences(near, far) != []


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_square_sum_equals_the_cpu_bitwise(dtype: torch.dtype) -> None:
    for n in (0, 1, 4095, 4097, 1_000_003, 20_000_000):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        total = square_sum(values.to(DEVICE))
        assert total.is_cuda
        assert total.cpu() == square_sum(values), n


@pytest.mark.parametrize("moment", MOMENT_DTYPES[:2], ids=str)
def test_span_norms_equal_the_cpu_bitwise(moment: torch.dtype) -> None:
    pick, n = torch.Generator().manual_seed(2), 300_000
    rows = [random_row("adam", pick) for _ in range(3)]
    table = span_table([(100, rows[0]), (150_001, rows[1]), (200_000, None), (n, rows[2])])
    cpu = random_chunk("adam", n, [n], moment_dtype=moment)._replace(table=table)
    _step("adam", cpu, seed=1)
    cuda = cpu.copy(DEVICE)
    expected = span_norms(*cpu[:4])
    assert torch.equal(span_norms(*cuda[:4]).cpu(), expected)
    assert (expected[[0, 1, 3]] > 0).all()


def test_an_update_follows_its_stream() -> None:
    """Work queued on the current stream before and after; nothing waits for the device."""
    n = 1 << 22
    table = span_table([(n, row("sgd_plain", settings(lr=1.0, weight_decay=0.0), step=1))])
    table = table._replace(stops=table.stops.to(DEVICE), rows=table.rows.to(DEVICE))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        master, grad = torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
        for _ in range(10):
            grad.add_(1.0)
            update_("sgd_plain", master, grad, fresh_moments("sgd_plain", n, torch.float32), table)
    stream.synchronize()
    assert (master == -55.0).all()
