"""Weights between an engine and a directory, for the Trainer and the Accelerator alike.

out   engine.full_parameters -> hub.save_hub_model (every rank its own files), or PEFT's own layout
for adapters in    hf_speed/ state where a checkpoint has it (exact masters), else the Hub files,
slice by slice

The dtype in files is the one that the model came in, taken from the masters: a model loaded in fp32
and trained with bf16=True is saved in fp32, as transformers does.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_speed.checkpoint import StateReader, agreed
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME, ModelPlan
from hf_speed.checkpoint.saver import Save
from hf_speed.checkpoint.verify import verify_weights
from hf_speed.engine import Engine
from hf_speed.engine.buffers import full_buffers, persistent_buffers
from hf_speed.engine.delivery import can_deliver, deliver_parameters
from hf_speed.engine.rng import load_rng, share_rng
from hf_speed.engine.saved_run import MESH, masters_in_files
from hf_speed.errors import CheckpointError
from hf_speed.integrations.transformers.hub import (
    Stored,
    StoredTensors,
    plan_hub_model,
    save_hub_model,
)
from hf_speed.integrations.transformers.loading import load_whole


def file_dtype(engine: Engine) -> torch.dtype | None:
    """The dtype of floating-point weights in files; None: the one that they compute in."""
    config = engine.config
    return None if config.compute_dtype in (None, config.param_dtype) else config.param_dtype


def full_weights(
    engine: Engine, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of parameters, from the masters where there are any.

    Each is valid until the next. Collective, unit by unit.
    """
    chosen = None if names is None else list(names)
    return engine.full_parameters(chosen, master=file_dtype(engine) is not None)


def stored_tensors(engine: Engine) -> StoredTensors:
    """What the whole model is made of, of which this rank may have a part. No collective."""
    parts = engine.parts
    names: dict[str, list[str]] = {}
    for alias, first in parts.catalogue.aliases.items():
        names.setdefault(first, []).append(alias)

    def dtype_of(name: str) -> torch.dtype:
        record = parts.catalogue.record(name)
        return parts.precision.dtypes_for(name, record.dtype, trainable=record.trainable).compute

    return StoredTensors(
        tuple(
            Stored(tuple(names[name]), record.shape, dtype_of(name))
            for name, record in parts.catalogue.records.items()
        ),
        tuple(Stored((each.name,), each.shape, each.dtype) for each in parts.division.buffers),
    )


def full_state_dict(engine: Engine) -> dict[str, Tensor]:
    """What `model.state_dict()` would be. Collective.

    Where every rank keeps all parameters in memory (stages 0 to 2, without pipeline and slicing):
    on every rank, without a copy where no dtype changes. Elsewhere: on rank 0 in host memory, and
    {} on the others.
    """
    is_spread = is_spread_out(engine)
    keeps = not is_spread or engine.mesh.world.rank == 0
    dtype = file_dtype(engine)
    weights: dict[str, Tensor] = {}
    for name, value in full_weights(engine):
        if keeps:
            kept = (
                value.detach().to(dtype=dtype)
                if dtype is not None and value.is_floating_point()
                else value.detach()
            )
            weights[name] = kept.to("cpu", copy=True) if is_spread else kept
    for name, buffer in full_buffers(engine):
        if keeps:
            weights[name] = buffer.detach()
    if not keeps:
        return {}
    return {key: weights[known] for key, known in _state_keys(engine) if known in weights}


def is_spread_out(engine: Engine) -> bool:
    """Whether no rank has the whole model in memory."""
    return engine.is_sharded or engine.parts.division.is_divided


def _state_keys(engine: Engine) -> Iterator[tuple[str, str]]:
    """(state dict key, first name of the same tensor), in the order of `state_dict()`."""
    if engine.parts.division.is_divided:
        # Modules of other stages are not here to say where a buffer stands between parameters.
        yield from engine.parts.catalogue.aliases.items()
        yield from ((each.name, each.name) for each in engine.parts.division.buffers)
        return
    first: dict[int, str] = {}
    for path, module in engine.model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield prefix + key, first.setdefault(id(tensor), prefix + key)


def write_model(
    engine: Engine,
    directory: str,
    *,
    max_shard_bytes: int | None = None,
    save: Save | None = None,
) -> None:
    """Write the model for the Hub. Collective.

    Every rank writes its own files; adapters come from rank 0, in PEFT's layout, and never behind
    the training: they are small.

    Args:
        engine: of the model.
        directory: made if absent.
        max_shard_bytes: largest file; None: as the config says.
        save: that this is a part of; None: all is written on return.
    """
    if save is None:
        save = engine.saves.at_once(f"Saving the model to {directory}")
    if is_peft(engine.model):
        state = adapter_state(engine)
        model: Any = engine.model
        with agreed(engine.mesh.world, f"Saving the adapters to {directory}"):
            if engine.mesh.world.rank == 0:
                model.save_pretrained(directory, state_dict=state)
        return
    if can_deliver(engine.parts):
        master = file_dtype(engine) is not None
        parameters = partial(deliver_parameters, engine, save=save, master=master)
    else:
        parameters = full_weights(engine)
    save_hub_model(
        engine.model,
        directory,
        parameters,
        save=save,
        buffers=full_buffers(engine),
        max_shard_bytes=max_shard_bytes or engine.config.max_shard_bytes,
        dtype=file_dtype(engine),
        tensors=stored_tensors(engine),
    )


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT saves this model: a PeftModel, or one that adapters were added to."""
    return bool(getattr(model, "peft_config", None))


def adapter_names(engine: Engine) -> list[str]:
    """The parameters that PEFT may save: everything but the frozen weights of the base model."""
    prefix = getattr(getattr(engine.model, "base_model", None), "prefix", "lora_")
    return [
        name
        for name, record in engine.parts.catalogue.records.items()
        if record.trainable or prefix in name or "modules_to_save" in name
    ]


def adapter_state(engine: Engine) -> dict[str, Tensor]:
    """What PEFT may save, whole, on rank 0 in host memory; {} on others. Collective."""
    keeps = engine.mesh.world.rank == 0
    names = adapter_names(engine)
    state = {
        name: value.detach().to("cpu", copy=True)
        for name, value in full_weights(engine, names)
        if keeps
    }
    return state | {name: buffer for name, buffer in full_buffers(engine) if keeps}


def has_engine_state(directory: str) -> bool:
    """Whether a checkpoint holds hf_speed's own state, saved to the end."""
    return (Path(directory) / MANIFEST_PATH).is_file()


def full_dtype(directory: str) -> torch.dtype | None:
    """The dtype of a checkpoint's weights where they are its only masters; None where not."""
    if not has_engine_state(directory):
        return None
    with StateReader(directory) as reader:
        return masters_in_files(reader.meta, reader.where)


def restore_rng(engine: Engine, directory: str) -> None:
    """On another mesh than that of a checkpoint, random states by batch. Collective.

    On the same mesh they are those of the processes, which transformers and accelerate restore.
    """
    if not has_engine_state(directory):
        return
    with StateReader(directory) as reader:
        if reader.meta.get(MESH) == dict(engine.mesh.sizes):
            return
        load_rng(engine.mesh, reader, says_so=False)
    share_rng(engine.mesh)


def load_model(engine: Engine, directory: str) -> None:
    """The inverse of `write_model`. Collective.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another model; or a
            save that was in flight has failed.
    """
    engine.saves.wait()
    verify_weights(directory, world=engine.mesh.world)
    if is_peft(engine.model):
        _load_adapters(engine, directory)
    else:
        load_weights(engine, directory)


def _load_adapters(engine: Engine, directory: str) -> None:
    """Read every adapter of a PEFT model; its frozen base is not part of a checkpoint.

    PEFT's own loader reads `model.state_dict()`, for which the base would have to be gathered. Its
    saver only renames, so it is asked for the names of tensors without values.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    model: Any = engine.model
    shapes = {name: record.shape for name, record in engine.parts.catalogue.records.items()}
    empty = {name: torch.empty(shapes[name], device="meta") for name in adapter_names(engine)}
    name_of = {id(value): name for name, value in empty.items()}
    for adapter in model.peft_config:
        home = directory if adapter == "default" else f"{directory}/{adapter}"
        saved = get_peft_model_state_dict(
            model, state_dict=empty, adapter_name=adapter, save_embedding_layers=False
        )
        known = {key: name_of.get(id(value)) for key, value in saved.items()}
        try:
            stored = load_peft_weights(home, device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{home} holds no readable adapter {adapter!r}: {error}."
            ) from error
        absent = sorted(known.keys() - stored.keys())
        if absent:
            raise CheckpointError(
                f"The adapter {adapter!r} in {home} lacks {len(absent)} of its {len(known)} "
                f"tensors, first {absent[0]}. Resume with the PEFT config that it was saved with, "
                f"or from another checkpoint."
            )
        for key, value in stored.items():
            name = known.get(key) or (key if key in shapes else None)
            if name is None or shapes[name] != value.shape:
                raise CheckpointError(
                    f"The adapter in {home} has {key} of shape {tuple(value.shape)}, for which "
                    f"{type(model).__name__} "
                    f"has no place. Resume with the PEFT config that it was saved with."
                )
            engine.set_full_parameter(name, value)


def load_weights(engine: Engine, directory: str) -> None:
    """Put a Hub model's weights into an engine, each rank reading what it holds. Collective.

    Masters that the checkpoint keeps beside them win: they have the bits that 16-bit files lack.
    Files in the masters' own dtype hold them bit for bit, and none are kept beside those.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another model.
    """
    model = engine.model
    plan = plan_hub_model(model, dtype=file_dtype(engine), tensors=stored_tensors(engine))
    if all(group.is_rename or not group.targets for group in plan.groups):
        files = HubFiles(directory, plan)
        engine.load_parameters(files.read)
        for name, buffer in persistent_buffers(model):
            value = files.read(name, 0, buffer.numel())
            if value is not None:
                buffer.copy_(value.view(buffer.shape))
    elif isinstance(model, PreTrainedModel):
        # Fused experts and the like: transformers converts.
        dtype = full_dtype(directory) or file_dtype(engine) or engine.config.param_dtype
        load_whole(engine, directory, dtype=dtype)
    if has_engine_state(directory):
        with StateReader(directory) as reader:
            engine.load_parameters(
                lambda name, start, numel: reader.read(name, "master", start, numel)
            )


class HubFiles:
    """The files of a Hub model, read by names and intervals as an engine asks.

    Args:
        directory: holds model.safetensors, or an index and its files.
        plan: of the same model; says under which name a parameter is stored.
    """

    def __init__(self, directory: str, plan: ModelPlan) -> None:
        self._directory = directory
        self._target_of = {
            group.sources[0]: group.targets[0] for group in plan.groups if group.targets
        }
        self._aliases = plan.aliases
        self._file_of = _weight_map(directory)
        self._open: dict[str, Any] = {}

    def read(self, name: str, start: int, numel: int) -> Tensor | None:
        """[start, start + numel) of the flattened tensor; None for what a model does not save.

        Raises:
            CheckpointError: it is not there, or of another size.
        """
        target = self._target_of.get(self._aliases.get(name, name))
        if target is None:
            return None
        if target not in self._file_of:
            raise CheckpointError(
                f"{self._directory} has no tensor {target}, which this model needs: it is of "
                "another model."
            )
        path = str(Path(self._directory) / self._file_of[target])
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return self._interval(self._open[path], target, start, numel)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}, which holds {target}, cannot be read: {error}."
            ) from error

    def _interval(self, file: Any, target: str, start: int, numel: int) -> Tensor:
        stored = file.get_slice(target)
        shape = stored.get_shape()
        row = torch.Size(shape[1:]).numel()
        if start + numel > torch.Size(shape).numel():
            raise CheckpointError(
                f"{target} in {self._directory} has shape {tuple(shape)}, too small for this "
                "model's: it is of another "
                f"model."
            )
        if not shape:
            return file.get_tensor(target).reshape(1)
        if row == 0 or numel == 0:
            return file.get_tensor(target).reshape(-1)[:0]
        first, last = start // row, -(-(start + numel) // row)
        return stored[first:last].reshape(-1)[start - first * row :][:numel]


def _weight_map(directory: str) -> dict[str, str]:
    """Tensor name -> file name."""
    index = Path(directory) / INDEX_NAME
    single = Path(directory) / SINGLE_NAME
    try:
        if index.is_file():
            homes = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            for file in homes.values():
                if not isinstance(file, str) or Path(file).name != file:
                    raise CheckpointError(
                        f"{index} names the file {file!r}, which leaves its directory."
                    )
            return homes
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE_NAME)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} holds no readable Hub model: {error}.") from error
