"""What was sent, in which order, by whom.

Always on: bytes sent by this rank, by operation. In debug mode (`debug.journal`) a run whose ranks
take different paths stops with the ranks, the operations and the callers instead of hanging:

    note     before a collective starts: write down what it is, where the other ranks of the group
             can read it; if one of them has written something else, raise and do not start it
    check    before it is waited for: wait for what all the others have written, compare

Writing waits for nobody, since ranks may legally start a gather and a reduction in another order:
those go over different groups. The notes go through the store that the ranks met in.
"""

import json
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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
    """Where the ranks of one group read each other's notes. `ranks` are those of the world."""

    store: dist.Store
    ranks: list[int]
    timeout: timedelta


class Journal:
    """Counts the bytes of collectives and, when enabled, checks that ranks agree on their order.

    Args:
        enabled: debug mode.
        num_kept: notes of each rank that stay readable; more than ranks can be apart.
    """

    def __init__(self, *, enabled: bool, num_kept: int = 1000) -> None:
        self.enabled = enabled
        self._num_kept = num_kept
        self.bytes_sent: Counter[str] = Counter()
        self._sequence: Counter[str] = Counter()
        self._watches: dict[str, Watch] = {}

    @property
    def total_bytes_sent(self) -> int:
        """Bytes that this rank has sent to other ranks since it was made."""
        return sum(self.bytes_sent.values())

    def count(self, operation: str, sent: int) -> None:
        """Count bytes of a message between two ranks, about which the others know nothing."""
        self.bytes_sent[operation] += sent

    def watch(self, group: AxisGroup, ranks: list[int], *, timeout: timedelta) -> None:
        """In debug mode, follow a new group. Not a collective."""
        if not self.enabled or group.group is None:
            return
        # torch has no public name for the store that a process group was made with.
        store = dist.distributed_c10d._get_default_store()
        own = dist.PrefixStore(f"hf_speed/journal/{group.group.group_name}", store)
        self._watches[group.label] = Watch(own, list(ranks), timeout)

    def note(
        self, operation: str, group: AxisGroup, *, num_bytes: int, sent: int
    ) -> Callable[[], None]:
        """Record a collective that is about to start. Waits for nobody.

        Args:
            operation: its name, for example "all_gather".
            group: the ranks that take part.
            num_bytes: size of the buffer, which all ranks must agree on.
            sent: bytes that this rank will send to others.

        Returns:
            What to call before waiting for the collective: in debug mode it blocks until every rank
            has come to it, and raises DivergenceError as this does.

        Raises:
            DivergenceError: debug mode, and another rank is about to do something else, or (when
                called before waiting) does not come within the timeout.
        """
        self.bytes_sent[operation] += sent
        return self._write_down(operation, group, num_bytes=num_bytes)

    def expect_same_batch(self, inputs: Mapping[str, object], *, group: AxisGroup) -> None:
        """In debug mode, check that ranks that share the work of a batch have the same one.

        Args:
            inputs: of the model: tensors are compared by their bytes, other values not at all.
            group: the ranks. Blocks until all have come.

        Raises:
            DivergenceError: they have not, or some rank does not come within the timeout.
        """
        if self._watches.get(group.label) is not None:
            tensors = {k: v for k, v in sorted(inputs.items()) if isinstance(v, Tensor)}
            said = ", ".join(f"{name}={_describe_tensor(v)}" for name, v in tensors.items())
            num_bytes = sum(value.nbytes for value in tensors.values())
            self._write_down(f"model({said})", group, num_bytes=num_bytes)()

    def _write_down(
        self, operation: str, group: AxisGroup, *, num_bytes: int
    ) -> Callable[[], None]:
        """See `note`."""
        watch = self._watches.get(group.label)
        if watch is None:
            return _nothing
        self._sequence[group.label] += 1
        record = Record(self._sequence[group.label], operation, num_bytes, _caller())
        watch.store.set(_key(record.sequence, watch.ranks[group.rank]), json.dumps(record))
        if record.sequence > self._num_kept:
            old = record.sequence - self._num_kept
            watch.store.delete_key(_key(old, watch.ranks[group.rank]))
        # Of two ranks that write and then look at least one sees the other.
        _compare(record, watch, group.label, _notes(record, watch))
        return lambda: _check(record, watch, group.label)

    def close(self) -> None:
        """Follow no group any more. Not a collective."""
        self._watches.clear()


def _nothing() -> None:
    """The check where nothing is checked."""


def _describe_tensor(value: Tensor) -> str:
    """Its shape and a checksum of its bytes."""
    flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{tuple(value.shape)}:{zlib.crc32(flat.numpy().data):08x}"


def _key(sequence: int, rank: int) -> str:
    return f"{sequence}/{rank}"


def _notes(record: Record, watch: Watch) -> dict[int, Record]:
    """What each rank has written about this place in the order, of those that have."""
    keys = {rank: _key(record.sequence, rank) for rank in watch.ranks}
    return {
        rank: Record(*json.loads(watch.store.get(key)))
        for rank, key in keys.items()
        if watch.store.check([key])
    }


def _check(record: Record, watch: Watch, label: str) -> None:
    keys = [_key(record.sequence, rank) for rank in watch.ranks]
    try:
        watch.store.wait(keys, watch.timeout)
    except RuntimeError as error:
        absent = sorted(set(watch.ranks) - _notes(record, watch).keys())
        raise DivergenceError(
            f"Of the ranks {watch.ranks} of {label}, {absent} did not come to {_describe(record)} "
            f"within {watch.timeout.total_seconds():g} s (debug.timeout_s): they died or run other "
            f"modules. Every rank must run the same modules in the same order."
        ) from error
    _compare(record, watch, label, _notes(record, watch))


def _compare(record: Record, watch: Watch, label: str, notes: dict[int, Record]) -> None:
    if any(each[:3] != record[:3] for each in notes.values()):
        lines = "\n".join(f"  rank {rank}: {_describe(each)}" for rank, each in notes.items())
        raise DivergenceError(
            f"Ranks {watch.ranks} of {label} are about to run different collectives:\n{lines}\n"
            f"Every rank must run the same modules in the same order."
        )


def _describe(record: Record) -> str:
    return f"{record.operation} #{record.sequence} of {record.num_bytes} bytes at {record.caller}"


def _caller() -> str:
    """The innermost frame outside this package: the line a user can change."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_PACKAGE) and "/torch/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "unknown"
