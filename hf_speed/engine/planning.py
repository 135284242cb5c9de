"""What will be built, decided before anything is: dtypes, groups, bytes, the resolved config."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from hf_speed.config import Memory, ResolvedConfig, SpeedConfig, env, resolve
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.estimate import Estimator, GroupSize
from hf_speed.engine.report import memory_of_machine
from hf_speed.errors import ConfigError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import agree, all_reduce_small
from hf_speed.mesh.journal import Journal
from hf_speed.zero.parameter import ShardedParameter
from hf_speed.zero.precision import PrecisionPlan, fp32_module_names
from hf_speed.zero.spec import Dtypes, GroupSpec, Sharing
from hf_speed.zero.units import ParameterEntry, UnitPlan, plan_units


def plan(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    device: torch.device,
    catalogue: Catalogue,
    names: Mapping[int, str],
    blocks: Mapping[str, nn.Module],
) -> ResolvedConfig:
    """Resolve every AUTO of `config` for this model, world and machine. Allocates nothing.

    Collective: one small all-reduce, so that ranks that see different amounts of free memory
    choose the same plan; where stages or slices differ, all plan for the largest.

    Args:
        model: what this rank has of it.
        config: what the user set.
        compute_dtype: of mixed precision.
        device: where modules compute.
        catalogue: of the whole model.
        names: id of a parameter -> its name in the whole model.
        blocks: of the whole model, that become units.

    Raises:
        ConfigError: the config cannot take effect, or nothing that it allows fits.
    """
    world = _world()
    units = sizes_of(
        model,
        config,
        compute_dtype=compute_dtype,
        names=names,
        sharing_of=catalogue.sharing_of,
        blocks=blocks,
    )
    if config.mesh.pp * config.mesh.tp > 1:
        units = _largest(units, world)
    return resolve(
        config,
        world_size=world.size,
        param_dtype=_agreed_dtype(prevailing_dtype(model), config, world),
        compute_dtype=compute_dtype,
        needed=Estimator(units, config, world_size=world.size, device_type=device.type).needed,
        memory=_agreed_memory(config, world, device=device),
        device_type=device.type,
    )


def _largest(units: list[list[GroupSize]], world: AxisGroup) -> list[list[GroupSize]]:
    """The units of the rank that has most to hold."""
    everyone: list[list[list[GroupSize]]] = [[] for _ in range(world.size)]
    dist.all_gather_object(everyone, units, group=world.group)
    return max(everyone, key=lambda each: sum(sum(g.numels) for unit in each for g in unit))


def _agreed_dtype(dtype: torch.dtype, config: SpeedConfig, world: AxisGroup) -> torch.dtype:
    """That of rank 0, where stages may differ."""
    if config.mesh.pp == 1:
        return dtype
    everyone = [dtype] * world.size
    dist.all_gather_object(everyone, dtype, group=world.group)
    return everyone[0]


def prevailing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most elements of the parameters; float32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def sizes_of(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    names: Mapping[int, str] | None = None,
    sharing_of: Callable[[str], Sharing] = lambda _: Sharing(),
    blocks: Mapping[str, nn.Module] | None = None,
) -> list[list[GroupSize]]:
    """The groups of each unit of `model`, which may be on the meta device, as sizes.

    Args:
        model: the model, or what this rank has of it.
        config: what the user set.
        compute_dtype: of mixed precision.
        names: id of a parameter -> its name in the whole model, where this is a part.
        sharing_of: name of a parameter -> the ranks that hold equal copies of it.
        blocks: what becomes units; None: what the config names, or the model's own blocks.

    Raises:
        ConfigError: the config names units that the model lacks.
    """
    precision = precision_of(model, config, compute_dtype=compute_dtype)
    classes = None if isinstance(config.zero.units, str) else config.zero.units
    return [
        [GroupSize.of(spec) for spec in group_specs(unit, precision, sharing_of)]
        for unit in plan_units(model, classes, names=names, blocks=blocks)
    ]


def precision_of(
    model: nn.Module, config: SpeedConfig, *, compute_dtype: torch.dtype | None
) -> PrecisionPlan:
    """The dtypes that `config` gives to the parameters of `model`."""
    chosen = config.precision
    wire = chosen.reduce_dtype
    return PrecisionPlan(
        compute=compute_dtype if chosen.working_dtype == "compute" else None,
        master=torch.float32 if chosen.master_dtype == "float32" else None,
        wire=None if wire is None else _DTYPES[wire],
        accumulate=torch.float32 if chosen.accumulate_dtype == "float32" else None,
        keep_fp32=fp32_module_names(model),
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _world() -> AxisGroup:
    """All processes, before there is a mesh."""
    started = dist.is_available() and dist.is_initialized()
    if not started or dist.get_world_size() == 1:
        return IDENTITY
    return AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")


def _agreed_memory(config: SpeedConfig, world: AxisGroup, *, device: torch.device) -> Memory:
    """The least that any rank has of each tier."""
    memory, failure = Memory(0), None
    try:
        launched = env.launched_world()
        num_ranks = launched.local_world_size if launched.launched else world.size
        memory = memory_of_machine(config.offload, device=device, num_ranks=num_ranks)
    except ConfigError as error:
        failure = error
    elsewhere = agree(failure, group=world) if config.offload.paths else None
    if failure is not None:
        raise failure
    if elsewhere is not None:
        raise ConfigError(elsewhere)
    least = torch.tensor(memory[:3], dtype=torch.int64, device=device)
    journal = Journal(enabled=False)
    all_reduce_small(least, group=world, journal=journal, op=dist.ReduceOp.MIN)
    return Memory(*least.tolist(), shared=memory.shared)


def group_specs(
    unit: UnitPlan,
    precision: PrecisionPlan,
    sharing_of: Callable[[str], Sharing] = lambda _: Sharing(),
) -> list[GroupSpec]:
    """Divide a unit by dtypes, requires_grad and sharing: what is flat must be alike.

    Args:
        unit: the unit.
        precision: gives every parameter its dtypes.
        sharing_of: name of a parameter -> the ranks that hold equal copies of it.

    Raises:
        ConfigError: a trainable parameter of a dtype that cannot have gradients.
    """
    divided: dict[tuple[Dtypes, bool, Sharing], list[ParameterEntry]] = {}
    for entry in unit.entries:
        parameter = entry.parameter
        _check_kind(entry.name, parameter)
        dtypes = precision.dtypes_of(entry.name, parameter)
        key = (dtypes, parameter.requires_grad, sharing_of(entry.name))
        divided.setdefault(key, []).append(entry)
    label = unit.name or "root"
    return [
        GroupSpec(f"{label}[{index}]", tuple(entries), dtypes, trainable, sharing)
        for index, ((dtypes, trainable, sharing), entries) in enumerate(divided.items())
    ]


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, ShardedParameter):
        raise ConfigError(
            f"{name} is sharded by another engine already. Call its detach() first, or prepare "
            f"each model once."
        )
    if type(parameter) is not nn.Parameter:
        raise ConfigError(
            f"{name} is a {type(parameter).__name__}: hf_speed flattens plain parameters only. "
            f"Load the model without quantisation and without another library's sharding."
        )
