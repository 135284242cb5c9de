"""Where each element of each parameter lives: pure arithmetic.

The parameters of a unit stand one after the other in a flat buffer, which is cut in equal parts,
one per rank. A part is an interval, so what a rank holds of one parameter is an interval of that
parameter flattened: a SlotPiece.

    slots    |--- q ---|--- k ---|- norm -|#|        # = padding
    parts    |----- rank 0 -----|---- rank 1 ----|
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

ALIGNMENT_NUMEL = 16
"""Slots start at multiples of this many elements: 32 bytes in 16-bit, 64 bytes in fp32, which
vector loads and tensor-core kernels want."""


class Slot(NamedTuple):
    """One parameter's place in the flat buffer. `start` and `numel` are in elements."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


class SlotPiece(NamedTuple):
    """What one part holds of one slot.

    Attributes:
        index: the slot's place in `FlatLayout.slots`.
        start: first element, counted from the start of the flattened parameter.
        numel: number of elements, at least 1.
        part_start: where they begin within the part.
    """

    index: int
    start: int
    numel: int
    part_start: int


class FlatLayout(NamedTuple):
    """The slots of one flat buffer and its division in equal parts."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    padded_numel: int
    parts: int

    @classmethod
    def plan(
        cls,
        named_shapes: Sequence[tuple[str, tuple[int, ...]]],
        *,
        dtype: torch.dtype,
        parts: int,
        replicas: int = 1,
    ) -> "FlatLayout":
        """Lay parameters out in the given order.

        Args:
            named_shapes: (name, shape) pairs; shapes of zero elements are allowed.
            dtype: of the buffer.
            parts: number of equal parts, at least 1.
            replicas: each part can be cut further in this many equal slices (hybrid sharding).
        """
        slots = []
        start = 0
        for name, shape in named_shapes:
            numel = prod(shape)
            slots.append(Slot(name, tuple(shape), start, numel))
            start = _round_up(start + numel, ALIGNMENT_NUMEL)
        padded = max(
            _round_up(start, ALIGNMENT_NUMEL * parts * replicas), ALIGNMENT_NUMEL * parts * replicas
        )
        return cls(tuple(slots), dtype, padded, parts)

    @property
    def part_numel(self) -> int:
        """Elements per part, padding included."""
        return self.padded_numel // self.parts

    @property
    def numel(self) -> int:
        """Elements of all parameters, padding left out."""
        return sum(slot.numel for slot in self.slots)

    def interval(self, part: int) -> tuple[int, int]:
        """[start, stop) of a part in the flat buffer."""
        return part * self.part_numel, (part + 1) * self.part_numel

    def pieces(self, part: int) -> tuple[SlotPiece, ...]:
        """What a part holds, in slot order; slots of which it holds nothing are left out."""
        begin, end = self.interval(part)
        pieces = []
        for index, slot in enumerate(self.slots):
            first = max(slot.start, begin)
            last = min(slot.start + slot.numel, end)
            if first < last:
                pieces.append(SlotPiece(index, first - slot.start, last - first, first - begin))
        return tuple(pieces)

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of every stretch that belongs to no parameter, in order."""
        gaps = []
        end = 0
        for slot in self.slots:
            if slot.start > end:
                gaps.append((end, slot.start))
            end = max(end, slot.start + slot.numel)
        if end < self.padded_numel:
            gaps.append((end, self.padded_numel))
        return tuple(gaps)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
