"""Asynchronous file I/O: tensors to and from striped scratch files, many blocks in flight.

    file = AioFile([disk_a / "x", disk_b / "x"], nbytes=1 << 30)   # made, reserved, unlinked
    queue = AioQueue(depth=16)                                      # io_uring, else threads
    queue.write(file, tensor, 0).wait()                             # OSError if it failed

`csrc/aio.h` is the other half: there a request is cut into blocks, of which `depth` are in flight.
Where the file system allows, I/O is direct (O_DIRECT): it does not pass through the page cache, so
it neither fills the host's memory nor pays for a copy. Direct I/O wants aligned memory, which
`aligned_empty` gives; other memory is copied through `depth` fixed blocks of the queue.

Requests run in any order. One that must see another's bytes is submitted after the other's wait.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hf_speed.logs import get_logger
from hf_speed.ops.native import library

PAGE_BYTES = 4096
"""Offsets are multiples of this; the last block of a write is padded to it, with zeros."""

_HUGE_BYTES = 2 << 20
_AUTO, _URING, _THREADS = 0, 1, 2
_BACKENDS = {"auto": _AUTO, "io_uring": _URING, "threads": _THREADS}
_PENDING, _DONE = 0, 1
_POLL_MS = 200
"""How long a wait stays in native code, where Ctrl-C is not heard."""
_MAX_DEPTH = 1024
_MAX_BLOCK_BYTES = 1 << 30

_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""How a file system says that it has no O_DIRECT."""

_log = get_logger(__name__)


class _Fault(ctypes.Structure):
    """HfsAioFault of csrc/aio.h."""

    _fields_ = (
        ("error", ctypes.c_int32),
        ("part", ctypes.c_int32),
        ("position", ctypes.c_int64),
        ("asked", ctypes.c_int64),
        ("moved", ctypes.c_int64),
    )


def _declare(native: ctypes.CDLL) -> ctypes.CDLL:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[object, ...]] = {
        "queue_open": (pointer, i32, i64, i32, ctypes.POINTER(i32)),
        "queue_backend": (i32, pointer),
        "queue_close": (None, pointer),
        "file_open": (pointer, ctypes.POINTER(i32), i32, i64, i64),
        "file_close": (None, pointer),
        "memory_align": (i64, i32),
        "submit": (pointer, pointer, pointer, i32, pointer, i64, i64),
        "ticket_wait": (i32, pointer, i32),
        "ticket_fault": (None, pointer, ctypes.POINTER(_Fault)),
        "ticket_free": (None, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(native, f"hfs_aio_{name}")
        function.restype, function.argtypes = result, arguments
    return native


_native = _declare(library)


def aligned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) uninitialised CPU memory that starts on a page: direct I/O takes it without a copy.

    From 2 MiB on it asks for huge pages: a block is then one piece of physical memory instead of
    256, which doubled what a virtual disk reads per second. Slices that start at a multiple of
    4096 elements are aligned too.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.empty(numel, dtype=dtype)
    align = _HUGE_BYTES if nbytes >= _HUGE_BYTES else PAGE_BYTES
    memory = mmap.mmap(-1, nbytes + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -raw.data_ptr() % align
    if align == _HUGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE, skip, nbytes // align * align)
    return raw[skip : skip + nbytes].view(dtype)


class AioFile:
    """One logical row of bytes, striped over several scratch files that have no names.

    Each file is made, unlinked at once and its space reserved: a full disk is an error now, not in
    the middle of a run, and a killed run leaves nothing behind.

    Args:
        paths: one new file each, none of which may exist; put them on different disks.
        nbytes: bytes that the row holds.
        stripe_bytes: stripe k lies in file k % len(paths); a multiple of 4096.
        direct: use O_DIRECT, True or False; None: where every file system allows it.

    Attributes:
        direct: whether I/O passes by the page cache.
        nbytes: bytes that the row holds.
        paths: the names that the files had.

    Raises:
        OSError: a file cannot be made (its path is the error's filename), the disk is full, or
            direct=True and a file system refuses O_DIRECT.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        nbytes: int,
        stripe_bytes: int = 1 << 20,
        direct: bool | None = None,
    ) -> None:
        if not paths:
            raise ValueError("AioFile needs at least one path, got none.")
        if stripe_bytes < PAGE_BYTES or stripe_bytes % PAGE_BYTES:
            raise ValueError(f"stripe_bytes={stripe_bytes} is not a multiple of {PAGE_BYTES}.")
        self.paths = tuple(Path(path) for path in paths)
        self.nbytes = 0
        self._stripe_bytes = stripe_bytes
        self._finalizer: weakref.finalize | None = None
        self._fds: list[int] = []
        try:
            for path in self.paths:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fds.append(os.open(path, flags, 0o600))
                path.unlink()
            self.grow(nbytes)
            align = 1 if direct is False else self._try_direct(required=bool(direct))
            self.direct = align > 1
            handle = _native.hfs_aio_file_open(
                (ctypes.c_int32 * len(self._fds))(*self._fds), len(self._fds), stripe_bytes, align
            )
            if not handle:
                raise MemoryError("no memory for a file's native half")
        except BaseException:
            for fd in self._fds:
                os.close(fd)
            raise
        self._handle = handle
        # The native half owns the descriptors and closes them after the last request in flight.
        self._finalizer = weakref.finalize(self, _native.hfs_aio_file_close, handle)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._finalizer is not None and not self._finalizer.alive

    def grow(self, nbytes: int) -> None:
        """Reserve space up to `nbytes`; what is there stays.

        Raises:
            OSError: the disk is full; the row keeps its size.
            ValueError: `nbytes` is less than the row holds, or the file is closed.
        """
        if self.closed:
            raise ValueError(f"cannot grow {self.paths[0]}: it is closed.")
        if nbytes < self.nbytes:
            raise ValueError(f"cannot shrink {self.paths[0]} from {self.nbytes} to {nbytes} bytes.")
        parts = _part_bytes(nbytes, len(self._fds), self._stripe_bytes)
        before = [os.fstat(fd).st_size for fd in self._fds]
        for path, fd, old, size in zip(self.paths, self._fds, before, parts, strict=True):
            try:
                if size > old:
                    os.posix_fallocate(fd, old, size - old)
            except OSError as error:
                for each, held in zip(self._fds, before, strict=True):
                    os.ftruncate(each, held)
                raise OSError(
                    error.errno, f"cannot reserve {size} bytes: {error.strerror}", str(path)
                ) from error
        self.nbytes = nbytes

    def close(self) -> None:
        """Give the space back, after what is in flight. A second call does nothing."""
        if self._finalizer is not None:
            self._finalizer()

    def _try_direct(self, *, required: bool) -> int:
        """Turn O_DIRECT on; give what it wants of memory, or 1 where it was left off."""
        aligns = []
        for path, fd in zip(self.paths, self._fds, strict=True):
            try:
                aligns.append(_make_direct(fd))
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                for each in self._fds:
                    _set_direct(each, on=False)
                if required:
                    raise OSError(
                        error.errno,
                        "direct I/O was asked for, but the file system refuses O_DIRECT; use "
                        "another one, or direct=None",
                        str(path),
                    ) from error
                return 1
        # 1 would mean buffered.
        return max(2, *aligns)


def _part_bytes(nbytes: int, parts: int, stripe_bytes: int) -> list[int]:
    """Bytes of each part of a row of `nbytes`, padded to a page."""
    padded = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    rounds, rest = divmod(padded, parts * stripe_bytes)
    return [
        rounds * stripe_bytes + min(max(rest - part * stripe_bytes, 0), stripe_bytes)
        for part in range(parts)
    ]


def _set_direct(fd: int, *, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _make_direct(fd: int) -> int:
    """Set O_DIRECT on a new file, try it, and give the alignment that it wants of memory."""
    _set_direct(fd, on=True)
    align = int(_native.hfs_aio_memory_align(fd))
    if align == 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    # Some file systems take the flag and refuse the I/O. Page 1 shows coarser alignments too.
    size = os.fstat(fd).st_size
    position = PAGE_BYTES if size >= 2 * PAGE_BYTES else 0
    with mmap.mmap(-1, PAGE_BYTES) as page:
        os.pwrite(fd, page, position)
        os.preadv(fd, [page], position)
    os.ftruncate(fd, size)
    return align


class AioTicket:
    """One read or write on its way. Keeps its tensor and its file alive until it is done."""

    def __init__(self, handle: int, tensor: Tensor, file: AioFile, verb: str) -> None:
        """Made by `AioQueue.read` and `AioQueue.write`."""
        self._handle = handle
        self._verb = verb
        self._paths = file.paths
        self._kept: tuple[Tensor, AioFile] | None = (tensor, file)
        self._free = _native.hfs_aio_ticket_free

    def done(self) -> bool:
        """Whether it has ended, well or not; `wait` tells which, and returns at once."""
        return self._poll(0)

    def wait(self) -> None:
        """Return when the bytes have moved.

        Raises:
            OSError: they have not: errno and filename say why and where; a read that found the
                file too short is EIO. Every wait on this ticket raises it.
            RuntimeError: this process is a fork of the one that submitted it.
        """
        while not self._poll(_POLL_MS):
            pass
        fault = _Fault()
        _native.hfs_aio_ticket_fault(self._handle, ctypes.byref(fault))
        if fault.error:
            raise self._error(fault)

    def _poll(self, timeout_ms: int) -> bool:
        state = _native.hfs_aio_ticket_wait(self._handle, timeout_ms)
        if state == _PENDING:
            return False
        if state != _DONE:
            raise RuntimeError(
                f"this {self._verb} was submitted before a fork: only the parent process can wait "
                "for it. Make a queue of its own in the child."
            )
        self._kept = None
        return True

    def _error(self, fault: _Fault) -> OSError:
        what = f"{self._verb} of {fault.asked} bytes at {fault.position} failed"
        if fault.error == errno.EIO and fault.moved:
            why = f"only {fault.moved} bytes moved; was the file truncated?"
        elif fault.error == errno.EIO and self._verb == "read":
            why = f"{os.strerror(errno.EIO)}, or the file ends before it"
        else:
            why = os.strerror(fault.error)
        return OSError(fault.error, f"{what}: {why}", str(self._paths[fault.part]))

    def __del__(self) -> None:
        self._free(self._handle)


class AioQueue:
    """Moves tensors to and from files, `depth` blocks at a time.

    Args:
        depth: blocks in flight, 1 to 1024.
        backend: `io_uring`; `threads`: `depth` threads with pread and pwrite; `auto`: io_uring
            where the kernel lets this process use it.
        block_bytes: requests are cut into blocks of this size; a multiple of 4096.

    Attributes:
        backend: `io_uring` or `threads`.
        bounce_bytes: most memory that the fixed blocks for unaligned tensors can take.

    Raises:
        OSError: the backend cannot be started.
    """

    def __init__(
        self,
        *,
        depth: int = 16,
        backend: Literal["auto", "io_uring", "threads"] = "auto",
        block_bytes: int = 1 << 20,
    ) -> None:
        if backend not in _BACKENDS:
            raise ValueError(f"backend={backend!r} is none of {', '.join(_BACKENDS)}.")
        if not 1 <= depth <= _MAX_DEPTH:
            raise ValueError(f"depth={depth} is not between 1 and {_MAX_DEPTH}.")
        if not PAGE_BYTES <= block_bytes <= _MAX_BLOCK_BYTES or block_bytes % PAGE_BYTES:
            raise ValueError(
                f"block_bytes={block_bytes} is not a multiple of {PAGE_BYTES} up to "
                f"{_MAX_BLOCK_BYTES}."
            )
        failure = ctypes.c_int32()
        handle = _native.hfs_aio_queue_open(
            depth, block_bytes, _BACKENDS[backend], ctypes.byref(failure)
        )
        if not handle:
            raise OSError(
                failure.value,
                f"cannot start an AioQueue with backend={backend!r}: "
                f"{os.strerror(failure.value)}. Use backend='auto' to take what the system allows.",
            )
        used = _native.hfs_aio_queue_backend(handle)
        self.backend: str = next(name for name, value in _BACKENDS.items() if value == used)
        self.bounce_bytes = depth * block_bytes
        if failure.value:
            _log.log_once(
                logging.INFO,
                "file I/O uses %d threads, since io_uring is not to be had here: %s",
                depth,
                os.strerror(failure.value),
            )
        self._handle = handle
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # A ticket that nobody holds any more must not let go of its tensor while I/O is in flight.
        self._live: collections.deque[AioTicket] = collections.deque()
        self._finalizer = weakref.finalize(self, _close_queue, handle, self._live)

    def read(self, file: AioFile, target: Tensor, offset: int) -> AioTicket:
        """Start reading `target.nbytes` bytes at `offset` into `target`.

        Args:
            file: where from.
            target: contiguous CPU tensor; must not be used before the ticket's wait.
            offset: in bytes, a multiple of 4096.

        Raises:
            ValueError: tensor, offset or range do not fit, or queue or file are closed.
            RuntimeError: this process is a fork of the queue's.
        """
        return self._submit(file, target, offset, is_write=False)

    def write(self, file: AioFile, source: Tensor, offset: int) -> AioTicket:
        """Start writing `source` at `offset`; zeros follow it up to a multiple of 4096 bytes.

        Args:
            file: where to.
            source: contiguous CPU tensor; must not change before the ticket's wait.
            offset: in bytes, a multiple of 4096.

        Raises:
            ValueError: tensor, offset or range do not fit, or queue or file are closed.
            RuntimeError: this process is a fork of the queue's.
        """
        return self._submit(file, source, offset, is_write=True)

    def close(self) -> None:
        """Finish what was submitted, then end the threads. A second call does nothing."""
        if os.getpid() != self._pid:  # the lock may have been held when this process was forked
            self._finalizer()
            return
        with self._lock:
            self._finalizer()

    def _submit(self, file: AioFile, tensor: Tensor, offset: int, *, is_write: bool) -> AioTicket:
        verb = "write" if is_write else "read"
        _check(file, tensor, offset, verb)
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"cannot {verb}: this AioQueue was made before a fork, and its threads live in the "
                "parent process. Make a queue of its own in the child."
            )
        with self._lock:
            if not self._finalizer.alive:
                raise ValueError(f"cannot {verb}: the queue is closed.")
            handle = _native.hfs_aio_submit(
                self._handle, file._handle, is_write, tensor.data_ptr(), tensor.nbytes, offset
            )
            if not handle:
                raise MemoryError(f"no memory to queue a {verb} of {tensor.nbytes} bytes")
            ticket = AioTicket(handle, tensor, file, verb)
            self._live.append(ticket)
            while self._live and self._live[0].done():
                self._live.popleft()
        return ticket


def _close_queue(handle: int, live: collections.deque[AioTicket]) -> None:
    _native.hfs_aio_queue_close(handle)
    live.clear()


def _check(file: AioFile, tensor: Tensor, offset: int, verb: str) -> None:
    if file.closed:
        raise ValueError(f"cannot {verb} {file.paths[0]}: it is closed.")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"cannot {verb} a tensor of strides {tensor.stride()} on {tensor.device}: file I/O "
            "takes contiguous CPU tensors. Copy it first."
        )
    if offset % PAGE_BYTES:
        raise ValueError(f"cannot {verb} at {offset}: not a multiple of {PAGE_BYTES}.")
    if offset < 0 or offset + tensor.nbytes > file.nbytes:
        raise ValueError(
            f"cannot {verb} bytes {offset} to {offset + tensor.nbytes} of {file.paths[0]}: it "
            f"holds {file.nbytes}."
        )
