"""A directory in a remote store: whatever fsspec opens (s3://, gs://, hf://, memory://, file://).

fsspec finds the backend by the scheme; most are packages of their own (s3fs, gcsfs). A store has no
rename and no lock: `remote.py` says in which order files must come.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_speed.errors import CheckpointError, ConfigError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::.*)?://.*", re.DOTALL)
_SECRET = re.compile(r"(?<=://)[^/@]*@")
_MAX_TEXT_BYTES = 1 << 30


def is_url(place: object) -> bool:
    """Whether a place is an address of fsspec, as in "s3://bucket/run", and no path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def join_url(url: str, name: str) -> str:
    """The address of `name` below `url`."""
    return f"{url.rstrip('/')}/{name}"


class Store:
    """A directory in a remote store. Names are relative to it."""

    def __init__(self, url: str) -> None:
        """Find the backend; nothing is read.

        Raises:
            ConfigError: no address, or the package that opens it is not installed.
        """
        from fsspec.core import url_to_fs

        self.shown = shown(url)
        scheme = url.split("://", maxsplit=1)[0]
        if not is_url(url):
            raise ConfigError(f"{self.shown!r} is no URL; write it as in 's3://bucket/run'.")
        try:
            # A file system of directories wants them made; a store of objects has none.
            options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
            self._fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{self.shown} cannot be opened: {error}. The package that fsspec needs for "
                f"{scheme}:// must be installed on every machine of the run."
            ) from error
        self._root = str(root).rstrip("/")

    def read(self, name: str) -> str | None:
        """A text file; None where there is none.

        Raises:
            CheckpointError: it is no text, or far too large.
        """
        self._fs.invalidate_cache()
        try:
            with self._fs.open(self._path(name), "rb") as file:
                data = file.read(_MAX_TEXT_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        try:
            if len(data) > _MAX_TEXT_BYTES:
                raise ValueError(f"more than {_MAX_TEXT_BYTES} bytes")
            return bytes(data).decode()
        except ValueError as error:
            raise CheckpointError(f"{self.shown}/{name} is damaged: {error}.") from error

    def write(self, name: str, text: str) -> None:
        """Write a text file, in one request."""
        self._fs.pipe_file(self._path(name), text.encode())

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._fs.invalidate_cache()
        if self._fs.exists(self._path(name)):
            self._fs.rm_file(self._path(name))

    def put(self, local: Path, name: str) -> None:
        """Upload a file.

        Raises:
            CheckpointError: the store has another number of bytes afterwards.
        """
        self._fs.put_file(str(local), self._path(name))
        self._fs.invalidate_cache()
        stored, size = self._fs.info(self._path(name)).get("size"), local.stat().st_size
        if stored != size:
            raise CheckpointError(
                f"{self.shown}/{name} has {stored} bytes after the upload instead of {size}."
            )

    def get(self, name: str, local: Path) -> None:
        """Download a file.

        Raises:
            CheckpointError: it is not there.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fs.get_file(self._path(name), str(local))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.shown}/{name} is missing.") from error

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by name."""
        self._fs.invalidate_cache()
        prefix = f"{self._fs._strip_protocol(self._root)}/"
        found: Mapping[str, Any] = self._fs.find(self._root, detail=True)
        return {
            path.removeprefix(prefix): int(info.get("size") or 0)
            for path, info in found.items()
            if path.startswith(prefix)
        }

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def shown(url: str) -> str:
    """An address for messages, without a password in it."""
    return _SECRET.sub("", url)
