"""The native library is there, private, and refuses to be loaded where it cannot work."""

import ctypes
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from hf_speed.errors import ConfigError
from hf_speed.ops import native
from tests.architecture.sources import ROOT


def test_the_library_speaks_the_abi_of_the_python_code() -> None:
    assert native.library.hfs_abi() == native.ABI


def test_its_symbols_are_visible_to_nobody_else() -> None:
    with pytest.raises(AttributeError, match="hfs_abi"):
        _ = ctypes.CDLL(None).hfs_abi


def test_a_library_that_was_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is not built: there is no .*gone\.so\. Install hf_speed"
    ):
        native.load(tmp_path / "gone.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match="cannot be loaded here"):
        native.load(broken)


def test_a_stale_library_is_refused(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: there is no g++")
    source, built = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int hfs_abi() { return -7; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    with pytest.raises(ConfigError, match=r"is of another version \(-7, not \d+\)"):
        native.load(built)


def test_every_native_file_is_named_in_the_build() -> None:
    """A source left out is missing from the library, a header from source distributions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    assert extension["sources"] == sorted(_named("*.cpp"))
    assert extension["depends"] == sorted(_named("*.h"))


def _named(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern)]
