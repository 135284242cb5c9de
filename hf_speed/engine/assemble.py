"""From a config and a model to the parts of an engine, in one visible order.

resolve -> mesh -> equal values on all ranks -> units -> flat groups -> gatherer, reducer,
stepper -> hooks
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_speed.config import ResolvedConfig, SpeedConfig, check_world
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.division import Division, SlicePlanner, divide
from hf_speed.engine.pipeline import check_schedule
from hf_speed.engine.planning import group_specs, plan, precision_of
from hf_speed.engine.tiers import MemoryTiers
from hf_speed.logs import get_logger
from hf_speed.mesh import Lane, ParallelMesh
from hf_speed.mesh.axes import IDENTITY, Axis
from hf_speed.mesh.collectives import broadcast_flat
from hf_speed.mesh.journal import Journal
from hf_speed.zero.gather import Gatherer, GatherPolicy, Unit
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.hooks import UnitHooks
from hf_speed.zero.parameter import ShardedParameter, released_class
from hf_speed.zero.pool import BufferPool
from hf_speed.zero.precision import LossScaler, PrecisionPlan, precision_table
from hf_speed.zero.reduce import Reducer
from hf_speed.zero.spec import Dtypes, GroupAxes, GroupSpec, Sharing
from hf_speed.zero.step import StepAxes, Stepper
from hf_speed.zero.units import plan_units

_log = get_logger(__name__)


class Parts(NamedTuple):
    """What an engine is made of."""

    config: ResolvedConfig
    mesh: ParallelMesh
    units: list[Unit]
    groups: list[FlatGroup]
    pool: BufferPool
    gatherer: Gatherer
    reducer: Reducer
    stepper: Stepper
    hooks: UnitHooks
    scaler: LossScaler | None
    tiers: MemoryTiers
    division: Division
    precision: PrecisionPlan

    @property
    def catalogue(self) -> Catalogue:
        """Every parameter of the whole model."""
        return self.division.catalogue

    def whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape of a parameter in the whole model."""
        return self.catalogue.record(self.division.names[id(parameter)]).shape

    def dtypes_of(self, name: str) -> Dtypes:
        """The dtypes of a parameter, which another rank may hold."""
        record = self.catalogue.record(name)
        return self.precision.dtypes_for(record.name, record.dtype, trainable=record.trainable)


class Callbacks(NamedTuple):
    """What the parts ask of the engine."""

    is_syncing: Callable[[], bool]
    on_forward: Callable[[], None]
    on_backward_end: Callable[[], None]


def assemble(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    device: torch.device,
    callbacks: Callbacks,
    slice_planner: SlicePlanner | None = None,
) -> Parts:
    """Take `model` over, in place. Collective.

    Raises:
        ConfigError: the config cannot take effect on this model or world.
        MeshError: the mesh does not fit the number of processes.
    """
    mesh, division, resolved = _prepare(
        model, config, compute_dtype=compute_dtype, device=device, slice_planner=slice_planner
    )
    pool = BufferPool(device, aligned="disk" in resolved.offload.tiers)
    tiers = MemoryTiers(resolved.offload, device=device)
    units = _build_units(model, config, resolved, mesh, tiers=tiers, division=division)
    groups = [group for unit in units for group in unit.groups]
    # Gradients become ready from the last unit to the first; the root's embedding comes last.
    backward = [g for unit in [*units[-2::-1], units[-1]] for g in unit.groups if g.trainable]
    on_demand = _gathers_on_demand(resolved)
    num_ahead = 0 if on_demand else resolved.prefetch_units
    gatherer = Gatherer(units, pool=pool, journal=mesh.journal, prefetch_units=num_ahead)
    # A pipeline has a backward for every microbatch, and reduces once.
    each_backward = resolved.stage >= 2 and division.split is None
    reducer = Reducer(backward, pool=pool, journal=mesh.journal, each_backward=each_backward)
    scaler = LossScaler(resolved.loss_scale) if resolved.loss_scale is not None else None
    stepper = Stepper(
        backward,
        gatherer=gatherer,
        reducer=reducer,
        pool=pool,
        scaler=scaler,
        axes=_step_axes(resolved.stage, mesh),
        journal=mesh.journal,
        device=device,
    )
    hooks = UnitHooks(
        units,
        gatherer=gatherer,
        reducer=reducer,
        policy=GatherPolicy(resolved.regather, on_demand),
        activations=tiers.activations,
        **callbacks._asdict(),
    )
    _report(model, resolved, groups, num_units=len(units))
    precision = precision_of(model, config, compute_dtype=resolved.compute_dtype)
    made = (gatherer, reducer, stepper, hooks, scaler)
    return Parts(resolved, mesh, units, groups, pool, *made, tiers, division, precision)


def _gathers_on_demand(resolved: ResolvedConfig) -> bool:
    """Whether a pass has some of a rank's units only, or finds all of them gathered before it.

    Then nothing is gathered ahead of it, and nothing that it does not run.
    """
    pipe = resolved.pipe
    return resolved.pp > 1 and (pipe.gather == "step" or pipe.chunks > 1)


class _Prepared(NamedTuple):
    """What is decided before a buffer is made."""

    mesh: ParallelMesh
    division: Division
    resolved: ResolvedConfig


def _prepare(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    device: torch.device,
    slice_planner: SlicePlanner | None,
) -> _Prepared:
    """Lay out the ranks, take the model apart, and resolve the config for what is left here."""
    mesh = make_mesh(config, device)
    try:
        equalise(model, mesh)
        division = divide(model, config, mesh, slice_planner=slice_planner)
        resolved = plan(
            model,
            config,
            compute_dtype=compute_dtype,
            device=device,
            catalogue=division.catalogue,
            names=division.names,
            blocks=division.blocks,
        )
        check_schedule(resolved.pipe, stage=resolved.stage)
    except BaseException:
        mesh.close()
        raise
    return _Prepared(mesh, division, resolved)


def _step_axes(stage: int, mesh: ParallelMesh) -> StepAxes:
    return StepAxes(
        shard=mesh.axis("pp", "dp_shard", "tp") if stage else mesh.axis("pp", "tp"),
        data=mesh.axis("dp_replicate", "dp_shard"),
        world=mesh.world,
    )


def make_mesh(config: SpeedConfig, device: torch.device) -> ParallelMesh:
    """The mesh of a config over the processes that were started. No collective.

    Raises:
        ConfigError: its axes do not multiply to as many.
    """
    started = dist.is_available() and dist.is_initialized()
    sizes = check_world(config, dist.get_world_size() if started else 1)
    return ParallelMesh(
        {
            "pp": sizes.pp,
            "dp_replicate": sizes.dp_replicate,
            "dp_shard": sizes.dp_shard,
            "tp": sizes.tp,
        },
        device=device,
        timeout_s=config.debug.timeout_s,
        journal=Journal(enabled=config.debug.journal),
    )


def _report(
    model: nn.Module, resolved: ResolvedConfig, groups: list[FlatGroup], *, num_units: int
) -> None:
    """What was built, once, on rank 0."""
    rows = [(group.name, group.layout.numel, group.dtypes, group.trainable) for group in groups]
    _log.info(
        "%s on %d ranks, %d units\n%s\n%s",
        type(model).__name__,
        resolved.world_size,
        num_units,
        resolved.table(),
        precision_table(rows),
    )


def equalise(model: nn.Module, mesh: ParallelMesh) -> None:
    """Give every rank the values of rank 0, as DDP does. One broadcast per parameter and buffer."""
    world = mesh.world
    if world.is_identity:
        return
    for value in (*model.parameters(), *model.buffers()):
        if not value.is_meta and value.numel():
            _broadcast_value(value.detach(), mesh)


def _broadcast_value(value: Tensor, mesh: ParallelMesh) -> None:
    # Bytes, so that dtypes that a backend does not know travel too.
    flat = value.contiguous().to(mesh.device).reshape(-1)
    broadcast_flat(flat.view(torch.uint8), group=mesh.world, journal=mesh.journal)
    value.copy_(flat.view(value.shape))


def _build_units(
    model: nn.Module,
    config: SpeedConfig,
    resolved: ResolvedConfig,
    mesh: ParallelMesh,
    *,
    tiers: MemoryTiers,
    division: Division,
) -> list[Unit]:
    precision = precision_of(model, config, compute_dtype=resolved.compute_dtype)
    plans = plan_units(model, names=division.names, blocks=division.blocks)
    released = released_class(dict(division.names))
    for stages, slices in division.all_sharings():
        # Every rank makes every group, in one order, whether or not it is in it.
        _axes(resolved.stage, mesh, Sharing(stages, slices))
    units = []
    for each in plans:
        groups = [
            _build_group(
                spec,
                _axes(resolved.stage, mesh, spec.sharing),
                resolved.stage,
                tiers=tiers,
                released=released,
            )
            for spec in group_specs(each, precision, division.catalogue.sharing_of)
        ]
        # A pipeline's forwards go through its runner; the model's own call runs many of them.
        through = division.split.runner if each.is_root and division.split else each.module
        units.append(Unit(each._replace(module=through), groups))
    return units


def _axes(stage: int, mesh: ParallelMesh, sharing: Sharing) -> GroupAxes:
    """The ranks that a group deals with. Collective on its first call for a sharing."""
    axes: list[Axis] = ["dp_replicate"] if stage else ["dp_replicate", "dp_shard"]
    within: dict[Axis, tuple[int, ...]] = {}
    if sharing.stages:
        within["pp"] = sharing.stages
    if sharing.slices:
        within["tp"] = sharing.slices
    replica = mesh.axis(*axes, *within, lane=Lane.REDUCE, within=within)
    num_sharers = prod(len(each) for each in within.values())
    if stage == 0:
        return GroupAxes(IDENTITY, IDENTITY, replica, num_sharers)
    return GroupAxes(
        gather=mesh.axis("dp_shard", lane=Lane.GATHER),
        reduce=mesh.axis("dp_shard", lane=Lane.REDUCE),
        replica=replica,
        num_sharers=num_sharers,
    )


def _build_group(
    spec: GroupSpec,
    axes: GroupAxes,
    stage: int,
    *,
    tiers: MemoryTiers,
    released: type[ShardedParameter],
) -> FlatGroup:
    group = FlatGroup(
        spec,
        axes=axes,
        divided=stage == 3,
        device=tiers.device,
        released=released,
        tiers=tiers.of_groups,
    )
    group.adopt()
    return group
