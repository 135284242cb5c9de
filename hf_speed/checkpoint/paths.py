"""Whether a file belongs to the directory that it seems to lie in, and how large it is."""

import os
import stat
from pathlib import Path

from hf_speed.errors import CheckpointError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


class Home:
    """A directory, and what may count as in it.

    A snapshot in the cache of huggingface_hub consists of links to the blobs beside it, which count
    as its own.
    """

    def __init__(self, directory: Path) -> None:
        """Resolve `directory`, which need not exist."""
        self.directory = directory
        real = _real(directory)
        self._homes = [real]
        if real.parent.name == _SNAPSHOTS:
            self._homes.append(real.parents[1] / _BLOBS)
        self._whole: dict[Path, bool] = {}

    def owns(self, name: str) -> bool:
        """Whether the file of this relative path lies here, wherever links lead."""
        path = self.directory / name
        if path.is_symlink():
            return self._is_within(_real(path))
        if path.parent not in self._whole:
            self._whole[path.parent] = self._is_within(_real(path.parent))
        return self._whole[path.parent]

    def size_of(self, name: str) -> int | None:
        """Bytes of a regular file; None where there is none.

        Raises:
            CheckpointError: links lead elsewhere, or the name cannot be a file's.
        """
        path = self.directory / name
        try:
            if not self.owns(name):
                raise CheckpointError(
                    f"{path} is a link to {_real(path)}, which is not part of the checkpoint, so "
                    f"it may be another file tomorrow. Copy the file in its place."
                )
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _is_within(self, real: Path) -> bool:
        return any(real.is_relative_to(each) for each in self._homes)


def _real(path: Path) -> Path:
    """Where links lead; of a circle of links, one of them."""
    return Path(os.path.realpath(path))
