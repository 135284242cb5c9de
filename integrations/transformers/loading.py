"""Models larger than one rank: loaded or made in slices, whole on no rank.

    from_pretrained   transformers reads, of every large tensor, only this rank's rows (its own
    DTensor door:
                      weight converters, renames, tied names and missing keys are all its business)
    (in between)      the model holds parameters that know shape, dtype and device and raise when
    read; the rows wait attach            the engine takes the model over without values, then asks
    for full tensors one by one: each is
                      gathered from the rows, cut into this rank's flat part, and dropped

So host memory sees this rank's rows twice at most (rows and flat part, and rows go as parts come),
plus one tensor. Waiting until attach, and not sharding at once, makes the order of building
arguments and model irrelevant: only then is it known in which dtype the model computes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from hf_speed.config import env
from hf_speed.config.tree import SpeedConfig
from hf_speed.engine import Engine
from hf_speed.errors import ConfigError, ShardedParameterError
from hf_speed.integrations.carrier import SpeedConfigLike, carried_config
from hf_speed.integrations.transformers.parallel import check_dividable, slice_planner
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import all_gather_flat
from hf_speed.zero.parameter import MOVES, ShardedParameter, moves_nothing, placeholder_of

MIN_SLICED_NUMEL = 1024
"""Smaller parameters are loaded whole: slicing them saves nothing and costs a collective each."""

_WAITING = "_hf_speed_waiting"


class WaitingParameter(ShardedParameter):
    """A parameter of a model that was loaded in slices and is not prepared yet."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let metadata through, refuse everything else."""
        stays = func in MOVES and moves_nothing(func, args, kwargs or {})
        if func in cls._metadata or stays:
            return super().__torch_function__(func, types, args, kwargs)
        raise ShardedParameterError(
            f"{getattr(func, '__name__', func)} needs the values of a parameter that was loaded in "
            "slices. Hand the "
            f"model to Trainer or Accelerator.prepare first, then use hf_speed.gathered(model)."
        )


class Rows(NamedTuple):
    """This rank's share of one parameter: a chunk along `dim`, as torch.chunk cuts."""

    local: Tensor
    shape: torch.Size
    dim: int


def from_pretrained(
    auto_class: Any, *args: Any, hf_speed: SpeedConfigLike | None = None, **kwargs: Any
) -> PreTrainedModel:
    """from_pretrained, of which each rank reads only its slices where it will not keep the whole.

    That is at stage 3, in a pipeline (mesh.pp) and with divided layers (mesh.tp). Collective. Hand
    the model to Trainer or Accelerator.prepare next; until then its large parameters raise when
    read. Else, and with one process, this is plain from_pretrained.

    Args:
        auto_class: AutoModelForCausalLM or another auto class, or a model class.
        args: as for from_pretrained.
        hf_speed: the same config as for the Trainer or the Accelerator; None: HF_SPEED_CONFIG.
        kwargs: as for from_pretrained.

    Raises:
        ConfigError: the config is wrong, or another library is asked to place the model.
    """
    wanted = slices_wanted(carried_config(hf_speed))
    for name in ("device_map", "distributed_config", "tp_plan", "quantization_config"):
        if kwargs.get(name) is not None and wanted:
            raise ConfigError(
                f"from_pretrained({name}=...) places or packs the weights itself, and "
                f"zero.stage=3, mesh.pp and mesh.tp spread them. Leave {name} out, or use "
                f"zero.stage=2 or lower without mesh.pp and mesh.tp."
            )
    with sliced_loading(wanted=wanted):
        return auto_class.from_pretrained(*args, **kwargs)


def from_config(
    auto_class: Any, config: Any, *, hf_speed: SpeedConfigLike | None = None, **kwargs: Any
) -> PreTrainedModel:
    """from_config, by which no rank ever holds a whole model that it will not keep.

    Collective. Weights are drawn a module at a time, from the generator that torch.manual_seed
    seeds: with equal seeds the model does not depend on the number of ranks. (Plain from_config
        draws in another order, so its values differ.)

    Args:
        auto_class: an auto class.
        config: the model's config.
        hf_speed: the same config as for the Trainer or the Accelerator; None: HF_SPEED_CONFIG.
        kwargs: as for from_config.

    Raises:
        ConfigError: the hf_speed config is wrong.
    """
    if not slices_wanted(carried_config(hf_speed)):
        return auto_class.from_config(config, **kwargs)

    def from_nothing(cls: type[PreTrainedModel], config: Any, **rest: Any) -> PreTrainedModel:
        rest.setdefault("dtype", config.dtype or torch.get_default_dtype())
        model = cls.from_pretrained(None, config=config, state_dict={}, **rest)
        return model.train()

    with (
        sliced_loading(wanted=True),
        _replaced(PreTrainedModel, "_from_config", classmethod(from_nothing)),
    ):
        return auto_class.from_config(config, **kwargs)


def slices_wanted(config: SpeedConfig | None) -> bool:
    """Whether slices save memory: several ranks, none of which keeps (or may keep) the whole."""
    if config is None:
        return False
    is_divided = config.mesh.pp > 1 or config.mesh.tp > 1
    return (is_divided or config.zero.stage in (3, None)) and _world_size() > 1


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else env.launched_world().world_size


@contextlib.contextmanager
def sliced_loading(*, wanted: bool) -> Iterator[None]:
    """While it lasts, every transformers from_pretrained loads in slices, if wanted."""
    if not wanted:
        yield
        return
    if not dist.is_initialized():
        # As TrainingArguments and Accelerator would; they find this process group.
        PartialState()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    load: Any = PreTrainedModel._load_pretrained_model
    finalize: Any = PreTrainedModel._finalize_model_loading
    initialize: Any = PreTrainedModel._initialize_weights

    def sliced_load(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        _slice_meta(model, mesh)
        return load(model, *args, **kwargs)

    def then_wait(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        info = finalize(model, *args, **kwargs)
        _wait(model)
        return info

    def initialize_rows(
        self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        with _whole(module):
            initialize(self, module, *args, **kwargs)

    with (
        _replaced(PreTrainedModel, "_load_pretrained_model", staticmethod(sliced_load)),
        _replaced(PreTrainedModel, "_finalize_model_loading", staticmethod(then_wait)),
        _replaced(PreTrainedModel, "_initialize_weights", initialize_rows),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _slice_meta(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make large meta parameters DTensors, of which transformers reads only the local chunk."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta or parameter.numel() < MIN_SLICED_NUMEL:
                continue
            dim = _slice_dim(parameter.shape, mesh.size())
            if dim is not None:
                module._parameters[key] = _as_dtensor(parameter, dim, mesh)


def _slice_dim(shape: torch.Size, size: int) -> int | None:
    """The first dim, or else the last, that gives every rank a chunk; None where neither does.

    A rank without a chunk would have nothing to stack where transformers makes one tensor of a list
    of experts. Inner dims are no choice: along them transformers concatenates.
    """
    for dim in (0, len(shape) - 1):
        if -(-shape[dim] // -(-shape[dim] // size)) == size:
            return dim
    return None


def _as_dtensor(like: Tensor, dim: int, mesh: DeviceMesh) -> nn.Parameter:
    local = like.detach().chunk(mesh.size(), dim=dim)[mesh.get_local_rank()]
    shared = DTensor.from_local(
        local.contiguous(),
        mesh,
        [Shard(dim)],
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return nn.Parameter(shared, requires_grad=like.requires_grad)


@contextlib.contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Initialise the direct parameters of a module whole, then keep the local rows."""
    sliced = {
        key: parameter
        for key, parameter in module._parameters.items()
        if parameter is not None
        and isinstance(parameter.data, DTensor)
        and not _is_initialized(parameter)
    }
    for key, parameter in sliced.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        module._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    yield
    for key, parameter in sliced.items():
        whole = module._parameters[key]
        shared: Any = parameter.data
        mesh = shared.device_mesh
        if whole is not None:
            dim = shared.placements[0].dim
            shared._local_tensor.copy_(
                whole.detach().chunk(mesh.size(), dim=dim)[mesh.get_local_rank()]
            )
        module._parameters[key] = parameter


def _is_initialized(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _wait(model: nn.Module) -> None:
    """Replace DTensors by parameters that raise when read; the rows stay with the model."""
    made: dict[int, nn.Parameter] = {}
    rows: dict[nn.Parameter, Rows] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not isinstance(parameter.data, DTensor):
                continue
            if id(parameter) not in made:
                waiting = _waiting_like(parameter)
                made[id(parameter)] = waiting
                shared: Any = parameter.data
                rows[waiting] = Rows(
                    shared._local_tensor, parameter.shape, shared.placements[0].dim
                )
            module._parameters[key] = made[id(parameter)]
    # On the model, so that it goes where the model goes: into a PEFT wrapper, or out of memory.
    vars(model)[_WAITING] = rows


def _waiting_like(parameter: nn.Parameter) -> nn.Parameter:
    placeholder = placeholder_of(parameter.shape, dtype=parameter.dtype, device=torch.device("cpu"))
    waiting = nn.Parameter(placeholder, requires_grad=parameter.requires_grad)
    waiting.__class__ = WaitingParameter
    return waiting


def attach(
    model: nn.Module,
    config: SpeedConfig,
    *,
    compute_dtype: torch.dtype | None,
    device: torch.device,
) -> Engine:
    """Engine.attach, also for models in slices; buffers move to `device` too. Collective.

    Raises:
        ConfigError: the model cannot be spread as the config says.
    """
    check_dividable(model, config)
    rows = _take_rows(model)
    by_name = {name: rows[each] for name, each in model.named_parameters() if each in rows}
    for parameter in rows:
        _to_meta(parameter)
    rows.clear()
    engine = Engine.attach(
        model,
        config,
        compute_dtype=compute_dtype,
        device=device,
        slice_planner=slice_planner(config, device),
    )
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    load_rows(engine, by_name)
    return engine


def load_rows(engine: Engine, rows: dict[str, Rows]) -> None:
    """Fill parameters from rows, which are let go of one by one. A gather each."""
    for name in list(rows):
        engine.set_full_parameter(name, gather_rows(rows.pop(name), engine.mesh))


def _take_rows(model: nn.Module) -> dict[nn.Parameter, Rows]:
    rows: dict[nn.Parameter, Rows] = {}
    for module in model.modules():
        rows |= vars(module).pop(_WAITING, {})
    return rows


def _to_meta(parameter: nn.Parameter) -> None:
    """Make a waiting parameter an ordinary one on the meta device; the object stays the same."""
    parameter.__class__ = nn.Parameter
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    torch.utils.swap_tensors(parameter, nn.Parameter(meta, requires_grad=parameter.requires_grad))


def gather_rows(rows: Rows, mesh: ParallelMesh) -> Tensor:
    """The full tensor, on the mesh's device, from every rank's chunk. One all-gather."""
    world = mesh.world
    if world.is_identity:
        return rows.local.to(mesh.device)
    mine = rows.local.movedim(rows.dim, 0)
    num_rows = rows.shape[rows.dim]
    part_numel = -(-num_rows // world.size) * mine.shape[1:].numel()
    full = torch.zeros(world.size * part_numel, dtype=mine.dtype, device=mesh.device)
    start = world.rank * part_numel
    full[start : start + mine.numel()] = mine.reshape(-1).to(mesh.device)
    all_gather_flat(full, group=world, journal=mesh.journal).wait()
    moved = full[: rows.shape.numel()].view(num_rows, *mine.shape[1:])
    return moved.movedim(0, rows.dim)


def load_whole(engine: Engine, directory: str, *, dtype: torch.dtype) -> None:
    """Fill an engine through transformers' from_pretrained. Collective.

    For layouts that transformers converts. Host memory holds a second copy of this rank's rows (of
    the model, with one process) while it lasts.
    """
    with sliced_loading(wanted=engine.mesh.world.size > 1):
        model: Any = engine.model
        other = type(model).from_pretrained(directory, config=model.config, dtype=dtype)
    waiting = _take_rows(other)
    rows = {name: waiting[each] for name, each in other.named_parameters() if each in waiting}
    for name, parameter in other.named_parameters():
        if name not in rows:
            engine.set_full_parameter(name, parameter.detach())
    load_rows(engine, rows)
