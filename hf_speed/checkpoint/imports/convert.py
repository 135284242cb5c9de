"""Writing what another framework has saved as a checkpoint of hf_speed: the model, then the states.

    handles -> names and layout of the model in memory -> write_model, write_states -> rename

One process does it, one tensor at a time. The names of a file may be those of the model in memory,
or those that the model has on the Hub, where some layers are stored in other pieces: the states of
such pieces are joined as the weights are, since a moment belongs to its element wherever that goes.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.imports.foreign import Foreign
from hf_speed.checkpoint.model_writer import write_model
from hf_speed.checkpoint.plan import ModelPlan
from hf_speed.checkpoint.tensorfile import sync_directory
from hf_speed.checkpoint.writer import LocalState, write_states
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.mesh.axes import IDENTITY

MASTER = "master"
STEP = "step"

_STATE_FILE_BYTES = 1 << 30
"""Of a file with states, at most; as many wait in memory."""

Tensors = Mapping[str, Tensor]


class StateGroup(NamedTuple):
    """Tensors in the files whose states together are those of parameters of the model.

    Attributes:
        stored: names in the files.
        names: names in the model, in its order.
        shapes: of those.
        convert: from values by stored name to values by name; None: the one is the other.
    """

    stored: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    convert: Callable[[Tensors], Tensors] | None = None


class Naming(NamedTuple):
    """How the tensors of a foreign checkpoint become those of a model.

    Attributes:
        plan: of the model's files.
        stored: source of the plan -> name in the foreign checkpoint.
        groups: of states; every trained parameter in one.
    """

    plan: ModelPlan
    stored: Mapping[str, str]
    groups: tuple[StateGroup, ...]


def write_imported(
    directory: Path,
    foreign: Foreign,
    naming: Naming,
    meta: Mapping[str, Any],
    *,
    max_shard_bytes: int,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint of hf_speed. It appears at once or not at all.

    Args:
        directory: absent or empty.
        foreign: what is imported.
        naming: of its tensors.
        meta: of the run, as the engine reads it.
        max_shard_bytes: of a file with states; one of more than a GiB is cut.
        extras: writes what else belongs to the model into a directory.

    Raises:
        CheckpointError: a file cannot be read or written, or pieces do not fit.
        ConfigError: `directory` is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(
            f"{directory} exists already and is not empty; import to a new directory."
        )
    staging = directory.with_name(f".{directory.name}.importing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write_model(staging, naming.plan, _weights(foreign, naming), world=IDENTITY, extras=extras)
        write_states(
            staging,
            _states(foreign, naming),
            meta,
            world=IDENTITY,
            scalars=_scalars(foreign, naming.groups),
            max_shard_bytes=min(max_shard_bytes, _STATE_FILE_BYTES),
        )
        staging.replace(directory)
        sync_directory(directory.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"Importing to {directory} failed: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _weights(foreign: Foreign, naming: Naming) -> Iterator[tuple[str, Tensor]]:
    for group in naming.plan.groups:
        for source in group.sources:
            if source in naming.stored:
                yield source, foreign.weights[naming.stored[source]].read()


def _states(foreign: Foreign, naming: Naming) -> Iterator[LocalState]:
    """Masters that the files lack, and moments, one tensor at a time."""
    in_files = {
        name: spec.dtype
        for file in naming.plan.files
        for spec in file.tensors
        for name in (spec.name,)
    }
    homes = {
        naming.stored[source]: in_files[group.targets[0]]
        for group in naming.plan.groups
        for source in group.sources
        if source in naming.stored and group.targets
    }
    for group in naming.groups:
        for kind, values in _kinds(foreign, group, homes):
            whole = {name: value.read() for name, value in values.items()}
            if group.convert is not None:
                parts = group.convert(whole)
            else:
                parts = {group.names[0]: whole[group.stored[0]]}
            del whole
            for name, shape in zip(group.names, group.shapes, strict=True):
                yield _local(name, kind, shape, parts[name])
            del parts


def _kinds(
    foreign: Foreign, group: StateGroup, homes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, dict[str, Any]]]:
    masters = {name: foreign.weights[name] for name in group.stored}
    # Files of fp32 hold all bits of any master.
    if any(homes[name] not in (torch.float32, value.dtype) for name, value in masters.items()):
        yield MASTER, masters
    kinds = {kind for name in group.stored for kind in foreign.states.get(name, {})}
    for kind in sorted(kinds):
        values = {
            name: foreign.states[name][kind]
            for name in group.stored
            if kind in foreign.states.get(name, {})
        }
        if len(values) < len(group.stored):
            absent = next(name for name in group.stored if name not in values)
            raise CheckpointError(
                f"The checkpoint has {kind} of {next(iter(values))} but not of {absent}, which is "
                f"one parameter of the model with it."
            )
        for name, value in values.items():
            if value.shape != foreign.weights[name].shape:
                raise CheckpointError(
                    f"{kind} of {name} has shape {value.shape}, the parameter has "
                    f"{foreign.weights[name].shape}."
                )
        yield kind, values


def _local(name: str, kind: str, shape: tuple[int, ...], value: Tensor) -> LocalState:
    if value.numel() != prod(shape):
        raise CheckpointError(f"{kind} of {name} has {value.numel()} elements, not shape {shape}.")
    flat = value.reshape(-1)
    # Runs of 16-bit weights keep fp32 masters here, and moments of their dtype.
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    return LocalState(name, kind, shape, 0, flat.numel(), flat)


def _scalars(foreign: Foreign, groups: Iterable[StateGroup]) -> dict[str, dict[str, float]]:
    """Counters by name in the model.

    Raises:
        CheckpointError: there are moments, but nothing says of which step.
    """
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        first = group.stored[0]
        counters = dict(foreign.scalars.get(first, {}))
        if foreign.states.get(first) and STEP not in counters:
            if foreign.step is None:
                raise CheckpointError(
                    f"The checkpoint has moments of {first} but says of no step, by which Adam "
                    f"corrects them. Give it: import_checkpoint(..., step=N)."
                )
            counters[STEP] = float(foreign.step)
        if counters:
            found |= dict.fromkeys(group.names, counters)
    return found


def inverse(
    convert: Callable[[Tensors], Tensors],
    shapes: Mapping[str, tuple[int, ...]],
) -> Callable[[Tensors], Tensors]:
    """The inverse of a conversion that moves elements: it cuts, stacks, transposes, but never adds.

    Numbers in the place of elements are sent through once, which shows where each goes. They take
    8 bytes an element.

    Args:
        convert: from tensors of `shapes` to others.
        shapes: by name.

    Returns:
        From those others, by name, to tensors of `shapes`.

    Raises:
        CheckpointError: an element is lost or doubled on the way.
    """
    begin = 0
    marked: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        marked[name] = torch.arange(begin, begin + prod(shape)).view(shape)
        begin += prod(shape)
    places = {name: value.reshape(-1) for name, value in convert(marked).items()}
    seen = torch.zeros(begin, dtype=torch.bool)
    for place in places.values():
        seen[place] = True
    if sum(place.numel() for place in places.values()) != begin or not bool(seen.all()):
        raise CheckpointError(
            f"The layout of {', '.join(shapes)} on the Hub cannot be turned back element "
            f"by element."
        )

    def back(values: Tensors) -> Tensors:
        dtype = next(iter(values.values())).dtype
        flat = torch.empty(begin, dtype=dtype)
        for name, place in places.items():
            flat[place] = values[name].reshape(-1)
        parts = flat.split([prod(shape) for shape in shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    return back
