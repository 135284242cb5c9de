"""DeepSpeed's universal checkpoints: one directory a parameter, one file a kind.

    <root>/latest_universal
    <root>/global_step7_universal/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
                                  zero/optimizer_state.pt          hyperparameters, the loss scaler
                                  *_model_states.pt                as in the checkpoint it came from

Sliced layers and pipelines have been joined in it. A tensor is whole, or flattened (stage 3).
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.checkpoint.imports.deepspeed import assemble, find_save, read_model_states
from hf_speed.checkpoint.imports.foreign import (
    Foreign,
    ForeignTensor,
    Strip,
    Strips,
    hyperparameters,
    integer,
    mapping,
    number,
    plain_name,
)
from hf_speed.checkpoint.imports.fragments import FP32, Fragments, ModelStates, check_weight
from hf_speed.errors import CheckpointError

STATE_DIRECTORY = "zero"
_STEP = "step"


def is_universal(directory: Path) -> bool:
    """Whether a directory holds one, or names one."""
    return (directory / STATE_DIRECTORY).is_dir() or (directory / "latest_universal").is_file()


def open_universal(root: Path, *, home: Path) -> Foreign:
    """A universal checkpoint.

    Args:
        root: its directory, or the one above it.
        home: where config.json and the like are.

    Raises:
        CheckpointError: not such a checkpoint, or damaged.
    """
    directory = find_save(root, "latest_universal")
    states = read_model_states(directory, is_joined=True)
    common = _common(directory)
    inner = common.get("optimizer_state_dict")
    settings = common.get("param_groups")
    if settings is None and isinstance(inner, dict):
        settings = inner.get("param_groups")
    groups = [group for group in settings or () if isinstance(group, dict)]
    fragments = Fragments(
        *_tensors(directory, states, _common_step(common)),
        tuple(hyperparameters(group) for group in groups),
    )
    return assemble(
        states,
        fragments,
        origin=f"DeepSpeed {states.first.get('ds_version', '?')!s:.20}, universal checkpoint",
        home=home,
        stage=3 if len(states.trees) > 1 or "fp32_flat_groups" in common else 2,
        num_ranks=integer(states.first.get("dp_world_size")) or 1,
        loss_scaler=common.get("loss_scaler"),
    )


def _common(directory: Path) -> Mapping[Any, Any]:
    path = directory / STATE_DIRECTORY / "optimizer_state.pt"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there: the conversion to a universal checkpoint did not finish."
        )
    return mapping(load_archive(path), "the file", str(path))


def _common_step(common: Mapping[Any, Any]) -> float | None:
    """The step where parameters have no file of their own for it (stage 3)."""
    inner = common.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    for state in states.values() if isinstance(states, dict) else ():
        taken = number(state.get(_STEP)) if isinstance(state, dict) else None
        if taken is not None:
            return taken
    return number(common.get("base_optimizer_state_step"))


def _tensors(
    directory: Path, states: ModelStates, common_step: float | None
) -> tuple[dict[str, dict[str, ForeignTensor]], dict[str, dict[str, float]]]:
    tensors: dict[str, dict[str, ForeignTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    shapes = states.all_shapes
    # What is frozen is there too, as a weight.
    frozen = {plain_name(str(name)) for name in states.first.get("frozen_param_shapes") or ()}
    homes = {
        plain_name(path.name): path
        for path in sorted((directory / STATE_DIRECTORY).iterdir())
        if path.is_dir() and plain_name(path.name) not in frozen
    }
    missing = sorted(shapes.keys() - homes.keys())
    if missing:
        raise CheckpointError(
            f"{directory / STATE_DIRECTORY} has no directory for {missing[0]}, which was trained: "
            f"the conversion to a universal checkpoint did not finish."
        )
    for name, home in homes.items():
        kinds: dict[str, Strips] = {}
        for path in sorted(home.glob("*.pt")):
            stored = load_archive(path)
            if path.stem == _STEP:
                step = number(stored)
                scalars[name] = {} if step is None else {_STEP: step}
            else:
                kinds[path.stem] = _tensor(stored, shapes.get(name), path)
        if FP32 not in kinds:
            raise CheckpointError(f"{home} has no {FP32}.pt.")
        check_weight(name, kinds[FP32], states)
        tensors[name] = {**kinds}
        if name not in scalars:
            has_moments = len(kinds) > 1 and common_step is not None
            scalars[name] = {_STEP: common_step} if has_moments and common_step is not None else {}
    return tensors, scalars


def _tensor(stored: object, shape: tuple[int, ...] | None, path: Path) -> Strips:
    value = stored.get("param") if isinstance(stored, dict) else stored
    if not isinstance(value, StoredTensor):
        raise CheckpointError(f"{path} holds no tensor.")
    if len(value.shape) == 1 and shape is not None and prod(shape) == value.numel:
        return Strips.join(shape, [Strip(value, 0, value.numel)], what=str(path))
    return Strips.whole(value)
