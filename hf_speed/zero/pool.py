"""Flat buffers for units in flight, used again and again.

Allocating and freeing them through the operating system costs a page fault per 4 KiB on a CPU.
A buffer that someone still looks into (a view that escaped from a unit's forward) is not used
again: the view keeps its memory, and its values stay right.
"""

from collections import defaultdict

import torch
from torch import Tensor

from hf_speed.ops.aio import aligned_empty

_LARGE_BYTES = 1 << 20
"""From here on the pages that alignment wastes do not count."""


class BufferPool:
    """Hands out uninitialised flat buffers of exact sizes and takes them back.

    Args:
        device: of the buffers.
        aligned: large ones in host memory begin on whole pages, which a disk reads into directly.
    """

    def __init__(self, device: torch.device, *, aligned: bool = False) -> None:
        self.device = device
        self._aligned = aligned and device.type == "cpu"
        self.bytes_allocated = 0
        self.peak_bytes = 0
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) of `dtype`, contents undefined."""
        free = self._free[dtype, numel]
        if free:
            return free.pop()
        buffer = self._make(numel, dtype)
        self.bytes_allocated += buffer.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes_allocated)
        return buffer

    def _make(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._aligned and numel * dtype.itemsize >= _LARGE_BYTES:
            return aligned_empty(numel, dtype)
        return torch.empty(numel, dtype=dtype, device=self.device)

    def give(self, buffer: Tensor) -> None:
        """Return a buffer. The caller keeps no reference but the one it passes."""
        if _is_shared(buffer):
            self.bytes_allocated -= buffer.nbytes
            return
        self._free[buffer.dtype, buffer.numel()].append(buffer)

    def clear(self) -> None:
        """Free every buffer that is not in use."""
        for buffers in self._free.values():
            self.bytes_allocated -= sum(buffer.nbytes for buffer in buffers)
        self._free.clear()


def _is_shared(buffer: Tensor) -> bool:
    # torch has no public count of the tensors over a storage. Two: `buffer` and the handle here.
    storage = buffer.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2
