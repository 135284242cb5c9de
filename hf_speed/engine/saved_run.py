"""What a checkpoint's meta data says of the run that wrote it, checked before any of it is used.

`state.py` writes it. A checkpoint may come from anywhere: nothing in it may end in another error
than CheckpointError, or reach what is not its to change.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.header import DTYPE_CODES
from hf_speed.checkpoint.strict_json import expect, expect_count, expect_sizes
from hf_speed.errors import CheckpointError
from hf_speed.mesh.axes import AXES, Axis

MESH = "mesh"
"""Axis sizes of the run."""

OPTIMIZER = "optimizer"
PARAM_GROUPS = "param_groups"
LOSS_SCALE = "loss_scale"

PARAMETER_SHAPES = "parameters"
"""Whole shapes of what is trained."""

MASTERS_IN_FILES = "masters_in_files"
"""The dtype in which the Hub files hold the masters that are not stored beside them, if any."""

IMPORTED_FROM = "imported_from"
"""What wrote the source of an import; for messages."""

_SCALER_KEYS = ("scale", "good_steps", "tolerance")


class SavedRun(NamedTuple):
    """What is used of the meta data. None: not said, as by an import of bare weights.

    Attributes:
        mesh: axis -> size.
        optimizer: name of its class.
        param_groups: hyperparameters of each group, without its parameters.
        loss_scale: state of the scaler.
        shapes: of the trainable parameters.
    """

    mesh: Mapping[Axis, int] | None
    optimizer: str | None
    param_groups: list[dict[str, Any]] | None
    loss_scale: dict[str, float] | None
    shapes: Mapping[str, tuple[int, ...]] | None


def saved_run(meta: Mapping[str, Any], where: str) -> SavedRun:
    """Check the meta data; `where` names its file in messages.

    Raises:
        CheckpointError: a field has another type than hf_speed writes.
    """
    groups = meta.get(PARAM_GROUPS)
    shapes = meta.get(PARAMETER_SHAPES)
    name = meta.get(OPTIMIZER)
    return SavedRun(
        mesh=saved_mesh(meta, where),
        optimizer=None if name is None else expect(name, str, where, OPTIMIZER),
        param_groups=None
        if groups is None
        else [
            _hyperparameters(group, f"{where}: {PARAM_GROUPS}[{index}]")
            for index, group in enumerate(expect(groups, list, where, PARAM_GROUPS))
        ],
        loss_scale=_loss_scale(meta.get(LOSS_SCALE), where),
        shapes=None
        if shapes is None
        else {
            key: expect_sizes(shape, where, f"the shape of {key!r}")
            for key, shape in expect(shapes, dict, where, PARAMETER_SHAPES).items()
        },
    )


def saved_mesh(meta: Mapping[str, Any], where: str) -> dict[Axis, int] | None:
    """The mesh of the run; None where it is not said.

    Raises:
        CheckpointError: not axis sizes.
    """
    value = meta.get(MESH)
    if value is None:
        return None
    sizes = expect(value, dict, where, MESH)
    unknown = sizes.keys() - set(AXES)
    if unknown or any(expect_count(size, where, MESH) < 1 for size in sizes.values()):
        raise CheckpointError(f"{where}: {MESH} is {sizes}, not sizes of the axes {AXES}.")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def masters_in_files(meta: Mapping[str, Any], where: str) -> torch.dtype | None:
    """The dtype to read the Hub files in to lose no bits; None: masters are stored beside them.

    Raises:
        CheckpointError: no dtype.
    """
    name = meta.get(MASTERS_IN_FILES)
    if name is None:
        return None
    found = {dtype_name(dtype): dtype for dtype in DTYPE_CODES if dtype.is_floating_point}
    if expect(name, str, where, MASTERS_IN_FILES) not in found:
        raise CheckpointError(
            f"{where}: {MASTERS_IN_FILES} is {name!r}, none of {', '.join(found)}."
        )
    return found[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As in "float32"."""
    return str(dtype).removeprefix("torch.")


def check_hyperparameter(key: str, value: object, now: object, where: str) -> None:
    """Check that a stored value can take the place of the one that a group has.

    None goes everywhere, as torch has it for what is chosen by itself; but not into a tensor.

    Raises:
        CheckpointError: it is of another kind, or a list of another length.
    """
    if not _can_replace(value, now):
        raise CheckpointError(
            f"{where}: {key} is {value!r}, but this run's optimizer has {now!r} there. Use the "
            f"optimizer that it was saved with."
        )


def _can_replace(value: object, now: object) -> bool:
    if isinstance(now, Tensor):
        return _is_number(value)
    if isinstance(now, (tuple, list)):
        return (
            isinstance(value, list)
            and len(value) == len(now)
            and all(_can_replace(each, other) for each, other in zip(value, now, strict=True))
        )
    if value is None or now is None:
        return True
    kinds = (bool, str)
    return _is_number(value) == _is_number(now) and all(
        isinstance(value, kind) == isinstance(now, kind) for kind in kinds
    )


def counter(value: object, what: str, where: str) -> float:
    """A number that an optimizer keeps.

    Raises:
        CheckpointError: no number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{where}: the {what} is {value!r}, not a number.")
    return float(value)


def _hyperparameters(group: object, where: str) -> dict[str, Any]:
    values = expect(group, dict, where, "the group")
    for key, value in values.items():
        # The parameters themselves are this run's.
        if key == "params" or not _is_plain(value):
            raise CheckpointError(
                f"{where}: {key!r} is {type(value).__name__}, not a number, a text or a list of "
                f"them."
            )
    return values


def _loss_scale(value: object, where: str) -> dict[str, float] | None:
    if value is None:
        return None
    state = expect(value, dict, where, LOSS_SCALE)
    good = all(_is_number(state.get(key)) and isfinite(state[key]) for key in _SCALER_KEYS)
    if not good or state["scale"] <= 0 or state["good_steps"] < 0:
        raise CheckpointError(
            f"{where}: {LOSS_SCALE} is {state}, not numbers for {', '.join(_SCALER_KEYS)}."
        )
    return {key: float(state[key]) for key in _SCALER_KEYS}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))
