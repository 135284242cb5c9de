"""The disk tier: rows in one file without a name, striped over the disks.

    allocate  regions.py says where; the file grows, its space reserved; no memory
    fetch     what was never written is zeros; the rest is read, in the background   rowfile.py
    commit    is written in the background
    wait      an error names the disk and the key; a row whose commit failed is never read again

Between a disk and a GPU lie the fixed buffers of a `StagingPool`, see staged.py.
"""

import errno
import functools
import logging
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_speed.config import Tier
from hf_speed.errors import OffloadError
from hf_speed.logs import get_logger
from hf_speed.offload.flight import InFlight, Transfer
from hf_speed.offload.pool import StagingPool
from hf_speed.offload.regions import Regions, Written, page_ceil, page_floor
from hf_speed.offload.rowfile import DiskTransfer, Extent, RowFile
from hf_speed.offload.rundir import free_bytes, make_all, unusable
from hf_speed.offload.staged import StagedMover, StagedTransfer
from hf_speed.offload.store import DONE, Ledger, Row, Ticket, in_words
from hf_speed.ops.aio import AioFile, AioQueue

_log = get_logger(__name__)


class DiskStore:
    """Rows on disk; see `Store` for what its methods promise.

    Args:
        paths: existing directories; put them on different disks.
        queue: what moves the bytes; several stores may share one. None: one of its own.
        staging: through which bytes go to and from a GPU; needed for that only. It must not be one
            whose buffers are all held by someone who waits for this store.
        stripe_bytes: how the bytes are dealt out to the disks.

    Attributes:
        direct: whether I/O passes by the page cache.

    Raises:
        OffloadError: a path is missing, no directory, read-only, full, or cannot be locked.
    """

    tier: Tier = "disk"
    device = torch.device("cpu")

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        queue: AioQueue | None = None,
        staging: StagingPool | None = None,
        stripe_bytes: int = 1 << 20,
    ) -> None:
        self._paths = tuple(Path(path) for path in paths)
        if not self._paths:
            raise OffloadError("a disk store needs a place: set offload.paths to directories.")
        directories = make_all(self._paths)
        try:
            names = [each.path / f"part{i}" for i, each in enumerate(directories)]
            self._file = AioFile(names, nbytes=0, stripe_bytes=stripe_bytes)
        except OSError as error:
            for each in directories:
                each.close()
            raise unusable(self._path_of(error), error) from error
        self._directories = directories
        self.direct = self._file.direct
        if not self.direct:
            _log.log_once(
                logging.WARNING,
                "offload.paths: the file system of %s has no direct I/O. What is written there "
                "also fills host memory, as page cache; name a directory on a local disk.",
                ", ".join(map(str, self._paths)),
            )
        self._owns_queue = queue is None
        self._queue = AioQueue() if queue is None else queue
        self._io = RowFile(self._file, self._queue)
        self._staging = staging
        self._mover: StagedMover | None = None
        self._ledger = Ledger("disk")
        self._regions = Regions()
        self._extents: dict[str, Extent] = {}
        self._flight: InFlight[DiskTransfer | StagedTransfer] = InFlight()
        self._lost: dict[str, OffloadError] = {}
        self._unheard: list[DiskTransfer | StagedTransfer] = []
        # Reentrant: a collected graph may free its rows in the middle of another call.
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys that it holds now."""
        return self._ledger.num_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that it ever held."""
        return self._ledger.peak_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes that it takes on the disks, freed rows included, until it is closed."""
        return self._file.nbytes

    def allocate(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool = True) -> None:
        """Make room for `numel` elements: disk space, no memory and no I/O."""
        del zeros  # What was never written is not read: zeros are free.
        with self._lock:
            self._report()
            row = self._ledger.new(key, numel, dtype)
            region = self._regions.place(row.nbytes)
            if region.stop > self._file.nbytes:
                self._grow(row, region.stop)
            self._regions.take(region)
            self._extents[key] = Extent(key, region, row.nbytes, Written())
            self._ledger.add(row)

    def fetch(self, key: str, out: Tensor, start: int = 0) -> Ticket:
        """Start reading elements [start, start + n) into `out`."""
        return self._move(key, out, start, is_write=False)

    def commit(self, key: str, value: Tensor, start: int = 0) -> Ticket:
        """Start writing `value` over elements [start, start + n)."""
        return self._move(key, value, start, is_write=True)

    def view(self, key: str) -> Tensor | None:
        """None: there is no memory to look into."""
        with self._lock:
            self._ledger.get(key, "view")
        return None

    def free(self, key: str) -> None:
        """Forget a row; its disk space is used again."""
        with self._lock:
            self._ledger.remove(key)
            for transfer in self._flight.of(key):
                transfer.settle()
            self._flight.drop(key)  # how they ended concerns nobody any more
            self._lost.pop(key, None)
            self._regions.give(self._extents.pop(key).region)

    def close(self) -> None:
        """Finish what is in flight, then remove everything from the disks."""
        with self._lock:
            if self._ledger.closed:
                return
            self._ledger.close()
            for key, transfer in self._flight.take_all():
                self._book(key, transfer)
            if self._mover is not None:
                self._mover.close()
            self._extents.clear()
            self._file.close()
            if self._owns_queue:
                self._queue.close()
            for directory in self._directories:
                directory.close()
            self._raise_unheard()

    def _move(self, key: str, tensor: Tensor, start: int, *, is_write: bool) -> Ticket:
        with self._lock:
            row = self._ledger.span(key, tensor, start, "commit" if is_write else "fetch")
            self._report()
            if tensor.numel() == 0:
                return DONE
            begin = start * row.dtype.itemsize
            low, high = page_floor(begin), page_ceil(begin + tensor.nbytes)
            before = self._flight.before(key, low, high, is_write=is_write)
            extent = self._extents[key]
            ticket: DiskTransfer | StagedTransfer
            if self._is_staged(tensor):
                self._check_kept(key)
                extent = extent._replace(written=extent.written.copy())
                move = functools.partial(self._io.write if is_write else self._io.read, extent)
                ticket = StagedTransfer(tensor, begin, is_write=is_write, move=move, after=before)
                self._submit(ticket)
            else:
                for earlier in before:
                    earlier.settle()
                self._report()
                self._check_kept(key)
                move = self._io.write if is_write else self._io.read
                ticket = move(extent, tensor.view(torch.uint8), begin)
            if is_write:
                self._extents[key].written.add(low, high)
            self._flight.add(key, Transfer(low, high, is_write, ticket))
            return ticket

    def _is_staged(self, tensor: Tensor) -> bool:
        return tensor.device.type != "cpu"

    def _submit(self, transfer: StagedTransfer) -> None:
        if self._staging is None:
            raise OffloadError(
                f"this disk store has no staging buffers, and {transfer.raw.device} cannot be read "
                f"from a disk directly. Make it with staging=StagingPool(...)."
            )
        if self._mover is None:
            self._mover = StagedMover(self._staging)
            weakref.finalize(self, self._mover.close)
        self._mover.submit(transfer)

    def _grow(self, row: Row, nbytes: int) -> None:
        try:
            self._file.grow(nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise unusable(self._path_of(error), error) from error
            free = ", ".join(f"{path}: {in_words(free_bytes(path))}" for path in self._paths)
            raise OffloadError(
                f"the disk tier is full: {row.key!r} needs {in_words(nbytes - self._file.nbytes)} "
                f"more, and free are {free} ({error.strerror}). Make room, add a directory on "
                f"another disk to offload.paths, or keep a kind of state on another tier."
            ) from error

    def _path_of(self, error: OSError) -> Path:
        """Which of the paths an error is about; the fullest, if it does not say."""
        about = Path(str(error.filename))
        named = [path for path in self._paths if about.is_relative_to(path)]
        return min(named or self._paths, key=free_bytes)

    def _report(self) -> None:
        """Look at what has ended; raise the error of a commit that nobody has heard of."""
        for key, transfer in self._flight.reap():
            self._book(key, transfer)
        self._raise_unheard()

    def _book(self, key: str, transfer: Transfer[DiskTransfer | StagedTransfer]) -> None:
        """Note how a transfer ended. One that did not fill its tensor is its waiter's affair."""
        transfer.ticket.settle()
        error = transfer.ticket.error()
        if error is not None and transfer.is_write:
            self._lost.setdefault(key, error)
            self._unheard.append(transfer.ticket)

    def _raise_unheard(self) -> None:
        while self._unheard:
            ticket = self._unheard.pop()
            if not ticket.heard:
                ticket.wait()

    def _check_kept(self, key: str) -> None:
        error = self._lost.get(key)
        if error is not None:
            raise OffloadError(
                f"{key!r} is lost, since a write to it has failed. Resume from a checkpoint."
            ) from error
