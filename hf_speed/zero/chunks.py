"""A walk over flat buffers on any tier in pieces of a fixed size: fetch, work, commit.

    chunk k+1   its fetches are under way
    chunk k     is worked on, in staging buffers or, where a tier can be addressed, in place
    chunk k-1   its commits are under way

So the memory of a walk is the staging buffers, whose number and size are chosen in advance, however
large the buffers are that are walked over.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.errors import ConfigError, HfSpeedError
from hf_speed.offload import StagingPool, Ticket
from hf_speed.zero.cells import Cell

NUM_STAGES = 3
"""Chunks at once: one fetched, one worked on, one committed."""
_BUFFER_GRAIN = 1 << 15
GRAIN_NUMEL = 4096
"""Chunks start at multiples of this many elements: a page of bytes, and whole quantised blocks."""


class Operand(NamedTuple):
    """One buffer of a walk.

    Attributes:
        cell: where it lives.
        reads: its old values are needed.
        writes: new values are to be kept.
        apart: where new values go instead of over the old ones.
        block: elements of the walk for each element of this buffer.
    """

    cell: Cell
    reads: bool
    writes: bool
    apart: Cell | None = None
    block: int = 1


class Job(NamedTuple):
    """A chunk of some buffers of equal extent, and what is done with it."""

    operands: Mapping[str, Operand]
    start: int
    numel: int
    work: Callable[[Mapping[str, Tensor]], None]


class Walk:
    """Runs jobs in order, fetching one ahead and committing behind.

    Args:
        staging_bytes: of all staging buffers together.
        device: where the work is done.
        pin: page-lock the buffers, for copies to and from a GPU.
    """

    def __init__(self, *, staging_bytes: int, device: torch.device, pin: bool) -> None:
        self.device = device
        self._stage_bytes = staging_bytes // NUM_STAGES // _BUFFER_GRAIN * _BUFFER_GRAIN
        self._pin = pin
        self._pool: StagingPool | None = None
        self._free: list[Tensor] | None = None
        self.num_bytes = 0
        """Bytes of the staging buffers, once any was needed."""

    def cut(self, operands: Sequence[Operand], first: int, last: int) -> Iterator[tuple[int, int]]:
        """(start, numel) of the chunks between two elements of the buffers, as staging allows.

        Raises:
            ConfigError: a chunk of the smallest size does not fit.
        """
        per_element = sum(
            each.cell.dtype.itemsize / each.block for each in operands if not self._is_here(each)
        )
        if per_element == 0:
            if first < last:
                yield first, last - first
            return
        room = self._stage_bytes - GRAIN_NUMEL * len(operands)
        chunk = int(room / per_element) // GRAIN_NUMEL * GRAIN_NUMEL
        if chunk <= 0:
            raise ConfigError(
                f"offload.staging_bytes={NUM_STAGES * self._stage_bytes} is too small for a chunk "
                f"of {GRAIN_NUMEL} elements of {len(operands)} buffers. Raise it."
            )
        for start in range(first, last, chunk):
            yield start, min(chunk, last - start)

    def run(self, jobs: Sequence[Job]) -> None:
        """Do all jobs; returns when everything is committed.

        Raises:
            OffloadError: a tier failed.
        """
        committing: deque[_Stage] = deque()
        ready: deque[_Stage] = deque()
        try:
            for job in jobs:
                ready.append(self._begin(job, committing))
                if len(ready) > 1:
                    self._work(ready.popleft(), committing)
            while ready:
                self._work(ready.popleft(), committing)
            while committing:
                self._finish(committing.popleft())
        except BaseException:
            for stage in (*ready, *committing):
                with suppress(HfSpeedError):
                    self._finish(stage)
            # Buffers that a failed stage still held are lost: all are made anew.
            self._free = None
            raise

    def _is_here(self, operand: Operand) -> bool:
        return operand.apart is None and operand.cell.device == self.device

    def _begin(self, job: Job, committing: "deque[_Stage]") -> "_Stage":
        staged = [name for name, each in job.operands.items() if not self._is_here(each)]
        buffer = self._take(committing) if staged else None
        values: dict[str, Tensor] = {}
        tickets: list[Ticket] = []
        place = 0
        for name, operand in job.operands.items():
            start, numel = job.start // operand.block, -(-job.numel // operand.block)
            if buffer is None or name not in staged:
                view = operand.cell.view()
                if view is not None:
                    values[name] = view[start : start + numel]
                continue
            num_bytes = numel * operand.cell.dtype.itemsize
            values[name] = buffer[place : place + num_bytes].view(operand.cell.dtype)
            place += -(-num_bytes // GRAIN_NUMEL) * GRAIN_NUMEL
            if operand.reads:
                tickets.append(operand.cell.fetch(values[name], start))
        return _Stage(job, buffer, values, tuple(staged), tickets)

    def _work(self, stage: "_Stage", committing: "deque[_Stage]") -> None:
        for ticket in stage.tickets:
            ticket.wait()
        stage.job.work(stage.values)
        commits = []
        for name in stage.staged:
            operand = stage.job.operands[name]
            if operand.writes:
                start = stage.job.start // operand.block
                target = operand.cell if operand.apart is None else operand.apart
                commits.append(target.commit(stage.values[name], start))
        if stage.buffer is not None:
            committing.append(stage._replace(tickets=commits))

    def _take(self, committing: "deque[_Stage]") -> Tensor:
        if self._free is None:
            self._free = self._make()
        while not self._free:
            self._finish(committing.popleft())
        return self._free.pop()

    def _make(self) -> list[Tensor]:
        """The staging buffers; on the host page-aligned: a disk reads into them directly."""
        self.num_bytes = NUM_STAGES * self._stage_bytes
        if self.device.type != "cpu":
            return list(
                torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device).split(
                    self._stage_bytes
                )
            )
        self._pool = StagingPool(self.num_bytes, num_buffers=NUM_STAGES, pin=self._pin)
        return [self._pool.take() for _ in range(NUM_STAGES)]

    def _finish(self, stage: "_Stage") -> None:
        for ticket in stage.tickets:
            ticket.wait()
        if stage.buffer is not None and self._free is not None:
            self._free.append(stage.buffer)


class _Stage(NamedTuple):
    """A job under way."""

    job: Job
    buffer: Tensor | None
    values: Mapping[str, Tensor]
    staged: tuple[str, ...]
    tickets: Sequence[Ticket]
