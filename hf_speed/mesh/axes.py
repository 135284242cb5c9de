"""The names of the mesh axes and the value that every collective takes.

An axis that a run does not use exists with size 1, so that no caller asks whether it is there.
"""

from typing import Literal, NamedTuple

from torch.distributed import ProcessGroup

Axis = Literal["pp", "dp_replicate", "dp_shard", "ep", "tp"]

AXES: tuple[Axis, ...] = ("pp", "dp_replicate", "dp_shard", "ep", "tp")
"""Outermost first: ranks that differ only in `tp` are neighbours."""


class AxisGroup(NamedTuple):
    """The ranks that differ from this one along one axis (or a product of axes).

    Attributes:
        size: number of ranks, at least 1.
        rank: this rank's place among them, 0 to size - 1.
        group: their process group; None where size is 1, so that one process needs no backend.
        label: the axis as errors and the journal name it.
    """

    size: int
    rank: int
    group: ProcessGroup | None
    label: str = ""

    @property
    def is_identity(self) -> bool:
        """True where a collective over this group has nobody to talk to."""
        return self.group is None


IDENTITY = AxisGroup(size=1, rank=0, group=None, label="identity")
