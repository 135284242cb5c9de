"""Between an engine and the `hf_speed/` half of a checkpoint.

Saved: masters where they differ from the weights in the Hub files, the optimizer's tensors and
counters, hyperparameters of its groups, the loss scale, and each rank's RNG. Any mesh reads what
any other wrote: states are boxes of named whole tensors, of which a rank holds an interval, or an
interval of its slice. Names and shapes are those of the whole model (`catalogue.py`).
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hf_speed.checkpoint.reader import StateReader
from hf_speed.checkpoint.saver import Save
from hf_speed.checkpoint.snapshot import copy_states
from hf_speed.checkpoint.writer import LocalState, write_states
from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.report import package_versions
from hf_speed.engine.rng import MESH, load_rng, rng_state
from hf_speed.errors import CheckpointError
from hf_speed.zero.states import Holding, holdings, scalar_states, tensor_states

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

MASTER = "master"
PARAMETER_SHAPES = "parameters"


def save_engine(engine: "Engine", directory: str, save: Save) -> None:
    """Write the state of one run, or queue it in a save that runs behind. Collective.

    Raises:
        CheckpointError: on every rank, if one cannot write.
    """
    parts = engine.parts
    states = local_states(parts, engine.optimizer)
    save.submit(
        partial(
            write_states,
            directory,
            copy_states(states) if save.is_behind else states,
            run_meta(engine),
            world=save.group,
            scalars=_scalars(parts, engine.optimizer),
            local=rng_state(parts.mesh.device),
            max_shard_bytes=parts.config.max_shard_bytes,
            written=save.written,
        )
    )


def local_states(parts: Parts, optimizer: Optimizer | None) -> Iterator[LocalState]:
    """What this rank has to save: of copies that several ranks hold, the first one's only."""
    for group in parts.groups:
        if group.axes.replica.rank == 0 and group.trainable:
            with parts.stepper.exposed(group):
                for holding in holdings([group]):
                    if parts.catalogue.is_counted(holding.slot.name):
                        yield from _states_of(holding, optimizer, parts.catalogue)


def _states_of(
    holding: Holding, optimizer: Optimizer | None, catalogue: Catalogue
) -> Iterator[LocalState]:
    group, slot, piece, slot_piece = holding
    record = catalogue.record(slot.name)
    values = dict(tensor_states(optimizer, piece)) if optimizer is not None else {}
    if group.dtypes.master != group.dtypes.compute:
        values[MASTER] = piece.detach()
    for kind, value in sorted(values.items()):
        yield LocalState(
            record.name,
            kind,
            record.shape,
            slot_piece.start,
            slot_piece.numel,
            value.detach().reshape(-1),
            slicing=record.slicing,
            tp_rank=catalogue.tp_rank,
        )


def run_meta(engine: "Engine") -> dict[str, Any]:
    """What a manifest says of the run as a whole. JSON; no collective."""
    parts = engine.parts
    return {
        MESH: dict(parts.mesh.sizes),
        "stage": parts.config.stage,
        "optimizer": None if engine.optimizer is None else type(engine.optimizer).__name__,
        "param_groups": _hyperparameters(engine.optimizer),
        "loss_scale": None if parts.scaler is None else parts.scaler.state(),
        PARAMETER_SHAPES: {
            name: list(shape) for name, shape in _trainable(parts.catalogue).items()
        },
        "config": engine.given_config.to_dict(),
        "versions": package_versions(),
        "notes": dict(engine.notes),
    }


def _trainable(catalogue: Catalogue) -> dict[str, tuple[int, ...]]:
    """Whole shapes of what is trained, on whichever rank."""
    return {record.name: record.shape for record in catalogue.records.values() if record.trainable}


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
            found[parts.catalogue.record(slot.name).name] = scalars
    return found


def load_engine(engine: "Engine", directory: str) -> None:
    """Read the state of one run into an engine of the same model. Collective.

    Raises:
        CheckpointError: not a whole checkpoint, of another model, or of another optimizer.
    """
    parts = engine.parts
    with StateReader(directory) as reader:
        _check_model(parts.catalogue, reader)
        for group in parts.groups:
            if group.trainable:
                with parts.stepper.exposed(group, modify=True):
                    for holding in holdings([group]):
                        _load_holding(holding, reader, engine.optimizer, parts.catalogue)
        if engine.optimizer is not None:
            _check_optimizer(engine.optimizer, reader)
            _load_hyperparameters(engine.optimizer, reader)
        scale = reader.meta.get("loss_scale")
        if parts.scaler is not None and scale is not None:
            parts.scaler.load(scale)
        load_rng(parts.mesh, reader)
    parts.stepper.spread()


def _check_model(catalogue: Catalogue, reader: StateReader) -> None:
    shapes = reader.meta.get(PARAMETER_SHAPES)
    if shapes is None:
        return  # Imported weights: what is trained from here on is this run's choice.
    stored = {name: tuple(s) for name, s in shapes.items()}
    here = _trainable(catalogue)
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


def _load_holding(
    holding: Holding, reader: StateReader, optimizer: Optimizer | None, catalogue: Catalogue
) -> None:
    _, slot, piece, slot_piece = holding
    record = catalogue.record(slot.name)
    for kind in reader.kinds(record.name):
        value = reader.read(
            record.name,
            kind,
            slot_piece.start,
            slot_piece.numel,
            slicing=record.slicing,
            tp_rank=catalogue.tp_rank,
        )
        if value is None:
            continue
        if kind == MASTER:
            with torch.no_grad():
                piece.copy_(value.view(piece.shape))
        elif optimizer is not None:
            target = value.view(piece.shape).to(device=piece.device, copy=True)
            optimizer.state[piece][kind] = target
    if optimizer is not None:
        for key, number in reader.scalars.get(record.name, {}).items():
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
    stored = reader.meta.get("param_groups")
    if stored is None:
        return  # Imported weights, which no optimizer came with.
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
