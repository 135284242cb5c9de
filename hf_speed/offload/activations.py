"""Activations on another tier: what the forward saves leaves, and is back when the backward comes.

    offload = ActivationOffload(HostStore(reuse=True), min_bytes=1 << 20)
    with offload.hooks():
        loss = model(batch).loss        # pack: each saved tensor is on its way out
    loss.backward()                     # unpack: back in reverse order, the next ones in flight

What comes back has the strides of what left, so the backward computes the same, to the bit. Under
gradient checkpointing it is the inputs of the blocks that are saved, and hence move.

Source: activation checkpoints on CPU memory, ZeRO-Infinity, arXiv:2104.07857, section 5.1.3.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_speed.errors import OffloadError
from hf_speed.offload.saved import Handle, Known, Places, Returned, Saved, Span, Window, span_of
from hf_speed.offload.store import Store, Ticket
from hf_speed.ops.aio import aligned_empty

MIB = 1 << 20


class _Leaving(NamedTuple):
    """A commit in flight: `memory` must stay and must not change."""

    memory: Tensor
    tensor: Tensor
    version: int
    ticket: Ticket

    @property
    def changed(self) -> bool:
        """Whether someone wrote into it since."""
        return self.tensor._version != self.version


class _Death(NamedTuple):
    """Memory that no handle looks into any more, and the storage that it was of."""

    key: str
    source: StorageWeakRef


class ActivationOffload:
    """Saved tensors in a store.

    Args:
        store: a store that nobody else uses; `close` closes it.
        min_bytes: smaller tensors stay where they are.
        window_bytes: device memory that tensors on their way out may hold, and that tensors that
            are back before their use may hold.
        keeps: says of a tensor that it must stay, as parameters and views of them must: they are
            there anyway.
    """

    def __init__(
        self,
        store: Store,
        *,
        min_bytes: int,
        window_bytes: int = 256 * MIB,
        keeps: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self._store = store
        self._min_bytes = max(min_bytes, 1)
        self._window_bytes = window_bytes
        self._keeps = keeps
        self._known = Known()
        self._places = Places()
        self._window = Window(window_bytes)
        self._leaving: dict[str, _Leaving] = {}
        self._leaving_bytes = 0
        self._torn: set[str] = set()
        self._num_keys = 0
        # Graphs die at any moment, also within a call here: that is noted, and seen to later.
        self._ended: deque[int | _Death] = deque()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes in the store now."""
        return self._store.num_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that there ever were."""
        return self._store.peak_bytes

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which what autograd saves is offloaded."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | Handle:
        """Autograd saves a tensor: what to keep in its place.

        Raises:
            OffloadError: the tier is full, or an earlier tensor could not be written.
        """
        if not self._moves(tensor):
            return tensor
        try:
            with self._lock, torch.no_grad():
                self._see_to_ends()
                self._retire()
                storage = tensor.untyped_storage()
                source, span = StorageWeakRef(storage), span_of(tensor)
                saved = self._known.find(source, span, tensor._version)
                if saved is None:
                    if 2 * (span.high - span.low) >= storage.nbytes():
                        span = Span(0, storage.nbytes())  # other views of it will be saved too
                    saved = self._send(tensor, storage, span)
                    self._known.add(source, saved)
                    self._watch(saved, _Death(saved.key, source))
                handle = Handle(saved, self._places.add(saved), tensor)
                self._watch(handle, handle.place)
                return handle
        finally:
            self._sweep()

    def unpack(self, packed: Tensor | Handle) -> Tensor:
        """Autograd needs it again.

        Raises:
            OffloadError: it could not be written or read, or was changed while it was written.
        """
        if isinstance(packed, Tensor):
            return packed
        try:
            with self._lock, torch.no_grad():
                self._see_to_ends()
                self._retire()
                saved = packed.saved
                if packed.place in saved.uses:
                    saved.uses.remove(packed.place)
                leaving = self._leaving.get(saved.key)
                if saved.key in self._torn or (leaving is not None and leaving.changed):
                    raise OffloadError(
                        "a tensor that autograd saved was changed in place before its backward. "
                        "Change a copy of it, or set offload.activations='device' to have "
                        "PyTorch name the operation."
                    )
                if leaving is not None:  # it never left
                    tensor = packed.view_of(leaving.memory.untyped_storage(), 0)
                else:
                    memory = self._bring_back(saved)
                    tensor = packed.view_of(memory.untyped_storage(), saved.span.low)
                self._bring_ahead(packed.place)
                return tensor
        finally:
            self._sweep()

    def close(self) -> None:
        """Drop what is saved and close the store. Graphs that hold handles have lost them."""
        with self._lock:
            self._closed = True
            try:
                self._store.close()
            finally:
                self._leaving.clear()
                self._window = Window(0)

    def _moves(self, tensor: Tensor) -> bool:
        """Whether a tensor is large, plain, and nobody's parameter."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or self._closed:
            return False
        if _is_parameter(tensor):
            return False
        if tensor.is_meta or tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
            return False
        if tensor.numel() * tensor.itemsize < self._min_bytes:
            return False
        span = span_of(tensor)  # an expanded tensor is less than it looks
        if span.high - span.low < self._min_bytes:
            return False
        return self._keeps is None or not self._keeps(tensor)

    def _send(self, tensor: Tensor, storage: torch.UntypedStorage, span: Span) -> Saved:
        key = f"saved{self._num_keys}"
        self._num_keys += 1
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory.set_(storage, span.low, (span.high - span.low,), (1,))
        self._store.allocate(key, memory.numel(), torch.uint8, zeros=False)
        ticket = self._store.commit(key, memory)
        if not ticket.done():
            # Detached it counts the same versions, and does not keep the graph alive.
            alias = tensor.detach()
            self._leaving[key] = _Leaving(memory, alias, alias._version, ticket)
            self._leaving_bytes += memory.nbytes
        return Saved(key, span, tensor._version, tensor.device)

    def _retire(self) -> None:
        """Let go of what has left; wait where too much is on its way."""
        for key, leaving in list(self._leaving.items()):
            if leaving.ticket.done() or self._leaving_bytes > self._window_bytes:
                del self._leaving[key]
                self._leaving_bytes -= leaving.memory.nbytes
                leaving.ticket.wait()
                if leaving.changed:
                    self._torn.add(key)

    def _bring_back(self, saved: Saved) -> Tensor:
        returned = self._window.take(saved.key) or self._fetch(saved)
        returned.ticket.wait()
        if saved.uses:
            self._window.put(returned)
        return returned.memory

    def _bring_ahead(self, place: int) -> None:
        for saved in self._places.before(place):
            if saved.key in self._window or saved.key in self._leaving:
                continue
            if not self._window.has_room(saved.nbytes):
                return
            self._window.put(self._fetch(saved))

    def _fetch(self, saved: Saved) -> Returned:
        if saved.device.type == "cpu":
            memory = aligned_empty(saved.nbytes, torch.uint8)
        else:
            memory = torch.empty(saved.nbytes, dtype=torch.uint8, device=saved.device)
        return Returned(weakref.ref(saved), memory, self._store.fetch(saved.key, memory))

    def note(self, end: int | _Death) -> None:
        """A handle (its place) or saved memory is gone."""
        self._ended.append(end)
        self._sweep()

    def _watch(self, thing: Handle | Saved, end: int | _Death) -> None:
        finalizer = weakref.finalize(thing, _tell, weakref.ref(self), end)
        finalizer.atexit = False  # pyrefly: ignore - typeshed has it in no slot

    def _see_to_ends(self) -> None:
        while self._ended:
            end = self._ended.popleft()
            if isinstance(end, int):
                self._places.remove(end)
            elif not self._closed:
                self._known.forget(end.source)
                self._window.take(end.key)
                self._torn.discard(end.key)
                self._store.free(end.key)
                leaving = self._leaving.pop(end.key, None)
                if leaving is not None:
                    self._leaving_bytes -= leaving.memory.nbytes

    def _sweep(self) -> None:
        """See to ends unless someone is within a call, who does so on leaving it."""
        while self._ended and self._lock.acquire(blocking=False):
            try:
                self._see_to_ends()
            finally:
                self._lock.release()


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is, or looks into, a tensor that is there anyway."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def _tell(owner: weakref.ref[ActivationOffload], end: int | _Death) -> None:
    """Called as autograd lets go of something: at any moment, on any thread, within any call."""
    offload = owner()
    if offload is not None:
        offload.note(end)
