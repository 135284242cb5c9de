"""What every memory tier answers to, and the checks that all of them share.

    store.allocate("unit3.exp_avg", n, torch.float32)       # zeros
    ticket = store.fetch("unit3.exp_avg", out)              # bytes on their way into `out`
    ticket.wait()                                           # ... are there, or it raises
    store.commit("unit3.exp_avg", out).wait()               # and back

A key is one flat row of elements. Fetches and commits move an interval of it. The order in which
they are issued is the order in which they seem to happen to a key, whatever runs at once below.

Source: the tiers of ZeRO-Infinity, arXiv:2104.07857, section 5.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_speed.config import Tier
from hf_speed.errors import OffloadError

GIB = 1 << 30


class Ticket(Protocol):
    """A transfer on its way."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def wait(self) -> None:
        """Return when the transfer's tensor may be used again.

        Bytes that come to a GPU are there for what its current stream runs from now on; the CPU
        does not wait for them. Every other wait is one of the CPU.

        Raises:
            OffloadError: the bytes have not moved. Every wait on this ticket raises it.
        """
        ...


class Store(Protocol):
    """One tier: rows of elements under keys. Threads may share it."""

    @property
    def tier(self) -> Tier:
        """Its name."""
        ...

    @property
    def device(self) -> torch.device:
        """Where `view` lies; the CPU for a disk, whose bytes come there."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys that it holds now."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that it ever held."""
        ...

    def allocate(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool = True) -> None:
        """Make room for `numel` elements.

        Args:
            key: a new name.
            numel: elements; 0 is as good as any.
            dtype: of the elements.
            zeros: the row reads as zeros until it is written; False: contents undefined.

        Raises:
            OffloadError: the tier is full, or the key exists.
        """
        ...

    def fetch(self, key: str, out: Tensor, start: int = 0) -> Ticket:
        """Start copying elements [start, start + n) into `out`; a commit before it is seen.

        Args:
            key: which row.
            out: (n,) contiguous, of the row's dtype, on any device; undefined until the wait.
            start: any element; from a multiple of 4096 a disk reads without a copy.

        Raises:
            OffloadError: no such key, dtype or interval, or an earlier transfer failed.
        """
        ...

    def commit(self, key: str, value: Tensor, start: int = 0) -> Ticket:
        """Start copying `value` over elements [start, start + n).

        An error of a commit whose ticket nobody waits for is raised by the next call, or by close.

        Args:
            key: which row.
            value: (n,) contiguous, of the row's dtype, on any device; must not change before the
                wait.
            start: as in `fetch`.

        Raises:
            OffloadError: as in `fetch`.
        """
        ...

    def view(self, key: str) -> Tensor | None:
        """The memory of a row itself, nothing in flight on it; None on a disk."""
        ...

    def free(self, key: str) -> None:
        """Forget a row, after what is in flight on it."""
        ...

    def close(self) -> None:
        """Forget all rows, after what is in flight. A second call does nothing.

        Raises:
            OffloadError: a commit failed and nobody has heard of it. The store is closed.
        """
        ...


class Settled(Ticket, Protocol):
    """A ticket that can also make the CPU wait."""

    def settle(self) -> None:
        """Return when nothing moves any more, well or not, for the CPU too."""
        ...


class _Done:
    """The ticket of a transfer that was over when the call returned."""

    def done(self) -> bool:
        """True."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def settle(self) -> None:
        """Return at once."""


DONE: Settled = _Done()


class Row(NamedTuple):
    """What a store knows of a key."""

    key: str
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize


class Ledger:
    """The rows of one store, and how many bytes they are."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._rows: dict[str, Row] = {}
        self.num_bytes = 0
        self.peak_bytes = 0
        self.closed = False

    def new(self, key: str, numel: int, dtype: torch.dtype) -> Row:
        """The row that `add` will take; raises if there cannot be one."""
        self._check_open("allocate", key)
        if key in self._rows:
            raise OffloadError(
                f"cannot allocate {key!r} on the {self._tier} tier: it exists, with "
                f"{self._rows[key].numel} elements. Free it first, or use another key."
            )
        if numel < 0:
            raise OffloadError(
                f"cannot allocate {numel} elements for {key!r}. Give 0 or more elements."
            )
        return Row(key, numel, dtype)

    def add(self, row: Row) -> None:
        """Enter a row that has its memory."""
        self._rows[row.key] = row
        self.num_bytes += row.nbytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def get(self, key: str, verb: str) -> Row:
        """The row of `key`."""
        self._check_open(verb, key)
        row = self._rows.get(key)
        if row is None:
            raise OffloadError(
                f"cannot {verb} {key!r}: the {self._tier} tier has no such key among its "
                f"{len(self._rows)}. Allocate it first."
            )
        return row

    def remove(self, key: str) -> Row:
        """Strike a row."""
        row = self.get(key, "free")
        del self._rows[key]
        self.num_bytes -= row.nbytes
        return row

    def close(self) -> None:
        """Strike all rows and refuse what comes."""
        self._rows.clear()
        self.num_bytes = 0
        self.closed = True

    def span(self, key: str, tensor: Tensor, start: int, verb: str) -> Row:
        """The row of `key`, after checking that `tensor` fits it at `start`."""
        row = self.get(key, verb)
        if tensor.dtype != row.dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            raise OffloadError(
                f"cannot {verb} {key!r} with a tensor of shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()} and {tensor.dtype}: its row holds {row.dtype}. Give a "
                f"contiguous tensor of one dimension and that dtype."
            )
        if start < 0 or start + tensor.numel() > row.numel:
            raise OffloadError(
                f"cannot {verb} elements {start} to {start + tensor.numel()} of {key!r}: it has "
                f"{row.numel}."
            )
        return row

    def _check_open(self, verb: str, key: str) -> None:
        if self.closed:
            raise OffloadError(
                f"cannot {verb} {key!r}: this store of the {self._tier} tier is closed. Make "
                f"another one."
            )


def in_words(nbytes: int) -> str:
    """A number of bytes as messages show it."""
    return f"{nbytes} bytes ({nbytes / GIB:.2f} GiB)"
