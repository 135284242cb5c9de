"""`model.save_pretrained(...)` of a prepared model.

transformers' examples end, on every rank, with

    accelerator.unwrap_model(model).save_pretrained(
        path, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )

where `is_main_process` is for callers that "need to call this function on all processes". Given it,
all ranks write together, from the masters. Without it a rank may be alone here: at stage 3, in a
pipeline or with sliced layers, where none has whole parameters, that is an error.
"""

import inspect
from types import MethodType
from typing import Any

from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedConfig

from hf_speed.engine import Engine, engine_of
from hf_speed.errors import ShardedParameterError
from hf_speed.integrations.weights import (
    adapter_state,
    file_dtype,
    full_state_dict,
    is_peft,
    write_model,
)


class ShardedSave:
    """Stands in front of one model's `save_pretrained`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own save; collective where `is_main_process` is given and no `state_dict` is.

        Raises:
            ShardedParameterError: where no rank has the whole model and neither is given.
            CheckpointError: on every rank; a file could not be written.
        """
        save: Any = MethodType(getattr(type(self._model), "save_pretrained"), self._model)  # noqa: B009
        engine = engine_of(self._model)
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if engine is None:
            return save(save_directory, *args, **kwargs)
        if given.get("state_dict") is not None:
            saved = save(save_directory, *args, **kwargs)
            if given.get("is_main_process", True):
                self._correct_dtype(engine, save_directory)
            return saved
        if "is_main_process" in given:
            return self._save_together(engine, save, given)
        if engine.config.stage == 3 or engine.parts.division.is_divided:
            raise ShardedParameterError(
                f"save_pretrained needs all parameters of {type(self._model).__name__}, which are "
                f"spread over the ranks ({_spread_by(engine)}). Call it on every rank and say so "
                f"with is_main_process=accelerator.is_main_process, or pass "
                f"state_dict=accelerator.get_state_dict(model)."
            )
        return save(save_directory, *args, **kwargs)

    def _save_together(self, engine: Engine, save: Any, given: dict[str, Any]) -> Any:
        """Every rank writes its own files, if the options ask for nothing beyond that."""
        writes = given.pop("is_main_process")
        directory = given.pop("save_directory")
        given.pop("save_function", None)
        if given.get("safe_serialization") is True:
            del given["safe_serialization"]
        if given.keys() <= {"max_shard_size"}:
            size = given.get("max_shard_size")
            max_shard_bytes = None if size is None else convert_file_size_to_int(size)
            write_model(engine, str(directory), max_shard_bytes=max_shard_bytes)
            return None
        # Uploads, variants: transformers writes, from whole tensors on the host of rank 0.
        state = adapter_state(engine) if is_peft(self._model) else full_state_dict(engine)
        if not writes:
            return None
        saved = save(directory, state_dict=state, **given)
        self._correct_dtype(engine, directory)
        return saved

    def _correct_dtype(self, engine: Engine, directory: Any) -> None:
        """Transformers notes the dtype of working parameters; the files hold masters."""
        dtype, config = file_dtype(engine), getattr(self._model, "config", None)
        if dtype is not None and isinstance(config, PreTrainedConfig) and not is_peft(self._model):
            config.dtype = str(dtype).removeprefix("torch.")
            config.save_pretrained(directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """A copy of the model is a plain model, with its class's method."""
        copied = memo[id(self._model)]
        return MethodType(type(copied).save_pretrained, copied)


def _spread_by(engine: Engine) -> str:
    """The config values that spread a model's parameters."""
    sizes = engine.mesh.sizes
    found = [f"mesh.{axis}={sizes[axis]}" for axis in ("pp", "tp") if sizes[axis] > 1]
    if engine.config.stage == 3:
        found.append("zero.stage=3")
    return ", ".join(found)


def wrap_save(model: nn.Module) -> None:
    """Let `model.save_pretrained` write whole parameters for as long as there is an engine."""
    if callable(getattr(type(model), "save_pretrained", None)):
        model.__dict__["save_pretrained"] = ShardedSave(model)
