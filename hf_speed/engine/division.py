"""Taking a model apart before it is sharded: layers divided over `tp`, stages dealt out over `pp`.

    whole model -> written down (catalogue) -> layers sliced -> stages elsewhere removed

In place, and with an inverse: `Division.undo` makes the whole model again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.config import ResolvedPipe, SpeedConfig
from hf_speed.config.parallel import resolve_pipe
from hf_speed.engine.buffers import BufferRecord, persistent_buffers
from hf_speed.engine.catalogue import Catalogue, ParameterRecord, first_names
from hf_speed.engine.dealing import Dealing, deal_out, homes_of, ranks_by_path
from hf_speed.errors import ConfigError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import broadcast_flat
from hf_speed.nn.deferred import Queue
from hf_speed.pipe.body import Body, find_body
from hf_speed.pipe.measure import measure_costs
from hf_speed.pipe.partition import Costs
from hf_speed.pipe.stage import SplitModel, split_model
from hf_speed.pipe.weights import needs_generator
from hf_speed.zero.parameter import ShardedParameter, hide, placeholder_of, publish, released_class
from hf_speed.zero.units import find_blocks

if TYPE_CHECKING:
    from hf_speed.nn.sliced import SlicedModel, SlicePlan

SlicePlanner = Callable[[nn.Module, int], "SlicePlan"]
"""(model, ranks) -> how its layers are divided; of the integrations, which know models."""


SliceReader = Callable[[str, int, int], Tensor | None]
"""(name, start, numel) -> [start, start + numel) of the flattened parameter, or None to keep it."""


class Division(NamedTuple):
    """What was done to a model before it was sharded.

    Attributes:
        catalogue: the whole model.
        names: id of a parameter -> its name in the whole model.
        sliced: its divided layers; None where mesh.tp is 1.
        split: its stages on this rank; None where mesh.pp is 1.
        placement: stage -> pipeline rank.
        removed: parameters that are on other pipeline ranks alone.
        draws: whether a training forward draws random numbers.
        buffers: the persistent ones of the whole model.
        blocks: modules of the whole model that are gathered as one, by path.
    """

    catalogue: Catalogue
    names: Mapping[int, str]
    sliced: "SlicedModel | None"
    split: SplitModel | None
    placement: tuple[int, ...]
    removed: Mapping[str, nn.Parameter]
    draws: bool
    buffers: tuple[BufferRecord, ...]
    blocks: Mapping[str, nn.Module]

    def all_sharings(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(stages, places along `tp`) of every shared parameter on any rank, in a fixed order."""
        found = set()
        for record in self.catalogue.records.values():
            sets: Sequence[tuple[int, ...]] = [record.partial]
            if record.partial and record.slicing is not None:
                slicing = record.slicing
                sets = [slicing.sharers(rank) for rank in range(slicing.num_ranks)]
            for each in sets:
                if len(record.stages) > 1 or len(each) > 1:
                    found.add((_several(record.stages), _several(each)))
        return sorted(found)

    @property
    def is_divided(self) -> bool:
        """Whether this rank has less than the whole model."""
        return self.sliced is not None or self.split is not None

    def local_reader(self, read: SliceReader) -> SliceReader:
        """From a reader of whole parameters to one of what this rank holds of them."""
        rank = self.catalogue.tp_rank

        def read_local(name: str, start: int, numel: int) -> Tensor | None:
            record = self.catalogue.record(name)
            if record.slicing is None:
                return read(name, start, numel)
            whole = read(name, 0, torch.Size(record.shape).numel())
            if whole is None:
                return None
            local = record.slicing.cut(whole.view(record.shape), rank)
            return local.view(-1)[start : start + numel]

        return read_local

    def defer_to(self, queue: Queue | None) -> None:
        """Where weight gradients of sliced linears go; the others ask a switch."""
        if self.sliced is not None:
            self.sliced.defer_to(queue)

    def undo(self, whole: Callable[[str], Tensor]) -> None:
        """Make the whole model again, in place.

        Args:
            whole: the values of a parameter by name.
        """

        def own(name: str) -> Tensor:
            """In the dtype that it came in; `whole` may give masters."""
            return whole(name).to(self.catalogue.record(name).dtype, copy=True)

        if self.split is not None:
            self.split.undo()
        for name, parameter in self.removed.items():
            if isinstance(parameter, ShardedParameter):
                publish(parameter, own(name))
        if self.sliced is not None:
            self.sliced.undo(own)


def divide(
    model: nn.Module,
    config: SpeedConfig,
    mesh: ParallelMesh,
    *,
    slice_planner: SlicePlanner | None,
) -> Division:
    """Take `model` apart as the mesh says, in place. Every rank has the whole model before.

    Collective where layers are dealt out by time.

    Raises:
        ConfigError: the model cannot be cut, or its layers cannot be divided.
    """
    names, aliases = first_names(model)
    whole = {
        names[id(parameter)]: (tuple(parameter.shape), parameter.requires_grad, parameter.dtype)
        for parameter in model.parameters()
    }
    parameters = dict(model.named_parameters())
    draws = needs_generator(model)
    # Before a stage lacks some of them: every rank finds the same, or raises.
    units = config.zero.units
    blocks = find_blocks(model, None if isinstance(units, str) else units)
    pipe = resolve_pipe(config)
    body = find_body(model) if mesh.sizes["pp"] > 1 else None
    dealing = None if body is None else _deal_out(model, body, pipe, mesh)
    places = {} if body is None or dealing is None else ranks_by_path(body, dealing)
    stages = homes_of(aliases, places)
    buffers = _buffers_of(model, places)
    sliced = _slice(model, config, mesh, slice_planner)
    slicings = {} if sliced is None else sliced.slicings
    partial = {} if sliced is None else sliced.partial
    records = [
        ParameterRecord(
            name, shape, stages[name], slicings.get(name), partial.get(name, ()), trainable, dtype
        )
        for name, (shape, trainable, dtype) in whole.items()
    ]
    catalogue = Catalogue(
        records, aliases, pp_rank=mesh.coordinates["pp"], tp_rank=mesh.coordinates["tp"]
    )
    split, placement = None, (0,)
    if body is not None and dealing is not None:
        placement = dealing.placement
        local = [stage for stage, rank in enumerate(placement) if rank == catalogue.pp_rank]
        split = split_model(model, body, dealing.counts, local)
        if sliced is not None and config.tensor.sequence_parallel:
            sliced.divide_between(*(stage.layer_ends for stage in split.stages.values()))
    removed = {name: p for name, p in parameters.items() if not catalogue.is_here(name)}
    _release(removed, mesh.device)
    return Division(catalogue, names, sliced, split, placement, removed, draws, buffers, blocks)


def _deal_out(model: nn.Module, body: Body, pipe: ResolvedPipe, mesh: ParallelMesh) -> Dealing:
    """How the layers go to stages. Collective where they are dealt out by time."""
    costs = None
    if pipe.balance == "time":
        costs = measure_costs(model, body)
        seconds = torch.tensor(
            [*costs.layers, costs.before, costs.after], dtype=torch.float64, device=mesh.device
        )
        # Clocks differ: rank 0's count.
        broadcast_flat(seconds, group=mesh.world, journal=mesh.journal)
        *layers, before, after = seconds.tolist()
        costs = Costs(tuple(layers), before, after)
    name = type(model).__name__
    return deal_out(body, pipe, num_ranks=mesh.sizes["pp"], name=name, costs=costs)


def _buffers_of(model: nn.Module, places: Mapping[str, int]) -> tuple[BufferRecord, ...]:
    found = dict(persistent_buffers(model))
    # What is in none of the parts that stages are made of stays on all.
    names = {name: name for name in found}
    stages = homes_of(names, places) if places else {}
    return tuple(
        BufferRecord(name, tuple(buffer.shape), buffer.dtype, stages.get(name, ()))
        for name, buffer in found.items()
    )


def _slice(
    model: nn.Module, config: SpeedConfig, mesh: ParallelMesh, planner: SlicePlanner | None
) -> "SlicedModel | None":
    num_ranks = mesh.sizes["tp"]
    if num_ranks == 1:
        return None
    from hf_speed.nn.sliced import slice_model

    if planner is None:
        raise ConfigError(
            f"mesh.tp={num_ranks} needs a plan of the model's layers. Give Engine.attach one with "
            f"slice_planner=, or prepare the model with hf_speed's Trainer or Accelerator, which "
            f"know Transformers models."
        )
    return slice_model(
        model,
        planner(model, num_ranks),
        tp=mesh.axis("tp"),
        journal=mesh.journal,
        sequence_parallel=config.tensor.sequence_parallel,
    )


def _release(removed: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Let go of the values of parameters that are on other ranks."""
    released = released_class({id(parameter): name for name, parameter in removed.items()})
    for parameter in removed.values():
        place = device if parameter.is_meta else parameter.device
        placeholder = placeholder_of(parameter.shape, dtype=parameter.dtype, device=place)
        if parameter.is_meta:
            # `.data =` refuses to leave the meta device; swapping keeps the object.
            torch.utils.swap_tensors(
                parameter, nn.Parameter(placeholder, requires_grad=parameter.requires_grad)
            )
        hide(parameter, placeholder, released)


def _several(ranks: tuple[int, ...]) -> tuple[int, ...]:
    return ranks if len(ranks) > 1 else ()
