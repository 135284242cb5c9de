"""Bytes to a new file at any offset, past the page cache where the file system allows it, hashed.

Through the page cache a write costs pages, a copy into them, and in the end the wait for all of it
to reach the disk. Direct I/O (O_DIRECT) leaves that out, but wants whole pages in aligned memory:

    value    . . [ page | page | page ] . .      the ragged ends go through the page cache
                   copied and hashed, a block at a time, while it is in the processor's cache

`sync` forces to disk what either way has written.
"""

import errno
import os
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from hf_speed.ops.aio import aligned_empty

PAGE_BYTES = 4096
"""Direct I/O moves multiples of this, to and from multiples of it."""

BLOCK_BYTES = 1 << 20

MIN_DIRECT_BYTES = BLOCK_BYTES
"""Smaller files are left to the page cache."""

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""How a file system says that it has no O_DIRECT, or not for this."""


class OutputFile:
    """A file of known size that is being written. Not for use by two threads at once.

    Attributes:
        is_direct: whether whole pages pass by the page cache.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        """Create `path`, empty where it exists, with `nbytes` to come.

        Raises:
            OSError: it cannot be created.
        """
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct: int | None = None
        try:
            # Its size from the start: direct writes that extend a file wait for each other.
            os.ftruncate(self._descriptor, nbytes)
            if nbytes >= MIN_DIRECT_BYTES:
                self._direct = _open_direct(path)
        except OSError:
            self.close()
            raise
        self._block: Tensor | None = None

    @property
    def is_direct(self) -> bool:
        """Whether whole pages pass by the page cache."""
        return self._direct is not None

    def write(self, offset: int, data: Tensor) -> str:
        """Write (n,) uint8 of the CPU; gives their checksum.

        Raises:
            OSError: the disk is full, or fails.
        """
        hashed = xxhash.xxh3_128()
        head = min(-offset % PAGE_BYTES, data.numel())
        stop = head + (data.numel() - head) // PAGE_BYTES * PAGE_BYTES
        self._write_cached(offset, data[:head], hashed)
        done = head
        while done < stop and self._direct is not None:
            done += self._write_block(self._direct, offset + done, data[done:stop], hashed)
        self._write_cached(offset + done, data[done:], hashed)
        return hashed.hexdigest()

    def sync(self) -> None:
        """Force everything to disk.

        Raises:
            OSError: the disk fails.
        """
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, without waiting for the disk."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _write_block(
        self, descriptor: int, offset: int, data: Tensor, hashed: xxhash.xxh3_128
    ) -> int:
        """Write the first block of whole pages; how many bytes that was. 0: not past the cache."""
        if self._block is None:
            self._block = aligned_empty(BLOCK_BYTES, torch.uint8)
        size = min(data.numel(), BLOCK_BYTES)
        block = self._block[:size].copy_(data[:size]).numpy().data
        try:
            _write_at(descriptor, offset, block)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            os.close(descriptor)
            self._direct = None
            return 0
        hashed.update(block)
        return size

    def _write_cached(self, offset: int, data: Tensor, hashed: xxhash.xxh3_128) -> None:
        for begin in range(0, data.numel(), BLOCK_BYTES):
            view = data[begin : begin + BLOCK_BYTES].numpy().data
            hashed.update(view)
            _write_at(self._descriptor, offset + begin, view)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return None
        raise


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        offset += done
        data = data[done:]
