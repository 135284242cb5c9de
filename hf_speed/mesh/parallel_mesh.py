"""The process groups of one run.

A group is made on the first `axis()` call for it, by all ranks in the same order, and belongs to
this mesh: `close()` destroys what the mesh made, so engines come and go without leaking groups.

Gathers and reductions go over separate groups (lanes). A rank that skips a block (layer drop,
unused branch) may start its reductions at another moment than its neighbours start their gathers;
within one lane the order is fixed, between lanes it need not be. That second set of groups is why
this is not a torch DeviceMesh, which has one group per dimension.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AXES, IDENTITY, Axis, AxisGroup
from hf_speed.mesh.journal import Journal
from hf_speed.mesh.topology import axis_sizes, coordinates, groups_along


class Lane(StrEnum):
    """Independent orders of collectives over the same ranks."""

    CONTROL = "control"
    GATHER = "gather"
    REDUCE = "reduce"
    FORWARD = "forward"
    BACKWARD = "backward"
    SAVE = "save"
    """Used by the thread that saves behind the training; always gloo, for it moves no tensors."""


Within = tuple[tuple[Axis, tuple[int, ...]], ...]
"""The places along some axes to which a group is restricted."""


class ParallelMesh:
    """Axes pp, dp_replicate, dp_shard, ep, tp over the ranks of the default process group.

    Args:
        sizes: axis sizes; axes left out have size 1. Their product is the world size.
        device: the device that tensors of collectives live on.
        timeout_s: seconds after which a collective that a rank never joins fails.
        journal: checks the order of collectives in debug mode, and counts their bytes.

    Raises:
        MeshError: the product of the sizes is not the number of ranks.
    """

    def __init__(
        self,
        sizes: Mapping[Axis, int],
        *,
        device: torch.device,
        timeout_s: float = 600.0,
        journal: Journal | None = None,
    ) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if started else 1
        self.rank = dist.get_rank() if started else 0
        self.sizes = axis_sizes(self.world_size, sizes)
        self.coordinates = coordinates(self.rank, self.sizes)
        self.device = device
        self.timeout = timedelta(seconds=timeout_s)
        self.journal = journal if journal is not None else Journal(enabled=False)
        self._groups: dict[tuple[tuple[Axis, ...], Lane, Within], AxisGroup] = {}
        self._closed = False

    def axis(
        self,
        *names: Axis,
        lane: Lane = Lane.CONTROL,
        within: Mapping[Axis, Sequence[int]] | None = None,
    ) -> AxisGroup:
        """The ranks along one axis, or along the product of several.

        Collective on its first call for given arguments: every rank makes the group.

        Args:
            names: the axes.
            lane: which of the independent groups over the same ranks.
            within: for some of the axes, the only places along them that take part. A rank at
                another place gets the identity.
        """
        if self._closed:
            raise MeshError("This mesh was closed. Attach a new engine to get a new one.")
        axes = tuple(axis for axis in AXES if axis in names)
        bounds = tuple(sorted((axis, tuple(each)) for axis, each in (within or {}).items()))
        if all(self.sizes[axis] == 1 for axis in axes):
            return IDENTITY
        key = (axes, lane, bounds)
        if key not in self._groups:
            self._groups[key] = self._make(axes, lane, dict(bounds))
        return self._groups[key]

    @property
    def world(self) -> AxisGroup:
        """All ranks, for agreement and barriers."""
        return self.axis(*AXES)

    def close(self) -> None:
        """Destroy the groups that this mesh made. Not a collective."""
        if not self._closed and dist.is_initialized():
            for member in self._groups.values():
                if member.group is not None:
                    dist.destroy_process_group(member.group)
            self.journal.close()
        self._groups.clear()
        self._closed = True

    def _make(
        self, axes: tuple[Axis, ...], lane: Lane, within: Mapping[Axis, Sequence[int]]
    ) -> AxisGroup:
        mine, members = IDENTITY, [self.rank]
        for everyone in groups_along(axes, self.sizes):
            ranks = [rank for rank in everyone if self._is_within(rank, within)]
            if len(ranks) < 2:
                continue
            group = dist.new_group(
                ranks,
                timeout=self.timeout,
                backend="gloo" if lane is Lane.SAVE else None,
                group_desc=f"{lane}:{axes}",
            )
            if isinstance(group, dist.ProcessGroup) and self.rank in ranks:
                label = " x ".join(axes)
                places = "".join(f" {axis}{list(each)}" for axis, each in within.items())
                mine = AxisGroup(
                    len(ranks), ranks.index(self.rank), group, f"{label}{places}/{lane}"
                )
                members = ranks
        self.journal.watch(mine, members, timeout=self.timeout)
        return mine

    def _is_within(self, rank: int, within: Mapping[Axis, Sequence[int]]) -> bool:
        places = coordinates(rank, self.sizes)
        return all(places[axis] in each for axis, each in within.items())
