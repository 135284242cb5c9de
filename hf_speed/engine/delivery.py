"""Whole parameters for those ranks that write them.

`Access.full_parameters` gathers every parameter on every rank. A save needs each on one: its parts
go there alone, which is a size-th of the bytes, and are read when their turn comes, which a save
that runs behind the training awaits on its own thread (`checkpoint/held.py`).

    part of each rank -> isend to the ranks that write anything of the group -> scratch -> views

For whole models in host memory, divided over `dp_shard` at most. Others are gathered.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.checkpoint.held import Held
from hf_speed.checkpoint.saver import Save
from hf_speed.engine.assemble import Parts
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup, Lane
from hf_speed.mesh.collectives import collect_flat
from hf_speed.shard.layout import Slot
from hf_speed.zero.group import FlatGroup

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

RanksOf = Callable[[str], frozenset[int]]
"""Name of a parameter -> the ranks of the world that write something that is made of it."""

Delivery = Callable[[RanksOf], Iterator[tuple[str, Tensor]]]


class _Parted(NamedTuple):
    """A group of which each rank has a part, and who wants all of it."""

    group: FlatGroup
    held: Held | None
    dtype: torch.dtype
    wanted_by: tuple[int, ...]
    """Places in the gather group."""


class _Item(NamedTuple):
    """One parameter: whole here, or a slot of a parted group, or of no use on this rank."""

    name: str
    dtype: torch.dtype
    slot: Slot
    whole: Held | None
    parted: _Parted | None
    is_wanted: bool = True


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
    """Whole parameters; those that this rank does not write are on meta.

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
    places = {slot.name: (group, slot) for group in parts.groups for slot in group.layout.slots}
    parted: dict[int, _Parted] = {}
    items = []
    for name in parts.catalogue.records:
        group, slot = places[name]
        is_wanted = me in ranks_of(name)
        whole, dtype = _whole(group, master=master)
        if whole is not None:
            owners = [each.parameter for each in group.entries if each.name == name]
            value = group.slot_view(whole, slot)
            held = save.hold(value, name, owners) if is_wanted else None
            items.append(_Item(name, dtype, slot, held, None))
            continue
        if id(group) not in parted:
            names = [each.name for each in group.layout.slots]
            wanting = frozenset[int]().union(*(ranks_of(each) for each in names))
            wanted_by = tuple(place for place, rank in enumerate(ranks) if rank in wanting)
            held = save.hold(group.master, group.name, group.pieces) if wanted_by else None
            parted[id(group)] = _Parted(group, held, dtype, wanted_by)
        items.append(_Item(name, dtype, slot, None, parted[id(group)], is_wanted=is_wanted))
    # Group by group, since each is collected once; which parameter comes first is all one.
    order = {id(item.parted): place for place, item in reversed([*enumerate(items)])}
    return _iterate(sorted(items, key=lambda item: order[id(item.parted)]), axis)


def _whole(group: FlatGroup, *, master: bool) -> tuple[Tensor | None, torch.dtype]:
    """The flat buffer that holds the values if all of it is here; their dtype."""
    apart = master and group.dtypes.master != group.dtypes.compute
    dtype = group.dtypes.master if apart else group.dtypes.compute
    if group.resident and not apart:
        return group.full, dtype
    if group.axes.gather.size == 1 and group.master.dtype == dtype:
        return group.master, dtype
    return None, dtype


def _iterate(items: Sequence[_Item], axis: AxisGroup) -> Iterator[tuple[str, Tensor]]:
    failure: CheckpointError | None = None
    full: Tensor | None = None
    current: _Parted | None = None
    scratch: dict[torch.dtype, Tensor] = {}
    for item in items:
        if item.parted is not None and item.parted is not current:
            current = item.parted
            try:
                full = _collect(current, axis, scratch)
            except CheckpointError as error:
                # The other ranks need this one in what is still to come.
                failure, full = failure or error, None
        if item.whole is not None:
            try:
                with item.whole.reading() as value:
                    yield item.name, value
            except CheckpointError as error:
                failure = failure or error
        elif item.parted is not None and item.is_wanted and full is not None:
            yield item.name, item.parted.group.slot_view(full, item.slot)
        else:
            yield item.name, torch.empty(item.slot.shape, dtype=item.dtype, device="meta")
    if failure is not None:
        raise failure


def _collect(parted: _Parted, axis: AxisGroup, scratch: dict[torch.dtype, Tensor]) -> Tensor | None:
    """This group's full buffer where this rank wants it."""
    if parted.held is None:
        return None
    group, dtype = parted.group, parted.dtype
    full: Tensor | None = None
    with parted.held.reading() as part:
        if axis.rank in parted.wanted_by:
            numel = group.layout.padded_numel
            if scratch.get(dtype, torch.empty(0)).numel() < numel:
                scratch[dtype] = torch.empty(numel, dtype=dtype)
            full = scratch[dtype][:numel]
            group.part_of(full).copy_(part)
        mine = part.to(dtype) if full is None else group.part_of(full)
        collect_flat(mine, full, group=axis, receivers=parted.wanted_by).wait()
    return full
