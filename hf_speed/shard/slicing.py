"""How one parameter is divided over the tensor-parallel ranks: arithmetic, and two copies.

Along one dim each rank holds an ordered list of stretches of the whole; its local tensor is their
concatenation. That covers column and row slices, uneven ones, fused projections (each part is cut
by itself) and key-value heads fewer than ranks (several ranks hold the same stretch).

    dim 1, size 10: fused parts of 6 and 4 on 2 ranks          whole    0 1 2 3 4 5|6 7 8 9
        stretches ((0, 3), (6, 2)), ((3, 3), (8, 2))           rank 0   0 1 2       6 7
                                                               rank 1         3 4 5     8 9

Sharded data parallelism divides the local tensor again, in intervals of its flattened elements:
`runs` says which boxes of the whole an interval is. Source: Megatron-LM, arXiv:1909.08053,
section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.shard.reshard import Box, boxes, flat_start, strides


class Stretch(NamedTuple):
    """[start, start + length) along the sliced dim, in elements of that dim."""

    start: int
    length: int


class Run(NamedTuple):
    """A box of the whole tensor, and where its values stand in an interval of the local one.

    Attributes:
        box: of the whole.
        start: of its first element, counted from the start of the interval.
        strides: of its elements in the interval, one per dim: those of the local tensor, whose rows
            hold the other stretches too.
    """

    box: Box
    start: int
    strides: tuple[int, ...]

    def view(self, interval: Tensor) -> Tensor:
        """The run's values, box.extents, as a view of the interval's (numel,) contiguous values."""
        first = int(interval.storage_offset()) + self.start
        return interval.as_strided(self.box.extents, self.strides, first)


@dataclass(frozen=True)
class Slicing:
    """The division of one parameter. Make one with `even`, `uneven` or `fused`.

    Attributes:
        dim: the sliced dim.
        size: of the whole parameter along `dim`.
        stretches: by rank. Ranks share a stretch entirely or not at all; together they cover the
            whole.
    """

    dim: int
    size: int
    stretches: tuple[tuple[Stretch, ...], ...]

    def __post_init__(self) -> None:
        """Check that the stretches are a division.

        Raises:
            ValueError: they leave a gap, overlap in part, or one rank holds one of them twice.
        """
        if self.dim < 0 or not self.stretches:
            raise ValueError(
                f"A slicing has a dim of at least 0 and at least one rank, not dim {self.dim} and "
                f"{len(self.stretches)} ranks."
            )
        for rank, held in enumerate(self.stretches):
            if len(set(held)) < len(held):
                raise ValueError(f"Rank {rank} holds a stretch twice: {held}.")
        distinct = sorted({each for held in self.stretches for each in held if each.length})
        edges = [Stretch(0, 0), *distinct, Stretch(self.size, 0)]
        for left, right in pairwise(edges):
            end = left.start + left.length
            if end != right.start:
                what = "leave a gap" if end < right.start else "overlap in part"
                raise ValueError(
                    f"Stretches {what} at {min(end, right.start)} of {self.size} along dim "
                    f"{self.dim}: {self.stretches}."
                )

    @classmethod
    def even(cls, dim: int, size: int, num_ranks: int, *, copies: int = 1) -> "Slicing":
        """Equal stretches in rank order, each on `copies` neighbouring ranks.

        Raises:
            ValueError: `num_ranks` is not a multiple of `copies`, or `size` not of the stretches.
        """
        parts = num_ranks // copies if copies > 0 else 0
        if parts <= 0 or num_ranks % copies or size % parts:
            raise ValueError(
                f"{size} elements cannot be cut evenly for {num_ranks} ranks with {copies} copies "
                f"of each stretch."
            )
        return cls.uneven(dim, [size // parts] * parts, copies=copies)

    @classmethod
    def uneven(cls, dim: int, lengths: Sequence[int], *, copies: int = 1) -> "Slicing":
        """Stretches of the given lengths in rank order, each on `copies` neighbouring ranks.

        A length may be 0: its rank holds nothing.

        Raises:
            ValueError: a negative length.
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"A stretch cannot have a negative length: {list(lengths)}.")
        held: list[tuple[Stretch, ...]] = []
        start = 0
        for length in lengths:
            held += [(Stretch(start, length),) if length else ()] * copies
            start += length
        return cls(dim, start, tuple(held))

    @classmethod
    def fused(cls, parts: Sequence["Slicing"]) -> "Slicing":
        """Parts that follow each other along their dim, each divided in its own way.

        For example queries, keys and values in one weight: fused([even(0, 4096, 8),
        even(0, 512, 8, copies=2), even(0, 512, 8, copies=2)]).

        Raises:
            ValueError: no parts, or parts that differ in dim or number of ranks.
        """
        if len({(part.dim, part.num_ranks) for part in parts}) != 1:
            raise ValueError(
                f"Fused parts need one dim and one number of ranks, not (dim, ranks) "
                f"{[(part.dim, part.num_ranks) for part in parts]}."
            )
        held: list[tuple[Stretch, ...]] = [()] * parts[0].num_ranks
        size = 0
        for part in parts:
            for rank, own in enumerate(part.stretches):
                held[rank] += tuple(Stretch(size + start, length) for start, length in own)
            size += part.size
        return cls(parts[0].dim, size, tuple(held))

    @property
    def num_ranks(self) -> int:
        """Ranks that the parameter is divided over."""
        return len(self.stretches)

    @property
    def is_repeated(self) -> bool:
        """Whether several ranks hold some stretch."""
        held = [each for own in self.stretches for each in own]
        return len(set(held)) < len(held)

    def sharers(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold exactly what `rank` holds, itself included, in order.

        A rank that holds nothing shares it with nobody. Ranks that hold some of the same stretches
        and others too are no sharers; `is_repeated` is true of them.
        """
        mine = self.stretches[rank]
        if not mine:
            return (rank,)
        return tuple(other for other, held in enumerate(self.stretches) if held == mine)

    def counted(self, rank: int) -> tuple[Stretch, ...]:
        """Of what `rank` holds, the stretches of which it is the first holder."""
        before = {each for held in self.stretches[:rank] for each in held}
        return tuple(each for each in self.stretches[rank] if each not in before)

    def local_size(self, rank: int) -> int:
        """Of the local tensor along `dim`."""
        return sum(each.length for each in self.stretches[rank])

    def local_shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape of what `rank` holds of a parameter of shape `whole`.

        Raises:
            ValueError: `whole` is not of `size` along `dim`.
        """
        self._check_size(whole, self.size, "the whole")
        return (*whole[: self.dim], self.local_size(rank), *whole[self.dim + 1 :])

    def whole_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole parameter of which a rank holds a tensor of shape `local`."""
        return (*local[: self.dim], self.size, *local[self.dim + 1 :])

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """What `rank` holds of `whole`: a contiguous copy.

        Raises:
            ValueError: `whole` is not of `size` along `dim`.
        """
        local = torch.empty(
            self.local_shape(tuple(whole.shape), rank), dtype=whole.dtype, device=whole.device
        )
        for here, stretch in self._places(rank):
            target = local.narrow(self.dim, here, stretch.length)
            target.copy_(whole.detach().narrow(self.dim, *stretch))
        return local

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from what all ranks hold; of a repeated stretch the first holder's copy counts.

        Raises:
            ValueError: not one part per rank, or a part of another size along `dim`.
        """
        if len(parts) != self.num_ranks:
            raise ValueError(f"{len(parts)} parts of a parameter that {self.num_ranks} ranks hold.")
        for rank, part in enumerate(parts):
            self._check_size(tuple(part.shape), self.local_size(rank), f"the part of rank {rank}")
        whole = torch.empty(
            self.whole_shape(tuple(parts[0].shape)), dtype=parts[0].dtype, device=parts[0].device
        )
        for rank, part in enumerate(parts):
            counted = self.counted(rank)
            for here, stretch in self._places(rank):
                if stretch in counted:
                    value = part.detach().narrow(self.dim, here, stretch.length)
                    whole.narrow(self.dim, *stretch).copy_(value)
        return whole

    def runs(
        self,
        local_shape: tuple[int, ...],
        rank: int,
        start: int,
        numel: int,
        *,
        counted_only: bool = False,
    ) -> Iterator[Run]:
        """[start, start + numel) of the flattened local tensor, as boxes of the whole.

        At most 2 * ndim - 1 of them per stretch.

        Args:
            local_shape: of what `rank` holds.
            rank: whose local tensor it is.
            start: first element of the interval.
            numel: elements of the interval.
            counted_only: leave out the stretches that a rank before this one holds too.

        Raises:
            ValueError: the shape is not that of this rank, or the interval is not within it.
        """
        self._check_size(local_shape, self.local_size(rank), f"the part of rank {rank}")
        counted = self.counted(rank)
        places = [
            (here, stretch)
            for here, stretch in self._places(rank)
            if not counted_only or stretch in counted
        ]
        steps = strides(local_shape)
        for box in boxes(local_shape, start, numel):
            for here, stretch in places:
                first = max(box.offsets[self.dim], here)
                last = min(box.offsets[self.dim] + box.extents[self.dim], here + stretch.length)
                if first < last:
                    local = self._moved(box, first, last - first)
                    whole = self._moved(box, stretch.start + first - here, last - first)
                    yield Run(whole, flat_start(local_shape, local) - start, steps)

    def _places(self, rank: int) -> Iterator[tuple[int, Stretch]]:
        """Where each stretch of a rank begins in its local tensor, and the stretch."""
        here = 0
        for stretch in self.stretches[rank]:
            yield here, stretch
            here += stretch.length

    def _moved(self, box: Box, offset: int, extent: int) -> Box:
        """The box with another range along the sliced dim."""
        return Box(
            (*box.offsets[: self.dim], offset, *box.offsets[self.dim + 1 :]),
            (*box.extents[: self.dim], extent, *box.extents[self.dim + 1 :]),
        )

    def _check_size(self, shape: tuple[int, ...], size: int, what: str) -> None:
        if len(shape) <= self.dim or shape[self.dim] != size:
            raise ValueError(
                f"{what} has shape {tuple(shape)}, but this slicing expects {size} along dim "
                f"{self.dim}."
            )


def interval_runs(
    shape: tuple[int, ...],
    start: int,
    numel: int,
    *,
    slicing: Slicing | None,
    rank: int = 0,
    counted_only: bool = False,
) -> Iterator[Run]:
    """`Slicing.runs` for a parameter that may not be sliced, from the shape of the whole.

    Args:
        shape: of the whole.
        start: first element of the interval.
        numel: elements of the interval.
        slicing: None where every rank holds the whole.
        rank: whose local tensor, flattened, the interval is of.
        counted_only: leave out the stretches that a rank before this one holds too.

    Raises:
        ValueError: the slicing is of another shape, or the interval is not within the local tensor.
    """
    if slicing is not None:
        local = slicing.local_shape(shape, rank)
        yield from slicing.runs(local, rank, start, numel, counted_only=counted_only)
        return
    steps = strides(shape)
    for box in boxes(shape, start, numel):
        yield Run(box, flat_start(shape, box) - start, steps)
