"""Every Triton kernel compiles ahead of time for sm_90, without a GPU, into exact arithmetic."""

import re
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_speed.ops.reference import RULES
from hf_speed.ops.spans import ROW
from hf_speed.ops.triton import sums, update

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"float32": "*fp32", "bfloat16": "*i16", "float16": "*fp16", "uint8": "*u8"}
UPDATE = {
    "master_ptr": "*fp32", "grad_ptr": "*i16", "out_ptr": "*i16", "stops_ptr": "*i64",
    "rows_ptr": "*fp32", "n": "i64", "num_spans": "i32", "offset": "i64", "key1": "i32",
    "key2": "i32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew, and leave nothing in the home directory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """Compile with 16-byte aligned tensors and sizes, as whole chunks are; return the PTX.

    A parameter in neither mapping is None.
    """
    names = kernel.arg_names
    assert set(types) | set(constants) <= set(names)
    fixed = {name: constants.get(name) for name in names if name not in types}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*") or name == "n"
        },
    )
    compiled = triton.compile(source, target=HOPPER, options=update.OPTIONS)
    assert len(compiled.asm["cubin"]) > 0
    return compiled.asm["ptx"]


def _compile_update(rule: str, moment: str, grad: str = "bfloat16", out: str = "bfloat16") -> str:
    types = {**UPDATE, "grad_ptr": POINTERS[grad], "out_ptr": POINTERS[out]}
    for name, _ in zip(("first", "second"), RULES[rule].signed, strict=False):
        types[f"{name}_ptr"] = POINTERS[moment]
        if moment == "uint8":
            types[f"{name}_scales"] = "*fp32"
    signed = RULES[rule].signed[:1] == (True,)
    constants = {
        "RULE": rule, "FIRST_SIGNED": signed, "ROW": ROW, "BLOCKS": update.TILE_BLOCKS
    }  # fmt: skip
    return _compile(update.update_kernel, types, constants)


def _require_exact(ptx: str) -> None:
    """No fused, flushed or approximate operation on floats; each is rounded to nearest."""
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|rsqrt)\.[\w.]*f\d\d", ptx))
    assert operations
    inexact = {each for each in operations if not re.fullmatch(r"\w+\.rn\.f(32|64)", each)}
    assert inexact | {each for each in operations if each.startswith("fma")} == set()
    assert "ftz" not in ptx


@pytest.mark.parametrize("moment", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sgd_plain"])
def test_update_kernel_compiles_to_exact_arithmetic(rule: str, moment: str) -> None:
    _require_exact(_compile_update(rule, moment))


@pytest.mark.parametrize("grad", ["float32", "bfloat16", "float16"])
def test_update_kernel_compiles_for_every_gradient(grad: str) -> None:
    _require_exact(_compile_update("sgd_plain", "float32", grad=grad, out="float16"))


def test_update_kernel_reads_and_writes_in_vectors() -> None:
    """Single elements would make four times the requests to memory."""
    ptx = _compile_update("adam", "float32")
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 3  # master and two moments
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 3
    assert len(re.findall(r"(ld|st)\.global\.v2\.b32", ptx)) == 2  # four bf16: gradient, parameter
    assert re.search(r"(ld|st)\.global\.b(8|16)", ptx) is None


@pytest.mark.parametrize(
    ("values", "square"),
    [("*fp32", True), ("*i16", True), ("*fp16", True), ("*fp64", False)],
)
def test_square_sum_kernel_compiles_to_exact_arithmetic(values: str, *, square: bool) -> None:
    types = {"values_ptr": values, "sums_ptr": "*fp64", "n": "i64", "num_tiles": "i64"}
    _require_exact(_compile(sums.tile_sum_kernel, types, {"SQUARE": square, **sums.SHAPE}))


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_norms_kernel_compiles_to_exact_arithmetic(moment: str) -> None:
    types = {
        "master_ptr": "*fp32", "grad_ptr": "*i16", "first_ptr": POINTERS[moment],
        "second_ptr": POINTERS[moment], "rows_ptr": "*fp32", "master_sums": "*fp64",
        "direction_sums": "*fp64", "span": "i64", "begin": "i64", "end": "i64",
        "first_tile": "i64", "num_tiles": "i64",
    }  # fmt: skip
    _require_exact(_compile(sums.norms_kernel, types, {"WIDTH": ROW, **sums.SHAPE}))
