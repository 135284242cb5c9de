"""Saving where a finished checkpoint is already, so that one of the two is always there.

    .state.saving      the new one, while it is written
    state              the old one until then
    .state.replaced    the old one, while the new one takes its place

`swap` begins when the new one is whole: two renames, then what does not belong to a checkpoint
moves over, and the old one is deleted. Where a process dies in between, `recover` completes it.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_speed.checkpoint.latest import remove_checkpoint
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.tensorfile import sync_directory
from hf_speed.logs import get_logger

_log = get_logger(__name__)


def place_to_write(directory: Path) -> Path:
    """Where to write a checkpoint that is to stand in `directory`; call it on one rank.

    That is `directory`, unless a finished one is there: then a new place beside it, empty.

    Raises:
        OSError: what an earlier save has left cannot be cleared.
    """
    directory = directory.resolve()
    manifests = (MANIFEST_PATH, f"model_*/{MANIFEST_PATH}")
    if not any(True for pattern in manifests for _ in directory.glob(pattern)):
        return directory
    if not _can_be_renamed(directory):
        _log.warning(
            "%s holds a checkpoint, and cannot be renamed: it is a mount, the working directory or "
            "in a directory that may not be written. The new one is written over it, so if this "
            "process dies meanwhile neither is whole. Save into a directory of its own.",
            directory,
        )
        return directory
    new = _new(directory)
    if new.exists():
        shutil.rmtree(new)
    return new


def swap(directory: Path, *, is_part: Callable[[str], bool]) -> None:
    """Let the whole checkpoint that was written beside `directory` take its place.

    Args:
        directory: for which `place_to_write` gave another one.
        is_part: whether a file or directory of this name belongs to a checkpoint, and goes with it.
    """
    directory = directory.resolve()
    directory.rename(_old(directory))
    _new(directory).rename(directory)
    sync_directory(directory.parent)
    _clear(directory, is_part)


def recover(directory: Path, *, is_part: Callable[[str], bool]) -> None:
    """Complete a swap that was cut short, if one was; call it on one rank before reading."""
    directory = directory.resolve()
    if not _old(directory).exists():
        return
    if not directory.exists():
        _new(directory).rename(directory)
        sync_directory(directory.parent)
    _clear(directory, is_part)


def _clear(directory: Path, is_part: Callable[[str], bool]) -> None:
    old = _old(directory)
    for path in old.iterdir():
        if not is_part(path.name) and not (directory / path.name).exists():
            path.rename(directory / path.name)
    remove_checkpoint(old)


def _can_be_renamed(directory: Path) -> bool:
    held = directory.is_mount() or Path.cwd().is_relative_to(directory)
    return not held and os.access(directory.parent, os.W_OK)


def _new(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.saving"


def _old(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.replaced"
