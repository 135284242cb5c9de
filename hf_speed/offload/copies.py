"""Copies between host memory and a GPU, beside what the GPU computes.

Copies to and from the host each have a stream of their own, so both directions of the bus work at
once. On the CPU a copy is a copy, over when the call returns.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_speed.offload.store import DONE, Settled


class CudaCopy:
    """A copy on a side stream. Keeps its tensors alive until it is done."""

    def __init__(self, event: torch.cuda.Event, kept: tuple[Tensor, Tensor]) -> None:
        self.event = event
        self._kept: tuple[Tensor, Tensor] | None = kept
        self._device = kept[0].device

    def done(self) -> bool:
        """Whether the bytes have moved."""
        return self.event.query()

    def wait(self) -> None:
        """To a GPU: its current stream waits, not the CPU. To the host: the bytes are there."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self.event)
        else:
            self.settle()

    def settle(self) -> None:
        """Return when the bytes have moved."""
        self.event.synchronize()
        self._kept = None


def what_ran(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that a GPU's current stream was given so far; None on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Copies:
    """Issues copies, each after those that it must come after."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        *,
        after: Iterable[Settled] = (),
        ready: torch.cuda.Event | None = None,
    ) -> Settled:
        """Start `target.copy_(source)`; both hold the same number of elements.

        Args:
            target: where to.
            source: where from; page-locked memory where one side is a GPU, or the copy blocks.
            after: copies that this one must see the end of.
            ready: on a GPU, what must have run first; None: all that its current stream was given.
        """
        to_gpu, from_gpu = target.is_cuda, source.is_cuda
        if to_gpu == from_gpu:
            self._wait_here(after, target)
            target.copy_(source)
            return DONE
        device = target.device if to_gpu else source.device
        stream = self._stream(device, to_gpu=to_gpu)
        if ready is None:
            stream.wait_stream(torch.cuda.current_stream(device))
        else:
            stream.wait_event(ready)
        for earlier in after:
            if isinstance(earlier, CudaCopy):
                stream.wait_event(earlier.event)
            else:
                earlier.settle()
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        # The allocator must not hand the memory out again while the copy runs.
        (target if to_gpu else source).record_stream(stream)
        return CudaCopy(event, (target, source))

    def _wait_here(self, after: Iterable[Settled], target: Tensor) -> None:
        for earlier in after:
            if target.is_cuda and isinstance(earlier, CudaCopy):
                torch.cuda.current_stream(target.device).wait_event(earlier.event)
            else:
                earlier.settle()

    def _stream(self, device: torch.device, *, to_gpu: bool) -> torch.cuda.Stream:
        place = (device, to_gpu)
        if place not in self._streams:
            self._streams[place] = torch.cuda.Stream(device)
        return self._streams[place]
