"""The update kernels and their threads, built alone with sanitizers, through their C interface."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DRIVER = Path(__file__).with_name("update_driver.cpp")
SOURCES = ("threads", "update", "update_avx2", "update_avx512", "update_scalar")
CASES = 8


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: neither $CXX nor g++ is there")
    return compiler


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_are_clean_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    binary = tmp_path / "driver"
    subprocess.run(
        [
            _compiler(), "-std=c++17", "-g", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall",
            "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
            f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{CSRC}", "-o", str(binary),
            str(DRIVER), *(str(CSRC / f"{name}.cpp") for name in SOURCES), "-pthread",
        ],
        check=True,
    )  # fmt: skip
    # The thread sanitizer of older compilers cannot place its shadow in a randomised address space.
    steady = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*steady, str(binary)],
        # It would otherwise end a forked child that starts threads, which is what is tested.
        env={**os.environ, "TSAN_OPTIONS": "die_after_fork=0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.split()) == CASES, done.stdout
