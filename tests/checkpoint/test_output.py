"""Files written past the page cache hold what those written through it do."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_speed.checkpoint import output
from hf_speed.checkpoint.digest import digest_of
from hf_speed.checkpoint.output import BLOCK_BYTES, MIN_DIRECT_BYTES, PAGE_BYTES, OutputFile

LENGTHS = (3, 2 * BLOCK_BYTES + 5, PAGE_BYTES, 0, MIN_DIRECT_BYTES + 1)
"""Ragged, so that no later value begins on a page."""


def _values() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in LENGTHS]


def _write(path: Path) -> OutputFile:
    """Write the values last to first, and check every checksum."""
    values = _values()
    file = OutputFile(path, sum(LENGTHS))
    for index in reversed(range(len(values))):
        digest = file.write(sum(LENGTHS[:index]), values[index])
        assert digest == digest_of(values[index].numpy().tobytes())
    file.sync()
    return file


def _check(path: Path) -> None:
    assert path.read_bytes() == torch.cat(_values()).numpy().tobytes()


def test_ragged_values_in_any_order_are_all_there(tmp_path: Path) -> None:
    _write(tmp_path / "file").close()
    _check(tmp_path / "file")


def test_a_file_system_without_direct_io_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without_direct(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_direct)
    file = _write(tmp_path / "file")
    assert not file.is_direct
    file.close()
    _check(tmp_path / "file")


def test_a_disk_that_wants_more_than_pages_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is no multiple of its sectors the kernel refuses, here as on a disk of larger sectors.
    monkeypatch.setattr(output, "PAGE_BYTES", 3)
    _write(tmp_path / "file").close()
    _check(tmp_path / "file")


def test_what_is_not_about_alignment_is_raised(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "file", MIN_DIRECT_BYTES)
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.write(0, torch.zeros(MIN_DIRECT_BYTES, dtype=torch.uint8))
