"""What activation offload remembers: saved memory, the places that use it, and what is back.

    Extent of memory  --- is saved once, however often autograd saves views of it --->  Saved
    one save          --- stands at one place of the forward's order -------------->  Handle

Autograd holds the handles and nothing else does, so memory is freed with its graph.
"""

import bisect
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hf_speed.offload.store import Ticket


class Span(NamedTuple):
    """Bytes [low, high) of a tensor's memory."""

    low: int
    high: int

    def holds(self, other: "Span") -> bool:
        """Whether `other` lies in it."""
        return self.low <= other.low and other.high <= self.high


def span_of(tensor: Tensor) -> Span:
    """The bytes of its storage between a tensor's first and last element."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    low = int(tensor.storage_offset()) * tensor.itemsize
    return Span(low, low + reach * tensor.itemsize)


class Saved:
    """Memory that was saved. `uses`: places that have yet to unpack it, rising."""

    def __init__(self, key: str, span: Span, version: int, device: torch.device) -> None:
        self.key = key
        self.span = span
        self.version = version
        self.device = device
        self.uses: list[int] = []

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.span.high - self.span.low

    @property
    def next_use(self) -> int:
        """The place at which a backward needs it next; -1 for none."""
        return self.uses[-1] if self.uses else -1


class Handle:
    """What autograd keeps instead of a tensor: a view of saved memory."""

    def __init__(self, saved: Saved, place: int, tensor: Tensor) -> None:
        self.saved = saved
        self.place = place
        self._dtype = tensor.dtype
        self._shape = tensor.shape
        self._stride = tensor.stride()
        self._low = int(tensor.storage_offset()) * tensor.itemsize

    def view_of(self, storage: torch.UntypedStorage, first: int) -> Tensor:
        """The tensor, in `storage`, which begins with byte `first` of the original's."""
        empty = torch.empty(0, dtype=self._dtype, device=storage.device)
        offset = (self._low - first) // self._dtype.itemsize
        return empty.set_(storage, offset, self._shape, self._stride)


class Known:
    """Finds what was saved of a storage that still lives."""

    def __init__(self) -> None:
        self._by_storage: dict[StorageWeakRef, list[weakref.ref[Saved]]] = {}

    def find(self, storage: StorageWeakRef, span: Span, version: int) -> Saved | None:
        """What was saved of it, at this version, around `span`."""
        for each in self._by_storage.get(storage, ()):
            saved = each()
            if saved is not None and saved.version == version and saved.span.holds(span):
                return saved
        return None

    def add(self, storage: StorageWeakRef, saved: Saved) -> None:
        """Remember. The weak reference keeps the storage's address from being used again."""
        self._by_storage.setdefault(storage, []).append(weakref.ref(saved))

    def forget(self, storage: StorageWeakRef) -> None:
        """Strike what died of a storage."""
        living = [each for each in self._by_storage.get(storage, ()) if each() is not None]
        if living:
            self._by_storage[storage] = living
        else:
            self._by_storage.pop(storage, None)


class Places:
    """The saves that live, in the order of the forward."""

    def __init__(self) -> None:
        self._next = 0
        self._order: list[int] = []
        self._saved: dict[int, weakref.ref[Saved]] = {}

    def add(self, saved: Saved) -> int:
        """The place of a new save."""
        place, self._next = self._next, self._next + 1
        self._order.append(place)
        self._saved[place] = weakref.ref(saved)
        saved.uses.append(place)
        return place

    def remove(self, place: int) -> None:
        """Strike a save whose graph is gone."""
        del self._order[bisect.bisect_left(self._order, place)]
        saved = self._saved.pop(place)()
        if saved is not None and place in saved.uses:
            saved.uses.remove(place)

    def before(self, place: int) -> Iterator[Saved]:
        """What a backward needs after `place`, next first."""
        for index in range(bisect.bisect_left(self._order, place) - 1, -1, -1):
            saved = self._saved[self._order[index]]()
            if saved is not None:
                yield saved


class Returned(NamedTuple):
    """Memory that is back, or on its way."""

    saved: weakref.ref[Saved]
    memory: Tensor
    ticket: Ticket


class Window:
    """What is back before its use, at most `limit_bytes` of it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._by_key: dict[str, Returned] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def has_room(self, nbytes: int) -> bool:
        """Whether that much more may come."""
        return self._num_bytes + nbytes <= self._limit_bytes

    def put(self, returned: Returned) -> None:
        """Keep it, in place of what is needed later; drop it where all is needed sooner."""
        saved = returned.saved()
        if saved is None or saved.nbytes > self._limit_bytes:
            return
        while not self.has_room(saved.nbytes):
            key = min(self._by_key, key=self._next_use)
            if self._next_use(key) >= saved.next_use:
                return
            self.take(key)
        self._by_key[saved.key] = returned
        self._num_bytes += returned.memory.nbytes

    def take(self, key: str) -> Returned | None:
        """Let go of it."""
        returned = self._by_key.pop(key, None)
        if returned is not None:
            self._num_bytes -= returned.memory.nbytes
        return returned

    def _next_use(self, key: str) -> int:
        saved = self._by_key[key].saved()
        return -1 if saved is None else saved.next_use
