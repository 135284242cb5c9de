"""The native half of file I/O, built alone with sanitizers and driven through its C interface."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DRIVER = Path(__file__).with_name("aio_driver.cpp")
CASES = 9
BACKENDS = {"io_uring": 1, "threads": 2}
NO_IO_URING = 77
"""What the driver exits with where the kernel refuses io_uring."""


def _build(directory: Path, *flags: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: neither $CXX nor g++ is there")
    binary = directory / "driver"
    subprocess.run(
        [
            compiler, "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}",
            "-o", str(binary), str(DRIVER), str(CSRC / "aio.cpp"), "-pthread",
        ],
        check=True,
    )  # fmt: skip
    return binary


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sanitize = (f"-fsanitize={request.param}", "-fno-sanitize-recover=all")
    return _build(tmp_path_factory.mktemp("aio"), "-O1", *sanitize)


@pytest.mark.parametrize("access", ["direct", "buffered"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_native_half_is_clean_under_sanitizers(
    driver: Path, backend: str, access: str, tmp_path: Path
) -> None:
    if access == "direct":
        _skip_without_direct(tmp_path)
    # The thread sanitizer of older compilers cannot place its shadow in a randomised address space.
    steady = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*steady, str(driver), str(tmp_path), str(BACKENDS[backend]), access],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode == NO_IO_URING:
        pytest.skip("needs io_uring, which this kernel refuses")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.split()) == CASES, done.stdout


def test_without_the_headers_of_io_uring_the_threads_take_over(tmp_path: Path) -> None:
    driver = _build(tmp_path, "-O0", "-DHFS_NO_IO_URING")
    refused = subprocess.run([str(driver), str(tmp_path), "1", "buffered"], check=False)
    assert refused.returncode == NO_IO_URING
    done = subprocess.run(
        [str(driver), str(tmp_path), "2", "buffered"], capture_output=True, text=True, check=False
    )
    assert len(done.stdout.split()) == CASES, done.stderr


def _skip_without_direct(directory: Path) -> None:
    path = directory / "probe"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"needs a file system with O_DIRECT under the temporary directory: {error}")
    finally:
        path.unlink()
