"""A store whose rows lie in memory, of the host or of the device."""

import threading

import torch
from torch import Tensor

from hf_speed.config import Tier
from hf_speed.offload.copies import Copies, CudaCopy
from hf_speed.offload.flight import InFlight, Transfer
from hf_speed.offload.store import Ledger, Ticket


class MemoryStore:
    """Rows as tensors; see `Store` for what its methods promise."""

    tier: Tier

    def __init__(self, tier: Tier, device: torch.device) -> None:
        self.tier = tier
        self.device = device
        self._ledger = Ledger(tier)
        self._rows: dict[str, Tensor] = {}
        self._copies = Copies()
        self._flight: InFlight[CudaCopy] = InFlight()
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

    def allocate(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool = True) -> None:
        """Make room for `numel` elements."""
        with self._lock:
            row = self._ledger.new(key, numel, dtype)
            self._rows[key] = self._make(key, numel, dtype, zeros=zeros)
            self._ledger.add(row)

    def fetch(self, key: str, out: Tensor, start: int = 0) -> Ticket:
        """Start copying elements [start, start + n) into `out`."""
        with self._lock:
            self._ledger.span(key, out, start, "fetch")
            return self._move(key, start, out, is_write=False)

    def commit(self, key: str, value: Tensor, start: int = 0) -> Ticket:
        """Start copying `value` over elements [start, start + n)."""
        with self._lock:
            self._ledger.span(key, value, start, "commit")
            return self._move(key, start, value, is_write=True)

    def view(self, key: str) -> Tensor:
        """The memory of a row itself, nothing in flight on it."""
        with self._lock:
            self._ledger.get(key, "view")
            self._settle(key)
            return self._rows[key]

    def free(self, key: str) -> None:
        """Forget a row, after what is in flight on it."""
        with self._lock:
            self._ledger.remove(key)
            self._settle(key)
            self._drop(self._rows.pop(key))

    def close(self) -> None:
        """Forget all rows, after what is in flight."""
        with self._lock:
            for key in list(self._rows):
                self._settle(key)
                self._drop(self._rows.pop(key))
            self._ledger.close()

    def _make(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool) -> Tensor:
        raise NotImplementedError

    def _drop(self, memory: Tensor) -> None:
        """Called with memory that no row uses any more."""

    def _settle(self, key: str) -> None:
        for ticket in self._flight.of(key):
            ticket.settle()
        self._flight.drop(key)

    def _move(self, key: str, start: int, tensor: Tensor, *, is_write: bool) -> Ticket:
        self._flight.reap()
        stop = start + tensor.numel()
        row = self._rows[key][start:stop]
        target, source = (row, tensor) if is_write else (tensor, row)
        after = self._flight.before(key, start, stop, is_write=is_write)
        ticket = self._copies.copy(target, source, after=after)
        if isinstance(ticket, CudaCopy):
            self._flight.add(key, Transfer(start, stop, is_write, ticket))
        return ticket
