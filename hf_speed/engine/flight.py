"""Buffers that gradients pass through on their way: how many of each size there are at once.

The events of a backward, in order, on a pool that uses a buffer again for equal sizes:

    fill     a unit's gradients arrive: a send buffer for each of its groups
    launch   a group is sent: what was summed before is added and let go, another buffer receives
    settle   the oldest of MAX_IN_FLIGHT sums has arrived: it goes on to its tier, perhaps

as `zero.reduce` and `zero.gradients` have them.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from hf_speed.zero.gradients import MAX_COMMITS
from hf_speed.zero.reduce import MAX_IN_FLIGHT


class Buffer(NamedTuple):
    """A size that the pool keeps buffers of."""

    numel: int
    itemsize: int


class Passing(NamedTuple):
    """The buffers of one group; None for those that it does not need.

    Attributes:
        sent: of gradients on their way out, and of what comes back.
        summed: a sum of earlier backwards, there from the beginning until it is sent.
        leaving: of the reduced sum on its way to its tier.
        gathered: values that are there from the beginning until the backward has passed.
    """

    sent: Buffer | None = None
    summed: Buffer | None = None
    leaving: Buffer | None = None
    gathered: Buffer | None = None


def most_alive(
    blocks: Sequence[Sequence[Passing]], root: Sequence[Passing], *, fills: bool
) -> Counter[Buffer]:
    """The most buffers of each size.

    Args:
        blocks: the groups of each unit, in the order of the backward.
        root: those of the root unit: filled first (the head), sent last (the embedding).
        fills: gradients arrive while others are under way. False: there are only sums to send.
    """
    walk = _Walk()
    units = [*blocks, root]
    for each in (each for unit in units for each in unit):
        walk.take(each.summed, each.gathered)
    if fills:
        walk.take(*(each.sent for each in root))
    passed: Sequence[Passing] = ()
    for unit in units:
        walk.give(*(each.gathered for each in passed))
        if fills and unit is not root:
            walk.take(*(each.sent for each in unit))
        for each in unit:
            walk.launch(each, fills=fills)
        passed = unit
    walk.finish()
    return walk.most


class _Walk:
    """Counts buffers from event to event."""

    def __init__(self) -> None:
        self.most: Counter[Buffer] = Counter()
        self._here: Counter[Buffer] = Counter()
        self._in_flight: deque[Passing] = deque()
        self._commits: deque[Buffer] = deque()

    def take(self, *sizes: Buffer | None) -> None:
        for size in sizes:
            if size is not None:
                self._here[size] += 1
                self.most[size] = max(self.most[size], self._here[size])

    def give(self, *sizes: Buffer | None) -> None:
        for size in sizes:
            if size is not None:
                self._here[size] -= 1

    def launch(self, group: Passing, *, fills: bool) -> None:
        if group.sent is None:
            return
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            self._settle()
        if not fills:
            self.take(group.sent)
        self.give(group.summed)
        self.take(group.sent)
        self._in_flight.append(group)

    def _settle(self) -> None:
        group = self._in_flight.popleft()
        if group.leaving is not None:
            self.take(group.leaving)
            self._commits.append(group.leaving)
            if len(self._commits) > MAX_COMMITS:
                self.give(self._commits.popleft())
        self.give(group.sent, group.sent)

    def finish(self) -> None:
        while self._in_flight:
            self._settle()
