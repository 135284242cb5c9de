"""Reads and writes any interval of a row, though the file moves whole pages.

    read   [first page, through a page of its own] [whole pages, into the tensor itself]
    write  [cut page: read, patched, written] [whole pages, from the tensor itself] [cut page]

What was never written is zeros and is not read. The caller keeps the order: nothing else may be in
flight on the pages of a write, nor a write on the pages of a read.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.errors import OffloadError
from hf_speed.offload.regions import Region, Written, page_ceil, page_floor
from hf_speed.ops.aio import PAGE_BYTES, AioFile, AioQueue, AioTicket, aligned_empty


class Extent(NamedTuple):
    """A row in the file: where it lies, its bytes, and which of them were written."""

    key: str
    region: Region
    nbytes: int
    written: Written


class DiskTransfer:
    """A fetch or commit whose parts are on their way. `heard`: the caller knows how it failed."""

    def __init__(
        self,
        key: str,
        verb: str,
        parts: Sequence[AioTicket],
        edge: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.heard = False
        self._key = key
        self._verb = verb
        self._parts = parts
        self._edge = edge
        self._fault: OSError | None = None
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return all(part.done() for part in self._parts)

    def settle(self) -> None:
        """Return when nothing moves any more, well or not."""
        with self._lock:
            # All of them, also after a failure: until then the kernel may use the memory.
            for part in self._parts:
                try:
                    part.wait()
                except OSError as fault:
                    # Without its traceback, which would keep the callers' tensors alive.
                    self._fault = self._fault or fault.with_traceback(None)
            self._parts = ()
            if self._edge is not None and self._fault is None:
                target, source = self._edge
                target.copy_(source)
            self._edge = None

    def error(self) -> OffloadError | None:
        """How it failed; None if it did not. After `settle`."""
        if self._fault is None:
            return None
        fault = self._fault
        error = OffloadError(
            f"the {self._verb} of {self._key!r} failed on {fault.filename}: {fault.strerror} "
            f"(errno {fault.errno}). What it holds is lost: check the disk, name another in "
            f"offload.paths, and resume from a checkpoint."
        )
        error.__cause__ = fault
        return error

    def wait(self) -> None:
        """Return when the bytes have moved; raise if they have not."""
        self.settle()
        error = self.error()
        if error is not None:
            self.heard = True
            raise error


class RowFile:
    """Moves bytes between CPU memory and the rows of one file."""

    def __init__(self, file: AioFile, queue: AioQueue) -> None:
        self._file = file
        self._queue = queue

    def read(self, extent: Extent, out: Tensor, begin: int) -> DiskTransfer:
        """Start reading bytes [begin, begin + n) of a row into `out`, (n,) uint8."""
        parts: list[AioTicket] = []
        edge: tuple[Tensor, Tensor] | None = None
        for low, high, is_written in extent.written.pieces(begin, begin + out.numel()):
            piece = out[low - begin : high - begin]
            if not is_written:
                piece.zero_()
                continue
            # Only the first piece can begin inside a page: what is written is whole pages.
            inside = low % PAGE_BYTES
            if inside:
                count = min(PAGE_BYTES - inside, high - low)
                page = aligned_empty(PAGE_BYTES, torch.uint8)
                parts.append(self._read_pages(extent, page, page_floor(low)))
                edge = (piece[:count], page[inside : inside + count])
                piece = piece[count:]
            if piece.numel():
                parts.append(self._read_pages(extent, piece, high - piece.numel()))
        return DiskTransfer(extent.key, "fetch", parts, edge)

    def write(self, extent: Extent, value: Tensor, begin: int) -> DiskTransfer:
        """Start writing `value`, (n,) uint8, over bytes [begin, begin + n) of a row.

        `extent.written` is what was written before.

        Raises:
            OffloadError: a page that the interval cuts cannot be read.
        """
        end = begin + value.numel()
        # The padding behind a row's last byte is nobody's: its page is not cut.
        ends_row = end == extent.nbytes
        cut = {page_floor(begin)} if begin % PAGE_BYTES else set()
        if end % PAGE_BYTES and not ends_row:
            cut.add(page_floor(end))
        pages = {at: self._patched(extent, at, value, begin) for at in sorted(cut)}
        parts = [self._write_pages(extent, page, at) for at, page in pages.items()]
        low, high = page_ceil(begin), end if ends_row else page_floor(end)
        if low < high:
            parts.append(self._write_pages(extent, value[low - begin : high - begin], low))
        return DiskTransfer(extent.key, "commit", parts)

    def _patched(self, extent: Extent, at: int, value: Tensor, begin: int) -> Tensor:
        """The page at `at` of a row, with what `value` has of it."""
        page = aligned_empty(PAGE_BYTES, torch.uint8)
        self.read(extent, page[: min(PAGE_BYTES, extent.nbytes - at)], at).wait()
        low, high = max(begin, at), min(begin + value.numel(), at + PAGE_BYTES)
        page[low - at : high - at].copy_(value[low - begin : high - begin])
        return page

    def _read_pages(self, extent: Extent, out: Tensor, at: int) -> AioTicket:
        return self._queue.read(self._file, out, extent.region.start + at)

    def _write_pages(self, extent: Extent, value: Tensor, at: int) -> AioTicket:
        return self._queue.write(self._file, value, extent.region.start + at)
