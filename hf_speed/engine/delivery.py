"""Whole parameters for those ranks that write them.

`Access.full_parameters` gathers every parameter on every rank. A save needs each on one: its parts
go there alone, which is a size-th of the bytes, and are read when their turn comes, which a save
that runs behind the training awaits on its own thread (`checkpoint/held.py`).

    rounds of one parameter for each writer:  parts -> isend to the writer -> whole there, yielded

So all ranks write at the same time, each from memory for one parameter. For models in host memory,
divided over `dp_shard` at most. Others are gathered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.checkpoint.held import Held
from hf_speed.checkpoint.saver import Save
from hf_speed.engine.assemble import Parts
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup, Lane
from hf_speed.mesh.collectives import exchange
from hf_speed.shard.layout import SlotPiece
from hf_speed.zero.group import FlatGroup

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

RanksOf = Callable[[str], frozenset[int]]
"""Name of a parameter -> the ranks of the world that write something that is made of it."""

Delivery = Callable[[RanksOf], Iterator[tuple[str, Tensor]]]


class _Item(NamedTuple):
    """One parameter.

    Attributes:
        name: full name.
        dtype: that it is delivered in.
        shape: of the whole.
        wanted_by: places in the gather group.
        held: what this rank has of it, where somebody wants that: (numel,), or all of it, shaped.
        parts: place -> what that has of it; empty where every rank has all of it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    wanted_by: tuple[int, ...]
    held: Held | None
    parts: Mapping[int, SlotPiece]


def can_deliver(parts: Parts) -> bool:
    """Whether this engine's tensors can be read where they are, on any thread."""
    return (
        parts.mesh.device.type == "cpu"
        and not parts.division.is_divided
        and all(
            group.master_is_here
            and not group.sources
            and not group.streams
            and group.axes.gather.size in (1, parts.mesh.sizes["dp_shard"])
            for group in parts.groups
        )
    )


def deliver_parameters(
    engine: "Engine", ranks_of: RanksOf, save: Save, *, master: bool
) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters in an order of its own; those that this rank does not write are on meta.

    Collective now, and again while it is iterated: every rank does so, to the end.

    Args:
        engine: for whose parts `can_deliver`.
        ranks_of: the same on every rank.
        save: whose jobs iterate, on whichever thread they run.
        master: in the precision that the optimizer updates, where that is higher.

    Returns:
        (name, tensor), each valid until the next.

    Raises:
        CheckpointError: at the end of the iteration; something was changed in the meantime.
    """
    parts = engine.parts
    parts.stepper.settle()
    axis = parts.mesh.axis("dp_shard", lane=Lane.SAVE if save.is_behind else Lane.GATHER)
    me = parts.mesh.world.rank
    ranks = [me] if axis.group is None else dist.get_process_group_ranks(axis.group)
    items = {}
    for group in parts.groups:
        whole, dtype = _whole(group, master=master)
        spread = _spread(group) if whole is None else {}
        parameters = {entry.name: entry.parameter for entry in group.entries}
        held_by = zip(group.piece_slots(), group.pieces, strict=True)
        pieces = {slot_piece.index: [piece] for slot_piece, piece in held_by}
        for index, slot in enumerate(group.layout.slots):
            writers = ranks_of(slot.name)
            wanted_by = tuple(place for place, rank in enumerate(ranks) if rank in writers)
            places = spread.get(index, {})
            held = None
            if whole is not None and axis.rank in wanted_by:
                value = group.slot_view(whole, slot)
                is_master = whole is not group.full
                owners = pieces.get(index, ()) if is_master else [parameters[slot.name]]
                held = save.hold(value, slot.name, owners)
            elif axis.rank in places and wanted_by:
                mine = places[axis.rank]
                value = group.master[mine.part_start : mine.part_start + mine.numel]
                held = save.hold(value, slot.name, pieces.get(index, ()))
            items[slot.name] = _Item(slot.name, dtype, slot.shape, wanted_by, held, places)
    return _iterate(_rounds([items[name] for name in parts.catalogue.records]), axis)


def _spread(group: FlatGroup) -> dict[int, dict[int, SlotPiece]]:
    """Slot -> place in the gather group -> what that has of it."""
    found: dict[int, dict[int, SlotPiece]] = {}
    for place in range(group.axes.gather.size):
        for piece in group.layout.pieces(place):
            found.setdefault(piece.index, {})[place] = piece
    return found


def _rounds(items: Sequence[_Item]) -> list[list[_Item]]:
    """In each round one item for each place that writes; those that none here writes at the end."""
    queues: dict[int, list[_Item]] = {}
    for item in items:
        queues.setdefault(item.wanted_by[0] if item.wanted_by else -1, []).append(item)
    unwanted = queues.pop(-1, [])
    dealt = zip_longest(*(queues[place] for place in sorted(queues)))
    return [*([item for item in each if item is not None] for each in dealt), unwanted]


def _whole(group: FlatGroup, *, master: bool) -> tuple[Tensor | None, torch.dtype]:
    """The flat buffer that holds the values if all of it is here; their dtype."""
    apart = master and group.dtypes.master != group.dtypes.compute
    dtype = group.dtypes.master if apart else group.dtypes.compute
    if group.resident and not apart:
        return group.full, dtype
    if group.axes.gather.size == 1 and group.master.dtype == dtype:
        return group.master, dtype
    return None, dtype


def _iterate(rounds: Sequence[Sequence[_Item]], axis: AxisGroup) -> Iterator[tuple[str, Tensor]]:
    failure: CheckpointError | None = None
    memory: dict[tuple[int, torch.dtype], Tensor] = {}
    for items in rounds:
        wholes: dict[str, Tensor] = {}
        try:
            wholes = _collect(items, axis, memory)
        except CheckpointError as error:
            # The other ranks need this one in the rounds that are still to come.
            failure = failure or error
        for item in items:
            if item.name in wholes:
                yield item.name, wholes[item.name]
            elif item.held is not None and not item.parts:
                try:
                    with item.held.reading() as value:
                        yield item.name, value
                except CheckpointError as error:
                    failure = failure or error
            else:
                device = "cpu" if axis.rank in item.wanted_by else "meta"
                yield item.name, torch.empty(item.shape, dtype=item.dtype, device=device)
    if failure is not None:
        raise failure


def _collect(
    items: Sequence[_Item], axis: AxisGroup, memory: dict[tuple[int, torch.dtype], Tensor]
) -> dict[str, Tensor]:
    """The parameters of a round that this rank writes, as far as they have to be put together."""
    wholes: dict[str, Tensor] = {}
    with ExitStack() as stack:
        pending = []
        for number, item in enumerate(each for each in items if each.parts):
            mine, into = None, dict[int, Tensor]()
            if item.held is not None:
                mine = stack.enter_context(item.held.reading()).to(item.dtype)
            if axis.rank in item.wanted_by:
                numel = torch.Size(item.shape).numel()
                whole = memory.get((number, item.dtype), torch.empty(0))
                if whole.numel() < numel:
                    whole = memory[number, item.dtype] = torch.empty(numel, dtype=item.dtype)
                wholes[item.name] = whole[:numel].view(item.shape)
                into = {
                    place: whole[part.start : part.start + part.numel]
                    for place, part in item.parts.items()
                }
                if mine is not None:
                    into.pop(axis.rank).copy_(mine)
            pending.append(exchange(mine, item.wanted_by, into, group=axis))
        for each in pending:
            each.wait()
    return wholes
