"""Where the rows of a disk store lie in its file, and which of their bytes were ever written. Pure.

A row is one region, so that it is read with few large requests; freed regions are used again, and
neighbours join. What was never written reads as zeros without a read, so neither a new row nor one
that takes over an old region costs any I/O.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from hf_speed.ops.aio import PAGE_BYTES


class Region(NamedTuple):
    """Bytes [start, stop) of the file, whole pages."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.stop - self.start


def page_floor(nbytes: int) -> int:
    """The last page boundary at or before."""
    return nbytes // PAGE_BYTES * PAGE_BYTES


def page_ceil(nbytes: int) -> int:
    """The first page boundary at or after."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Regions:
    """Divides a file that can grow at its end.

    Attributes:
        end: bytes of the file that regions, used or free, take.
    """

    def __init__(self) -> None:
        self.end = 0
        self._free: list[Region] = []

    def place(self, nbytes: int) -> Region:
        """Where `nbytes` would go: the smallest free region that holds them, else the end."""
        size = page_ceil(nbytes)
        fitting = [region for region in self._free if region.nbytes >= size]
        if fitting:
            start = min(fitting, key=lambda region: (region.nbytes, region.start)).start
        elif self._free and self._free[-1].stop == self.end:
            start = self._free[-1].start
        else:
            start = self.end
        return Region(start, start + size)

    def take(self, region: Region) -> None:
        """Use a region that `place` gave; the file reaches its end by now."""
        self.end = max(self.end, region.stop)
        if not region.nbytes:
            return
        index = bisect.bisect_left(self._free, (region.start,))
        if index < len(self._free) and self._free[index].start == region.start:
            old = self._free.pop(index)
            if old.stop > region.stop:
                self._free.insert(index, Region(region.stop, old.stop))

    def give(self, region: Region) -> None:
        """Free a region."""
        if not region.nbytes:
            return
        index = bisect.bisect_left(self._free, region)
        start, stop = region
        if index < len(self._free) and self._free[index].start == stop:
            stop = self._free.pop(index).stop
        if index and self._free[index - 1].stop == start:
            start = self._free.pop(index - 1).start
            index -= 1
        self._free.insert(index, Region(start, stop))


class Written:
    """A set of bytes of one row, as few intervals."""

    def __init__(self) -> None:
        self._edges: list[int] = []  # start, stop, start, stop, ... rising

    def copy(self) -> "Written":
        """The set as it is now."""
        other = Written()
        other._edges = list(self._edges)
        return other

    def add(self, start: int, stop: int) -> None:
        """Put [start, stop) in."""
        low = bisect.bisect_left(self._edges, start)
        high = bisect.bisect_right(self._edges, stop)
        # An odd place is inside an interval: its edge goes, and the interval goes on.
        first = [start] if low % 2 == 0 else []
        last = [stop] if high % 2 == 0 else []
        self._edges[low:high] = [*first, *last]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """[start, stop) cut at the edges: (from, to, whether written)."""
        place = bisect.bisect_right(self._edges, start)
        while start < stop:
            edge = self._edges[place] if place < len(self._edges) else stop
            yield start, min(edge, stop), place % 2 == 1
            start, place = edge, place + 1
