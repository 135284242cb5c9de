"""What a flat group is made of, before anything is allocated: parameters, dtypes, ranks."""

from typing import NamedTuple

import torch

from hf_speed.mesh import AxisGroup
from hf_speed.zero.units import ParameterEntry


class Dtypes(NamedTuple):
    """The dtypes of one group, each named by the step of the walk at which it is used."""

    compute: torch.dtype
    master: torch.dtype
    wire: torch.dtype
    accumulate: torch.dtype


class GroupAxes(NamedTuple):
    """The ranks that a group deals with.

    Attributes:
        gather: between which the buffer is divided, for gathers; size 1 at stage 0.
        reduce: the same ranks, for reductions.
        replica: ranks that hold equal parts.
        num_sharers: how many of the ranks of `replica` see one and the same batch, each with a
            share of its gradient: pipeline stages of a tied weight, ranks that divide a layer.
            Shares are summed, batches averaged.
    """

    gather: AxisGroup
    reduce: AxisGroup
    replica: AxisGroup
    num_sharers: int = 1


class Sharing(NamedTuple):
    """Ranks that hold equal copies of a parameter, each with a share of its gradient.

    Attributes:
        stages: pipeline ranks that hold a tied weight; none for others.
        slices: places along `tp` whose gradients are shares; none where each has all of it.
        is_repeated: every place along `tp` has all of it.
        is_counted: whether this rank's copy counts, in norms and saves, among equal ones. It
            follows from the others and from the rank, so that all ranks have like groups.
    """

    stages: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    is_repeated: bool = False
    is_counted: bool = True


class GroupSpec(NamedTuple):
    """What a group is made of, before anything is allocated."""

    name: str
    entries: tuple[ParameterEntry, ...]
    dtypes: Dtypes
    trainable: bool
    sharing: Sharing = Sharing()
