"""Runs the Triton kernels in Triton's interpreter and compares them with the oracle.

    TRITON_INTERPRET=1 python tests/ops/interpreted.py      prints JSON: {case: differences}

A process of its own: Triton reads the variable when it is imported, and transformers imports it.
"""

import json
import random
import sys

import numpy as np
import torch

from hf_speed.ops import reference
from hf_speed.ops.reference import RULES
from hf_speed.ops.spans import Row, span_table
from hf_speed.ops.triton import sums, update
from tests.ops.chunks import (
    GRAD_DTYPES,
    MOMENT_DTYPES,
    OUT_DTYPES,
    differences,
    random_chunk,
    random_row,
    random_stops,
)


def main() -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    # 0 / 0 in lanes that no store takes.
    np.seterr(all="ignore")
    found = {**_every_kind(), **_random_chunks(), **_extremes(), **_sums(), **_norms(), **_empty()}
    json.dump(found, sys.stdout)


def _every_kind() -> dict[str, list[str]]:
    found = {}
    for position, rule in enumerate(RULES):
        for kind in MOMENT_DTYPES:
            case = f"{rule} {str(kind).removeprefix('torch.')}"
            grad_dtype = GRAD_DTYPES[position % 3]
            found[case] = _compare(rule, 700, [300, 310, 600, 700], kind, grad_dtype, seed=position)
    return found


def _random_chunks() -> dict[str, list[str]]:
    """A property: any rule, size, spans and kinds."""
    choose = random.Random(7)
    found = []
    for seed in range(30):
        n = choose.choice([1, 255, 256, 257, 511, 513, choose.randint(1, 1200)])
        stops = random_stops(n, choose.randint(1, 9), torch.Generator().manual_seed(seed))
        rule, kind = choose.choice(list(RULES)), choose.choice(MOMENT_DTYPES)
        wrong = _compare(rule, n, stops, kind, choose.choice(GRAD_DTYPES), seed=seed)
        found += [f"{rule} {kind} n={n} {stops}: {each}" for each in wrong]
    return {"random chunks": found}


def _compare(
    rule: str, n: int, stops: list[int], kind: torch.dtype, grad_dtype: torch.dtype, *, seed: int
) -> list[str]:
    """Two steps, the second from moments that the first wrote."""
    out_dtype = OUT_DTYPES[seed % 3]
    chunk = random_chunk(
        rule, n, stops, moment_dtype=kind, grad_dtype=grad_dtype, out_dtype=out_dtype, seed=seed
    )
    other = chunk.copy()
    for step in range(2):
        where = {"seed": (seed << 40) + step, "offset": 256 * seed + (step << 32)}
        reference.update_(rule, *chunk[:4], out=chunk.out, **where)
        update.update_(rule, *other[:4], out=other.out, **where)
    return differences(chunk, other)


def _extremes() -> dict[str, list[str]]:
    """Subnormal, huge, infinite and missing numbers."""
    found = {}
    for kind in MOMENT_DTYPES:
        chunk = random_chunk("adam", 1024, [1024], moment_dtype=kind, out_dtype=torch.bfloat16)
        special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 1e-20, 1e18, torch.inf, torch.nan])
        chunk.grad[:3] = special[:3]
        chunk.grad[256:259] = special[3:6]
        if kind != torch.uint8:
            chunk.grad[512:514] = special[6:]
        chunk.grad[768:] = 0.0
        chunk.table.rows[0, 0] = 1.0
        other = chunk.copy()
        reference.update_("adam", *chunk[:4], out=chunk.out, seed=3)
        update.update_("adam", *other[:4], out=other.out, seed=3)
        found[f"extremes {str(kind).removeprefix('torch.')}"] = differences(chunk, other)
    return found


def _sums() -> dict[str, list[str]]:
    found = []
    for n in (0, 1, 4095, 4097, 20000):
        for dtype in GRAD_DTYPES:
            values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
            expected, got = reference.square_sum(values), sums.square_sum(values)
            if expected != got or got.dtype != torch.float64:
                found.append(f"{n} {dtype}: {got} is not {expected}")
    return {"square_sum": found}


def _norms() -> dict[str, list[str]]:
    found = []
    for kind in MOMENT_DTYPES[:2]:
        pick = torch.Generator().manual_seed(5)
        rows: list[Row | None] = [random_row("adam", pick) for _ in range(4)]
        rows[2] = None
        table = span_table(list(zip([100, 4000, 5000, 9000], rows, strict=True)))
        chunk = random_chunk("adam", 9000, [9000], moment_dtype=kind, grad_dtype=torch.float16)
        chunk = chunk._replace(table=table)
        reference.update_("adam", *chunk[:4])
        expected, got = reference.span_norms(*chunk[:4]), sums.span_norms(*chunk[:4])
        if not torch.equal(expected, got) or not (got[[0, 1, 3]] > 0).all():
            found.append(f"{kind}: {got} is not {expected}")
    return {"span_norms": found}


def _empty() -> dict[str, list[str]]:
    chunk = random_chunk("adam", 0, [])
    update.update_("adam", *chunk[:4])
    return {"empty chunk": []}


if __name__ == "__main__":
    main()
