"""From an interval of a flattened tensor to boxes of the tensor: pure arithmetic.

A rank owns an interval of each flattened parameter. What is stored and what another mesh asks for
are boxes (a range along every dim), which a file of N-d tensors can hold and slice.

    shape (3, 4), interval [2, 11)         . . a a        a = Box((0, 2), (1, 2))
                                           b b b b        b = Box((1, 0), (1, 4))
                                           c c c .        c = Box((2, 0), (1, 3))

Each box made here is one stretch of the flattened tensor, so its elements keep their order.
"""

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """A range along every dim: dim d covers [offsets[d], offsets[d] + extents[d])."""

    offsets: tuple[int, ...]
    extents: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return prod(self.extents)

    def slices(self, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
        """An index of this box in a tensor whose first element is at `origin` (default: zeros)."""
        origin = origin if origin is not None else (0,) * len(self.offsets)
        return tuple(
            slice(offset - first, offset - first + extent)
            for offset, extent, first in zip(self.offsets, self.extents, origin, strict=True)
        )


def boxes(shape: tuple[int, ...], start: int, numel: int) -> tuple[Box, ...]:
    """The boxes that cover [start, start + numel) of the flattened row-major tensor, in order.

    Walks from `start`, each time taking the outermost dim on which a whole slice begins here and
    still fits: outwards dim by dim, then inwards again. So there are at most 2 * ndim - 1 boxes
    (1 for 0-d), and none where numel is 0.

    Raises:
        ValueError: the interval is not within the tensor.
    """
    if start < 0 or numel < 0 or start + numel > prod(shape):
        raise ValueError(f"[{start}, {start + numel}) is not within a tensor of shape {shape}.")
    if numel == 0:
        return ()
    if not shape:
        return (Box((), ()),)
    steps = strides(shape)
    found = []
    here, stop = start, start + numel
    while here < stop:
        dim = next(d for d, step in enumerate(steps) if here % step == 0 and stop - here >= step)
        index = here // steps[dim] % shape[dim]
        extent = min(shape[dim] - index, (stop - here) // steps[dim])
        outer = tuple(here // steps[d] % shape[d] for d in range(dim))
        inner = len(shape) - dim - 1
        found.append(
            Box(
                offsets=(*outer, index, *(0,) * inner),
                extents=(*(1,) * dim, extent, *shape[dim + 1 :]),
            )
        )
        here += extent * steps[dim]
    return tuple(found)


def intersect(left: Box, right: Box) -> Box | None:
    """The elements in both boxes; None where there are none."""
    offsets = []
    extents = []
    # Leaves at the first dim in which they are apart: most pairs of pieces differ in dim 0.
    for a, m, b, n in zip(left.offsets, left.extents, right.offsets, right.extents, strict=True):
        offset = max(a, b)
        extent = min(a + m, b + n) - offset
        if extent <= 0:
            return None
        offsets.append(offset)
        extents.append(extent)
    return Box(tuple(offsets), tuple(extents))


def flat_start(shape: tuple[int, ...], box: Box) -> int:
    """Where the box's first element stands in the flattened tensor."""
    return sum(offset * step for offset, step in zip(box.offsets, strides(shape), strict=True))


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    steps = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        steps[dim] = steps[dim + 1] * shape[dim + 1]
    return tuple(steps)


def cover_error(shape: tuple[int, ...], pieces: tuple[Box, ...]) -> str | None:
    """Why the pieces do not cover the tensor exactly once; None where they do."""
    for piece in pieces:
        fits = len(piece.offsets) == len(piece.extents) == len(shape) and all(
            offset >= 0 and extent >= 1 and offset + extent <= size
            for offset, extent, size in zip(piece.offsets, piece.extents, shape, strict=True)
        )
        if not fits:
            return f"{piece} does not fit in shape {shape}"
    clash = _overlap(pieces)
    if clash is not None:
        return f"{clash[0]} and {clash[1]} overlap"
    missing = prod(shape) - sum(piece.numel for piece in pieces)
    return f"{missing} of {prod(shape)} elements are missing" if missing else None


def _overlap(pieces: Sequence[Box], dim: int = 0) -> tuple[Box, Box] | None:
    """Two pieces with a common element, if there are any; all have a common one in dims < `dim`.

    Sweeps along `dim`: of two ranges that meet, the later one begins within the other, so only
    those that hold the beginning of some range are compared in the dims that are left. Thousands of
    pieces take milliseconds, since few of them meet in the outermost dim.
    """
    if len(pieces) < 2:
        return None
    if dim == len(pieces[0].offsets):
        return pieces[0], pieces[1]
    meeting: list[Box] = []
    ordered = sorted(pieces, key=lambda piece: piece.offsets[dim])
    for begin, starting in groupby(ordered, key=lambda piece: piece.offsets[dim]):
        meeting = [each for each in meeting if each.offsets[dim] + each.extents[dim] > begin]
        meeting += starting
        clash = _overlap(meeting, dim + 1)
        if clash is not None:
            return clash
    return None
