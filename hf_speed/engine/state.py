"""Between an engine and the `hf_speed/` half of a checkpoint.

Saved: masters where the Hub files do not hold them bit for bit, the optimizer's tensors and
counters, hyperparameters of its groups, the loss scale, and each rank's RNG. Any mesh reads what
any other wrote: states are boxes of named whole tensors, of which a rank holds an interval, or an
interval of its slice. Names and shapes are those of the whole model (`catalogue.py`).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_speed.checkpoint.reader import StateReader
from hf_speed.checkpoint.saver import Save
from hf_speed.checkpoint.snapshot import copy_states
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.writer import LocalState, write_states
from hf_speed.checkpoint.written import FullWeights
from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.delivery import can_deliver
from hf_speed.engine.optimizer_state import (
    MASTER,
    OptimizerLoader,
    optimizer_meta,
    optimizer_scalars,
    optimizer_tensors,
)
from hf_speed.engine.report import package_versions
from hf_speed.engine.rng import load_rng, rng_state
from hf_speed.engine.saved_run import (
    LOSS_SCALE,
    MASTERS_IN_FILES,
    MESH,
    PARAMETER_SHAPES,
    SavedRun,
    dtype_name,
    saved_run,
)
from hf_speed.errors import CheckpointError
from hf_speed.optim.families import OptimizerChange
from hf_speed.zero.states import Holding, holdings

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

_HALF_LOADED = "The state of this run may be half replaced: load another checkpoint, or start anew."


def save_engine(engine: "Engine", directory: str, save: Save) -> None:
    """Write the state of one run, or queue it in a save that runs behind. Collective.

    Raises:
        CheckpointError: on every rank, if one cannot write.
    """
    parts = engine.parts
    full = save.full_weights.get(Path(directory))
    states = local_states(parts, engine.optimizer, full)
    meta = run_meta(engine) | {MASTERS_IN_FILES: None if full is None else dtype_name(full.dtype)}
    save.submit(
        partial(
            write_states,
            directory,
            _kept(states, parts, save) if save.is_behind else states,
            meta,
            world=save.group,
            scalars=optimizer_scalars(parts, engine.optimizer),
            local=rng_state(parts.mesh.device),
            max_shard_bytes=parts.config.max_shard_bytes,
            written=save.written,
        )
    )


def _kept(states: Iterator[LocalState], parts: Parts, save: Save) -> Iterator[LocalState]:
    """States that may be read when the jobs of a save run: where they are, or else copies."""
    if not can_deliver(parts):
        return copy_states(states)
    held = [
        state._replace(held=save.hold(state.value, f"{state.kind} of {state.name}"))
        for state in states
    ]
    return iter(held)


def local_states(
    parts: Parts, optimizer: Optimizer | None, full: FullWeights | None = None
) -> Iterator[LocalState]:
    """What this rank has to save: of copies that several ranks hold, the first one's only.

    Args:
        parts: of the engine.
        optimizer: bound to it.
        full: the masters that the model's files beside the state hold, bit for bit.
    """
    for group in parts.groups:
        if group.axes.replica.rank == 0 and group.trainable:
            with parts.stepper.exposed(group):
                for holding in holdings([group]):
                    if parts.catalogue.is_counted(holding.slot.name):
                        yield from _states_of(holding, optimizer, parts.catalogue, full)


def _states_of(
    holding: Holding,
    optimizer: Optimizer | None,
    catalogue: Catalogue,
    full: FullWeights | None,
) -> Iterator[LocalState]:
    group, slot, piece, slot_piece = holding
    record = catalogue.record(slot.name)
    values: dict[str, Tensor] = {}
    if optimizer is not None:
        values |= optimizer_tensors(optimizer, holding, sliced=record.slicing is not None)
    is_stored = full is not None and full.holds(record.name, group.dtypes.master)
    if group.dtypes.master != group.dtypes.compute and not is_stored:
        values[MASTER] = piece.detach()
    for kind, value in sorted(values.items()):
        flat = value.detach().reshape(-1)
        if value.shape != piece.shape:
            yield LocalState(record.name, kind, tuple(value.shape), 0, flat.numel(), flat)
            continue
        yield LocalState(
            record.name,
            kind,
            record.shape,
            slot_piece.start,
            slot_piece.numel,
            flat,
            slicing=record.slicing,
            tp_rank=catalogue.tp_rank,
        )


def run_meta(engine: "Engine") -> dict[str, Any]:
    """What a manifest says of the run as a whole. JSON; no collective."""
    parts = engine.parts
    return {
        MESH: dict(parts.mesh.sizes),
        "stage": parts.config.stage,
        **optimizer_meta(engine.optimizer),
        LOSS_SCALE: None if parts.scaler is None else parts.scaler.state(),
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


def load_engine(engine: "Engine", directory: str) -> OptimizerChange | None:
    """Read the state of one run into an engine of the same model. Collective.

    Returns:
        How the stored optimizer became the bound one; None where none is bound.

    Raises:
        CheckpointError: not a whole checkpoint, of another model, or of another optimizer.
    """
    parts = engine.parts
    # What one rank finds wrong stops all of them, before the collective that follows.
    with (
        agreed(parts.mesh.world, f"Loading {directory}", left=_HALF_LOADED),
        StateReader(directory) as reader,
    ):
        run = saved_run(reader.meta, reader.where)
        _check_model(parts.catalogue, run, reader)
        loader = None
        if engine.optimizer is not None:
            loader = OptimizerLoader(
                engine.optimizer, run, reader, streams=parts.stepper.updates is not None
            )
        for group in parts.groups:
            if group.trainable:
                with parts.stepper.exposed(group, modify=True):
                    for holding in holdings([group]):
                        _load_holding(holding, reader, loader, parts.catalogue)
        if loader is not None:
            loader.load_settings()
        if parts.scaler is not None and run.loss_scale is not None:
            parts.scaler.load(run.loss_scale)
        load_rng(parts.mesh, reader)
    parts.stepper.spread()
    return None if loader is None else loader.change


def _check_model(catalogue: Catalogue, run: SavedRun, reader: StateReader) -> None:
    here = _trainable(catalogue)
    # Imported weights do not say it: what is trained from here on is this run's choice.
    stored = here if run.shapes is None else run.shapes
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
    for name, shape in here.items():
        if MASTER in reader.kinds(name) and reader.shape(name, MASTER) != shape:
            raise CheckpointError(
                f"{reader.directory} is of another model: its {MASTER} of {name} has the shape "
                f"{reader.shape(name, MASTER)}, the parameter here has {shape}."
            )


def _load_holding(
    holding: Holding, reader: StateReader, loader: OptimizerLoader | None, catalogue: Catalogue
) -> None:
    _, slot, piece, slot_piece = holding
    record = catalogue.record(slot.name)
    if MASTER in reader.kinds(record.name):
        value = reader.read(
            record.name,
            MASTER,
            slot_piece.start,
            slot_piece.numel,
            slicing=record.slicing,
            tp_rank=catalogue.tp_rank,
        )
        if value is not None:
            with torch.no_grad():
                piece.copy_(value.view(piece.shape))
    if loader is not None:
        loader.load(holding, record, catalogue.tp_rank)
