"""The Triton kernels, interpreted on the CPU, equal the oracle bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hf_speed.ops.reference import RULES
from hf_speed.ops.spans import SpanTable
from hf_speed.ops.triton import update
from tests.architecture.sources import ROOT
from tests.ops.chunks import random_chunk

CASES = [
    *(f"{rule} {kind}" for rule in RULES for kind in ("float32", "bfloat16", "uint8")),
    *(f"extremes {kind}" for kind in ("float32", "bfloat16", "uint8")),
    "random chunks",
    "square_sum",
    "span_norms",
    "empty chunk",
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """Differences by case, of one process in which Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:hf_speed", "tests/ops/interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_equals_the_reference_bitwise(
    interpreted: dict[str, list[str]], case: str
) -> None:
    assert interpreted[case] == []


def test_every_interpreted_case_is_looked_at(interpreted: dict[str, list[str]]) -> None:
    assert set(interpreted) == set(CASES)


@pytest.mark.parametrize("stops", [[4, 6], [4, 4, 8], [4, 9], []])
def test_spans_that_do_not_cover_the_chunk_are_refused(stops: list[int]) -> None:
    chunk = random_chunk("lion", 8, [8])
    table = SpanTable(torch.tensor(stops, dtype=torch.int64), torch.zeros(len(stops), 12))
    with pytest.raises(ValueError, match="chunk of 8 elements must stop at increasing elements"):
        update.update_("lion", chunk.master, chunk.grad, chunk.moments, table)
