"""What each rank of a mesh will hold of a model, as sizes, before anything is built.

    structure (on meta)  ->  stages, slices  ->  groups of each rank  ->  Estimator

Layers are sliced as they will be, on a model without values, and put back; stages are told apart by
name. So what is counted is what `division` does, without ranks and without memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from hf_speed.config import SpeedConfig
from hf_speed.config.parallel import resolve_pipe
from hf_speed.engine.catalogue import Catalogue, ParameterRecord, first_names
from hf_speed.engine.dealing import Dealing, deal_out, homes_of, prefixes, ranks_by_path
from hf_speed.engine.estimate import GroupSize
from hf_speed.engine.planning import group_specs, precision_of
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.journal import Journal
from hf_speed.pipe.body import find_body
from hf_speed.zero.units import plan_units

if TYPE_CHECKING:
    from hf_speed.nn.sliced import SlicedModel, SlicePlan

Units = list[list[GroupSize]]
"""The groups of each unit of a rank, root last."""


class Share(NamedTuple):
    """What the ranks at one place along `pp` and `tp` will hold.

    Attributes:
        pp_rank: the place along `pp`.
        num_layers: of each of its stages.
        num_sums: how often hidden states are summed over `tp`, for each token: at the exits of
            attentions and MLPs in the forward, at their entries in the backward, ...
        num_repeated_sums: those that recomputing blocks repeats: all of the forward but the last
            one of each block, on which no gradient depends. A gather of rows is half a sum.
        has_sliced_loss: the loss is computed from divided words.
        gathered_words: of a rank, where logits are gathered for the loss; else 0.
        units: the groups of each unit, root last.
    """

    pp_rank: int
    num_layers: tuple[int, ...]
    num_sums: int
    num_repeated_sums: float
    has_sliced_loss: bool
    gathered_words: int
    units: Units

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(group.numel for unit in self.units for group in unit)


class Shares(NamedTuple):
    """How a model will be divided.

    Attributes:
        dealing: of the layers to stages; one stage where mesh.pp is 1.
        ranks: by pipeline rank.
    """

    dealing: Dealing
    ranks: tuple[Share, ...]

    @property
    def largest(self) -> Share:
        """The rank that has most to hold: all plan for that one."""
        return max(self.ranks, key=lambda share: share.numel)


def shares_of(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    slice_plan: "SlicePlan | None" = None,
    tp_rank: int = 0,
) -> Shares:
    """What each pipeline rank will hold of `model`.

    Args:
        model: whole, on the meta device: it is sliced in place, and made whole again.
        config: what the user set. pipe.balance='time' counts as 'parameters': nothing can be
            measured here.
        compute_dtype: of mixed precision.
        slice_plan: how its layers are divided; None where mesh.tp is 1.
        tp_rank: place along `tp`. The first has the most, where shares are uneven.

    Raises:
        ConfigError: the model cannot be cut, or the config names units that it lacks.
    """
    names, aliases = first_names(model)
    classes = None if isinstance(config.zero.units, str) else config.zero.units
    plans = plan_units(model, classes, names=names)
    # Without a pipeline there is one stage, of all blocks.
    dealing, ranks = Dealing((len(plans) - 1,), (0,)), {}
    if config.mesh.pp > 1:
        body = find_body(model)
        pipe, name = resolve_pipe(config), type(model).__name__
        dealing = deal_out(body, pipe, num_ranks=config.mesh.pp, name=name)
        ranks = ranks_by_path(body, dealing)
    homes = homes_of(aliases, ranks)
    shapes = {names[id(each)]: tuple(each.shape) for each in model.parameters()}
    precision = precision_of(model, config, compute_dtype=compute_dtype)
    sums = _Sums(slice_plan, ranks, divides_rows=config.tensor.sequence_parallel)
    found = []
    with _sliced(model, config, slice_plan, tp_rank=tp_rank) as sliced:
        records = list(_records(model, shapes, homes, sliced))
        for rank in range(config.mesh.pp):
            catalogue = Catalogue(records, aliases, pp_rank=rank, tp_rank=tp_rank)
            here = [
                plan._replace(entries=tuple(e for e in plan.entries if catalogue.is_here(e.name)))
                for plan in plans
            ]
            units = [
                [GroupSize.of(spec) for spec in group_specs(plan, precision, catalogue.sharing_of)]
                for plan in here
                if plan.entries or plan.is_root
            ]
            layers = dealing.layers_of(rank)
            found.append(Share(rank, layers, *sums.of(rank, layers), units))
    return Shares(dealing, tuple(found))


def _records(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    homes: Mapping[str, tuple[int, ...]],
    sliced: "SlicedModel | None",
) -> Iterator[ParameterRecord]:
    slicings = {} if sliced is None else sliced.slicings
    sharers = {} if sliced is None else sliced.partial
    for name, parameter in model.named_parameters():
        yield ParameterRecord(
            name,
            shapes[name],
            homes[name],
            slicings.get(name),
            sharers.get(name, ()),
            parameter.requires_grad,
            parameter.dtype,
        )


class _Sums:
    """What a slice plan has on each pipeline rank that exchanges over `tp`.

    Args:
        plan: how layers are divided, if they are.
        ranks: path of a module -> its pipeline rank.
        divides_rows: hidden states are divided between regions.
    """

    def __init__(
        self, plan: "SlicePlan | None", ranks: Mapping[str, int], *, divides_rows: bool
    ) -> None:
        self._divides_rows = divides_rows
        self._regions: Counter[int] = Counter()
        self._words: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._gathered: Counter[int] = Counter()
        if plan is None:
            return
        from hf_speed.nn.sliced import VocabEmbedding, VocabHead

        for region in plan.regions:
            self._regions[_rank_of(region.entry, ranks)] += 1
        for path, rule in plan.rules.items():
            rank = _rank_of(path, ranks)
            if isinstance(rule, (VocabEmbedding, VocabHead)):
                self._words[rank] += 1
            if isinstance(rule, VocabHead) and rule.loss is not None:
                self._losses[rank] += 1
            elif isinstance(rule, VocabHead):
                self._gathered[rank] = max(
                    rule.slicing.local_size(place) for place in range(plan.num_ranks)
                )

    def of(self, rank: int, layers: tuple[int, ...]) -> tuple[int, float, bool, int]:
        """The fields of a Share: sums, repeated sums, sliced loss, gathered words."""
        regions = self._regions[rank]
        # An attention or MLP sums twice, an embedding in the forward, a head in the backward.
        # Divided rows come together at both ends of a stage.
        num_sums = 2 * regions + self._words[rank] + (len(layers) if self._divides_rows else 0)
        repeated = 0.0
        if regions:
            left = regions - sum(layers)
            repeated = (regions + left) / 2 if self._divides_rows else left
        return num_sums, repeated, self._losses[rank] > 0, self._gathered[rank]


def _rank_of(path: str, ranks: Mapping[str, int]) -> int:
    """The pipeline rank that has a module."""
    return next((ranks[each] for each in prefixes(path) if each in ranks), 0)


@contextmanager
def _sliced(
    model: nn.Module, config: SpeedConfig, plan: "SlicePlan | None", *, tp_rank: int
) -> "Iterator[SlicedModel | None]":
    """The model is sliced inside."""
    if plan is None:
        yield None
        return
    from hf_speed.nn.sliced import slice_model

    whole = {name: parameter.data for name, parameter in model.named_parameters()}
    sliced = slice_model(
        model,
        plan,
        tp=AxisGroup(config.mesh.tp, tp_rank, None, "tp"),
        journal=Journal(enabled=False),
        sequence_parallel=config.tensor.sequence_parallel,
    )
    try:
        yield sliced
    finally:
        sliced.undo(whole.__getitem__)
