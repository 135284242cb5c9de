"""Between an engine and the `hf_speed/` half of a checkpoint.

Saved: masters where they differ from the weights in the Hub files, the optimizer's tensors and
counters, hyperparameters of its groups, the loss scale, and each rank's RNG. Any number of ranks
reads what any other number wrote: states are intervals of named tensors.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hf_speed.checkpoint.reader import StateReader
from hf_speed.checkpoint.writer import LocalState, write_states
from hf_speed.engine.assemble import Parts
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.zero.states import Holding, holdings, scalar_states, tensor_states

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

MASTER = "master"
PARAMETER_SHAPES = "parameters"

_log = get_logger(__name__)


def save_engine(engine: "Engine", directory: str) -> None:
    """Write the state of one run. Collective.

    Raises:
        CheckpointError: on every rank, if one cannot write.
    """
    parts = engine.parts
    write_states(
        directory,
        local_states(parts, engine.optimizer),
        _meta(engine),
        world=parts.mesh.world,
        scalars=_scalars(parts, engine.optimizer),
        local=_rng_state(parts.mesh.device),
        max_shard_bytes=parts.config.max_shard_bytes,
    )


def local_states(parts: Parts, optimizer: Optimizer | None) -> Iterator[LocalState]:
    """What this rank has to save: of equal copies, the first replica's only."""
    for group in parts.groups:
        if group.axes.replica.rank == 0 and group.trainable:
            with parts.stepper.exposed(group):
                for holding in holdings([group]):
                    yield from _states_of(holding, optimizer)


def _states_of(holding: Holding, optimizer: Optimizer | None) -> Iterator[LocalState]:
    group, slot, piece, slot_piece = holding
    values = dict(tensor_states(optimizer, piece)) if optimizer is not None else {}
    if group.dtypes.master != group.dtypes.compute:
        values[MASTER] = piece.detach()
    for kind, value in sorted(values.items()):
        yield LocalState(
            slot.name,
            kind,
            slot.shape,
            slot_piece.start,
            slot_piece.numel,
            value.detach().reshape(-1),
        )


def _meta(engine: "Engine") -> dict[str, Any]:
    parts = engine.parts
    shapes = {
        slot.name: list(slot.shape)
        for group in parts.groups
        if group.trainable
        for slot in group.layout.slots
    }
    return {
        "mesh": dict(parts.mesh.sizes),
        "stage": parts.config.stage,
        "optimizer": None if engine.optimizer is None else type(engine.optimizer).__name__,
        "param_groups": _hyperparameters(engine.optimizer),
        "loss_scale": None if parts.scaler is None else parts.scaler.state(),
        PARAMETER_SHAPES: shapes,
    }


def _hyperparameters(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    if optimizer is None:
        return []
    return [
        {key: _plain(value) for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def _is_plain(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


def _scalars(parts: Parts, optimizer: Optimizer | None) -> dict[str, dict[str, float]]:
    if optimizer is None:
        return {}
    found = {}
    for _, slot, piece, _ in holdings(parts.groups):
        scalars = scalar_states(optimizer, piece)
        if scalars:
            found[slot.name] = scalars
    return found


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu_rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    return states


def load_engine(engine: "Engine", directory: str) -> None:
    """Read the state of one run into an engine of the same model. Collective.

    Raises:
        CheckpointError: not a whole checkpoint, of another model, or of another optimizer.
    """
    parts = engine.parts
    with StateReader(directory) as reader:
        _check_model(parts, reader)
        for group in parts.groups:
            if group.trainable:
                with parts.stepper.exposed(group, modify=True):
                    for holding in holdings([group]):
                        _load_holding(holding, reader, engine.optimizer)
        if engine.optimizer is not None:
            _check_optimizer(engine.optimizer, reader)
            _load_hyperparameters(engine.optimizer, reader)
        scale = reader.meta.get("loss_scale")
        if parts.scaler is not None and scale is not None:
            parts.scaler.load(scale)
        _load_rng(parts, reader)
    parts.stepper.spread()


def _check_model(parts: Parts, reader: StateReader) -> None:
    stored = {name: tuple(s) for name, s in reader.meta.get(PARAMETER_SHAPES, {}).items()}
    here = {
        slot.name: slot.shape
        for group in parts.groups
        if group.trainable
        for slot in group.layout.slots
    }
    differing = sorted(
        name for name in stored.keys() | here.keys() if stored.get(name) != here.get(name)
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{reader.directory} is of another model: {len(differing)} trainable parameters "
            f"differ, first {name}: {stored.get(name, 'absent')} there, {here.get(name, 'absent')} "
            f"here. Resume with the model and the trainable parameters that it was saved from."
        )


def _check_optimizer(optimizer: Optimizer, reader: StateReader) -> None:
    there, here = reader.meta.get("optimizer"), type(optimizer).__name__
    if there is not None and there != here:
        raise CheckpointError(
            f"{reader.directory} was saved with {there}, but this run uses {here}, whose state "
            f"means something else. Use {there}, or start from the weights alone."
        )


def _load_holding(holding: Holding, reader: StateReader, optimizer: Optimizer | None) -> None:
    _, slot, piece, slot_piece = holding
    for kind in reader.kinds(slot.name):
        value = reader.read(slot.name, kind, slot_piece.start, slot_piece.numel)
        if value is None:
            continue
        if kind == MASTER:
            with torch.no_grad():
                piece.copy_(value.view(piece.shape))
        elif optimizer is not None:
            target = value.view(piece.shape).to(device=piece.device, copy=True)
            optimizer.state[piece][kind] = target
    if optimizer is not None:
        for key, number in reader.scalars.get(slot.name, {}).items():
            optimizer.state[piece][key] = _counter(optimizer, key, float(number), piece)


def _counter(optimizer: Optimizer, key: str, number: float, piece: torch.nn.Parameter) -> Any:
    """A step counter as torch's optimizers keep it: 0-d fp32, on the device when fused."""
    if key != "step":
        return number
    group = next(g for g in optimizer.param_groups if any(p is piece for p in g["params"]))
    on_device = bool(group.get("fused") or group.get("capturable"))
    return torch.tensor(
        number, dtype=torch.float32, device=piece.device if on_device else torch.device("cpu")
    )


def _load_hyperparameters(optimizer: Optimizer, reader: StateReader) -> None:
    stored = reader.meta.get("param_groups", [])
    if len(stored) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{reader.directory} has {len(stored)} optimizer groups, this run has "
            f"{len(optimizer.param_groups)}. Make the optimizer with the same groups."
        )
    for group, values in zip(optimizer.param_groups, stored, strict=True):
        for key, value in values.items():
            now = group.get(key)
            if isinstance(now, torch.Tensor):
                now.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(now, tuple) else value


def _load_rng(parts: Parts, reader: StateReader) -> None:
    local = reader.local(parts.mesh.rank)
    if "cpu_rng" not in local:
        _log.warning(
            "%s has no RNG state for rank %d (it was saved by %d ranks): dropout and sampling will "
            "differ from the run that wrote it.",
            reader.directory,
            parts.mesh.rank,
            reader.manifest.world_size,
        )
        return
    torch.set_rng_state(local["cpu_rng"])
    if "cuda_rng" in local and parts.mesh.device.type == "cuda":
        torch.cuda.set_rng_state(local["cuda_rng"], parts.mesh.device)
