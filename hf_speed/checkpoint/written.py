"""The files of a model that this process has just written, so that nobody need read them again.

The model is saved first, and the manifest, which lists its checksums, after it. What has been
touched in between, as by a hook of the user's, is not what was written and is read after all.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from hf_speed.checkpoint.digest import FileRecord


class FullWeights(NamedTuple):
    """That a model's files hold what the optimizer updates, bit for bit, and not a cast of it.

    Then masters need not be stored again beside them.

    Attributes:
        dtype: of the floating-point weights in the files.
        names: of the parameters that the files hold.
    """

    dtype: torch.dtype
    names: frozenset[str]

    def holds(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the files hold the master of a parameter, which has this dtype."""
        return name in self.names and dtype == self.dtype


class _Stamp(NamedTuple):
    inode: int
    nbytes: int
    mtime_ns: int


class WrittenFiles:
    """Records of the model that was saved last. One for each engine; used by one thread at a time.

    `write_model` notes what this rank wrote, `write_states` asks for it.
    """

    def __init__(self) -> None:
        self._records: dict[str, tuple[_Stamp, FileRecord]] = {}

    def note(self, staging: Path, directory: Path, records: Mapping[str, FileRecord]) -> None:
        """Remember files of `staging` that are about to be renamed into `directory`.

        Those of the save before are forgotten.
        """
        home = directory.resolve()
        self._records = {
            os.fspath(home / name): (_stamp(staging / name), record)
            for name, record in records.items()
        }

    def record(self, path: Path) -> FileRecord | None:
        """What is known of a file; None where it is not as it was written."""
        known = self._records.get(os.fspath(path.parent.resolve() / path.name))
        try:
            return known[1] if known is not None and _stamp(path) == known[0] else None
        except FileNotFoundError:
            return None


def _stamp(path: Path) -> _Stamp:
    """What changes when a file is written again, and does not when it is renamed."""
    found = path.stat()
    return _Stamp(found.st_ino, found.st_size, found.st_mtime_ns)
