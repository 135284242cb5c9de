"""What was sent, in which order, by whom.

Always on: bytes sent by this rank, by operation. In debug mode (`debug.journal`): before each
collective all ranks of the group compare what they are about to do over a group of their own, so
that a run whose ranks take different paths stops with the rank, the operation and the caller
instead of hanging.
"""

import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from hf_speed.errors import DivergenceError
from hf_speed.mesh.axes import AxisGroup

_PACKAGE = str(Path(__file__).resolve().parent.parent)


class Record(NamedTuple):
    """One collective as one rank is about to start it."""

    sequence: int
    operation: str
    num_bytes: int
    caller: str


class Watch(NamedTuple):
    """The side channel on which the ranks of one group compare notes."""

    group: dist.ProcessGroup
    ranks: list[int]
    timeout: timedelta


class Journal:
    """Counts the bytes of collectives and, when enabled, checks that ranks agree on their order."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.bytes_sent: Counter[str] = Counter()
        self._sequence: Counter[str] = Counter()
        self._watches: dict[str, Watch] = {}

    @property
    def total_bytes_sent(self) -> int:
        """Bytes that this rank has sent to other ranks since it was made."""
        return sum(self.bytes_sent.values())

    def watch(self, group: AxisGroup, ranks: list[int], *, timeout: timedelta) -> None:
        """Open the side channel of a new group. Collective over the world in debug mode."""
        if not self.enabled or group.is_identity:
            return
        # Every rank takes part in every new_group call; peers learn each other's ranks first.
        everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, ranks)
        for members in sorted({tuple(each) for each in everyone}):
            side = dist.new_group(list(members), timeout=timeout, backend="gloo")
            if isinstance(side, dist.ProcessGroup) and dist.get_rank() in members:
                self._watches[group.label] = Watch(side, list(members), timeout)

    def note(self, operation: str, group: AxisGroup, *, num_bytes: int, sent: int) -> None:
        """Record a collective that is about to start.

        Args:
            operation: its name, for example "all_gather".
            group: the ranks that take part.
            num_bytes: size of the buffer, which all ranks must agree on.
            sent: bytes that this rank will send to others.

        Raises:
            DivergenceError: debug mode, and a rank of the group is about to do something else or
                does not arrive within the timeout.
        """
        self.bytes_sent[operation] += sent
        watch = self._watches.get(group.label)
        if watch is None:
            return
        self._sequence[group.label] += 1
        record = Record(self._sequence[group.label], operation, num_bytes, _caller())
        try:
            dist.monitored_barrier(watch.group, timeout=watch.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise DivergenceError(
                f"Not every rank of {group.label} {watch.ranks} came to {_describe(record)}: "
                f"{error}. "
                f"Every rank must run the same modules in the same order."
            ) from error
        everyone: list[Record | None] = [None] * group.size
        dist.all_gather_object(everyone, tuple(record), group=watch.group)
        records = [Record(*each) for each in everyone if each is not None]
        if len({each[:3] for each in records}) > 1:
            lines = "\n".join(
                f"  rank {rank}: {_describe(each)}"
                for rank, each in zip(watch.ranks, records, strict=True)
            )
            raise DivergenceError(
                f"Ranks of {group.label} are about to run different collectives:\n{lines}\n"
                f"Every rank must run the same modules in the same order."
            )

    def close(self) -> None:
        """Destroy the side channels. Not a collective."""
        for watch in self._watches.values():
            dist.destroy_process_group(watch.group)
        self._watches.clear()


def _describe(record: Record) -> str:
    return f"{record.operation} #{record.sequence} of {record.num_bytes} bytes at {record.caller}"


def _caller() -> str:
    """The innermost frame outside this package: the line a user can change."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_PACKAGE) and "/torch/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "unknown"
