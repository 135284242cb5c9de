"""A fixed number of equal host buffers: what passes through the host takes no more than these.

The peak is a constant that is chosen in advance. Whoever finds no buffer free waits for one.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_speed.errors import ConfigError, OffloadError
from hf_speed.offload.pinned import Pins
from hf_speed.ops.aio import aligned_empty

GRAIN_BYTES = 8 * 4096
"""Buffers are multiples of this: 4096 elements of the widest dtype."""


class StagingPool:
    """Hands out buffers and takes them back. Threads may share it.

    Args:
        staging_bytes: of all buffers together; what does not divide evenly is not used.
        num_buffers: how many.
        pin: lock the pages for a GPU.
        timeout_s: how long a take waits. Everyone who holds a buffer waits for nothing but I/O, so
            a longer wait is a deadlock, and says so.

    Attributes:
        buffer_bytes: bytes of each buffer.
        num_buffers: how many there are.
        peak_bytes: bytes of all buffers, used or not.

    Raises:
        ConfigError: `staging_bytes` is too little for so many buffers.
    """

    def __init__(
        self,
        staging_bytes: int,
        *,
        num_buffers: int = 8,
        pin: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.num_buffers = num_buffers
        self.buffer_bytes = staging_bytes // max(num_buffers, 1) // GRAIN_BYTES * GRAIN_BYTES
        if num_buffers < 1 or self.buffer_bytes == 0:
            raise ConfigError(
                f"offload.staging_bytes={staging_bytes} is too little for {num_buffers} buffers of "
                f"at least {GRAIN_BYTES} bytes. Raise it."
            )
        self.peak_bytes = self.num_buffers * self.buffer_bytes
        self._timeout_s = timeout_s
        memory = aligned_empty(self.peak_bytes, torch.uint8)
        self._buffers = {each.data_ptr(): each for each in memory.split(self.buffer_bytes)}
        self._free = list(self._buffers)
        self._changed = threading.Condition()
        self._pins = Pins()
        if pin:
            self._pins.add(memory)
            weakref.finalize(self, self._pins.clear)

    @property
    def num_free(self) -> int:
        """Buffers that nobody holds."""
        return len(self._free)

    def take(self) -> Tensor:
        """(buffer_bytes,) uint8, page-aligned, contents undefined. Waits until one is free.

        Raises:
            OffloadError: none was given back for `timeout_s`, or the pool is closed.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while (buffer := self._pop()) is None:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise OffloadError(
                        f"all {self.num_buffers} staging buffers of {self.buffer_bytes} bytes were "
                        f"held for {self._timeout_s:g} s. Whoever takes several at once needs as "
                        f"many: raise offload.staging_bytes."
                    )
            return buffer

    def try_take(self) -> Tensor | None:
        """A buffer if one is free."""
        with self._changed:
            return self._pop()

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; nothing may be in flight on it.

        Raises:
            OffloadError: it is none of this pool's that is out.
        """
        address = buffer.data_ptr()
        with self._changed:
            if address not in self._buffers or address in self._free:
                raise OffloadError(
                    "a buffer was given to a StagingPool that had not lent it. Give back what "
                    "take() returned, once."
                )
            self._free.append(address)
            self._changed.notify()

    @contextmanager
    def borrow(self) -> Iterator[Tensor]:
        """`take` for a block."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give(buffer)

    def close(self) -> None:
        """Give the memory back to the system once the buffers that are out are dropped."""
        with self._changed:
            self._pins.clear()
            self._buffers.clear()
            self._free.clear()
            self._changed.notify_all()

    def _pop(self) -> Tensor | None:
        if not self._buffers:
            raise OffloadError("this StagingPool is closed. Make another one.")
        # The last one given is the likeliest to be in the cache.
        return self._buffers[self._free.pop()] if self._free else None
