"""Every parameter of the whole model, as each rank knows them all.

Under a pipeline a rank keeps some of the layers, under tensor slicing a part of each. What is
saved, loaded and named is the whole model, so before anything is taken apart each rank writes down
what there is and who will hold it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from hf_speed.shard.slicing import Slicing
from hf_speed.zero.spec import Sharing


class ParameterRecord(NamedTuple):
    """One parameter of the whole model.

    Attributes:
        name: its first name in `model.named_parameters()`.
        shape: of the whole.
        stages: pipeline ranks that hold it; the first is its owner. Several hold a tied weight.
        slicing: how it is divided over the tensor-slicing ranks; None: each has all of it.
        partial: tensor-slicing ranks over which its gradient is summed; empty: each has all of it.
        trainable: whether it is trained.
        dtype: as it came.
    """

    name: str
    shape: tuple[int, ...]
    stages: tuple[int, ...]
    slicing: Slicing | None
    partial: tuple[int, ...]
    trainable: bool
    dtype: torch.dtype


class Catalogue:
    """The parameters of a model in its order, and this rank's place among those that hold them.

    Args:
        records: in the order of `model.named_parameters()` of the whole model.
        aliases: every name of every parameter -> its first name.
        pp_rank: of this rank.
        tp_rank: of this rank.
    """

    def __init__(
        self,
        records: Iterable[ParameterRecord],
        aliases: Mapping[str, str],
        *,
        pp_rank: int,
        tp_rank: int,
    ) -> None:
        self.records = {record.name: record for record in records}
        self.aliases = dict(aliases)
        self.pp_rank = pp_rank
        self.tp_rank = tp_rank

    def record(self, name: str) -> ParameterRecord:
        """The record of a parameter, by any of its names.

        Raises:
            KeyError: the model has none of that name.
        """
        return self.records[self.aliases.get(name, name)]

    def is_here(self, name: str) -> bool:
        """Whether this rank holds a part of it."""
        return self.pp_rank in self.record(name).stages

    def is_counted(self, name: str) -> bool:
        """Whether this rank's part counts, where several pipeline or slicing ranks hold the same.

        Of equal parts one counts: that of the owning stage and of the first slicing rank.
        """
        record = self.record(name)
        if record.stages[0] != self.pp_rank:
            return False
        first = 0 if record.slicing is None else record.slicing.sharers(self.tp_rank)[0]
        return first == self.tp_rank

    def sharing_of(self, name: str) -> Sharing:
        """Ranks that hold equal copies of a parameter, each with a share of its gradient."""
        record = self.record(name)
        slices = record.partial
        if record.partial and record.slicing is not None:
            slices = record.slicing.sharers(self.tp_rank)
        return Sharing(
            stages=record.stages if len(record.stages) > 1 else (),
            slices=slices if len(slices) > 1 else (),
            is_repeated=record.slicing is None,
            is_counted=self.is_counted(name),
        )


def first_names(model: nn.Module) -> tuple[dict[int, str], dict[str, str]]:
    """(id of a parameter -> its first name, every name -> the first name of the same parameter)."""
    first: dict[int, str] = {}
    aliases = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return first, aliases
