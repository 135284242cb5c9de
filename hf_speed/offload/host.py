"""The host tier: CPU memory, page-locked where a GPU computes.

Each row is a mapping of its own, so that a freed row goes back to the system, and a row takes no
memory before it is written. Page-locking is done in place: torch's own page-locked memory comes in
powers of two, which would waste up to half of the host.
"""

import weakref

import torch
from torch import Tensor

from hf_speed.errors import OffloadError
from hf_speed.offload.memory import MemoryStore
from hf_speed.offload.pinned import Pins
from hf_speed.offload.store import in_words
from hf_speed.ops.aio import aligned_empty


class HostStore(MemoryStore):
    """Rows in CPU memory.

    Args:
        pin: lock the pages, so that a GPU copies from and to them beside its work.
        reuse: keep freed memory for the next row of the same size. For rows that come and go; it
            never makes the peak higher.
    """

    def __init__(self, *, pin: bool = False, reuse: bool = False) -> None:
        super().__init__("host", torch.device("cpu"))
        self._pins = Pins() if pin else None
        self._reuse = reuse
        self._kept: dict[int, list[Tensor]] = {}
        self._kept_bytes = 0
        if self._pins is not None:
            weakref.finalize(self, self._pins.clear)

    def close(self) -> None:
        """Forget all rows, after what is in flight."""
        with self._lock:
            super().close()
            self._shrink(to=0)

    def _make(self, key: str, numel: int, dtype: torch.dtype, *, zeros: bool) -> Tensor:
        nbytes = numel * dtype.itemsize
        kept = self._kept.get(nbytes)
        if kept:
            memory = kept.pop()
            self._kept_bytes -= nbytes
            if zeros:
                memory.zero_()
        else:
            self._shrink(to=self.peak_bytes - self.num_bytes - nbytes)
            memory = self._map(key, nbytes)
        return memory.view(dtype)

    def _map(self, key: str, nbytes: int) -> Tensor:
        try:
            memory = aligned_empty(nbytes, torch.uint8)  # a fresh mapping reads as zeros
            if self._pins is not None:
                self._pins.add(memory)
        except (OSError, MemoryError, RuntimeError) as error:
            raise OffloadError(
                f"the host tier is full: {key!r} needs {in_words(nbytes)}, beside "
                f"{in_words(self.num_bytes)} of other rows ({error}). Move a kind of state to "
                f"disk, as in offload.optimizer='disk', or raise the limit of locked memory."
            ) from error
        return memory

    def _drop(self, memory: Tensor) -> None:
        raw = memory.view(torch.uint8)
        if self._reuse and raw.nbytes:
            self._kept.setdefault(raw.nbytes, []).append(raw)
            self._kept_bytes += raw.nbytes
        else:
            self._unmap(raw)

    def _shrink(self, *, to: int) -> None:
        """Give kept memory back until at most `to` bytes are left, the oldest size first."""
        while self._kept_bytes > max(to, 0):
            nbytes, kept = next(iter(self._kept.items()))
            if kept:
                self._unmap(kept.pop())
                self._kept_bytes -= nbytes
            if not kept:
                del self._kept[nbytes]

    def _unmap(self, raw: Tensor) -> None:
        # The mapping ends with its last tensor. Someone may still look into it, unlocked.
        if self._pins is not None:
            self._pins.remove(raw)
