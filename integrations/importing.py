"""Import checkpoints of DeepSpeed, FSDP and the Hub: `hf_speed.import_checkpoint`.

hf_speed/checkpoint/imports reads them; here is what needs transformers: the model on the meta
device, which says how its tensors are named in memory and on the Hub, and the files that the
Trainer expects beside them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from hf_speed.checkpoint.imports import Foreign, Naming, StateGroup, open_foreign, write_imported
from hf_speed.checkpoint.imports.convert import inverse
from hf_speed.checkpoint.plan import ModelPlan, TensorGroup, split_files
from hf_speed.checkpoint.tensorfile import TensorSpec
from hf_speed.engine.saved_run import (
    IMPORTED_FROM,
    LOSS_SCALE,
    MASTERS_IN_FILES,
    MESH,
    OPTIMIZER,
    PARAM_GROUPS,
    PARAMETER_SHAPES,
    dtype_name,
)
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.integrations.numbering import name_states
from hf_speed.integrations.transformers.describe import meta_model
from hf_speed.integrations.transformers.hub import (
    HubConfigs,
    Stored,
    StoredTensors,
    plan_hub_model,
    tensors_of,
)
from hf_speed.logs import get_logger
from hf_speed.mesh.axes import AXES

GIB = 1 << 30
CONFIG_NAME = "config.json"

_COMPANIONS = (
    *(TRAINER_STATE_NAME, SCHEDULER_NAME, "scheduler*.bin", "rng_state*.pth"),
    *("random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*processor_config.json", "generation_config.json"),
)
"""Files that are copied: what the Trainer, accelerate and from_pretrained read besides weights."""

_ADAPTER = "base_model.model."

_log = get_logger(__name__)


class Imported(NamedTuple):
    """What an import wrote.

    Attributes:
        directory: where.
        origin: what wrote the source, as in "DeepSpeed 0.19.8, ZeRO stage 3, 2 rank(s)".
        step: optimizer steps taken before; None where the source does not say.
        num_parameters: tensors of the model.
        num_states: parameters with optimizer state.
        notes: what was left out or assumed.
    """

    directory: Path
    origin: str
    step: int | None
    num_parameters: int
    num_states: int
    notes: tuple[str, ...]


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    config: str | Path | None = None,
    kind: str = "auto",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    optimizer: str | None = None,
    step: int | None = None,
) -> Imported:
    """Make a checkpoint of hf_speed from one of DeepSpeed, FSDP or the Hub. One process.

    Any mesh resumes the result, through the Trainer (`resume_from_checkpoint=dst`) and through the
    Accelerator (`load_state(dst)`), and `from_pretrained(dst)` loads it. Nothing in the source is
    run: its pickles are read by an allow list. Memory: one file of `max_shard_size`, or the largest
    tensor.

    Args:
        src: a Trainer's checkpoint-N, a directory of save_state, one that was given to DeepSpeed's
            save_checkpoint, one of torch.distributed.checkpoint, or a Hub model.
        dst: absent or empty.
        config: a directory with the model's config.json; None: that in or above `src`. Without
            any, tensors keep the names that they have in `src` and from_pretrained cannot load
            them.
        kind: "deepspeed", "universal", "dcp", "hub", or "auto".
        dtype: of floating-point weights in the files; None: the one that the model computed in.
            Masters of more bits are kept beside them.
        max_shard_size: largest file of weights, as in "2GB" or in bytes, except that a tensor is
            never cut; None: 5 GiB.
        optimizer: class name of the optimizer that goes on; None: found out, Adam's moments being
            AdamW's where nothing says otherwise.
        step: optimizer steps taken, where the source does not say.

    Raises:
        CheckpointError: `src` cannot be read, is damaged, or names what it should not; or the
            config is of another model.
        ConfigError: `dst` is not empty, or an argument means nothing.
    """
    cast, limit = _parse_dtype(dtype), _parse_size(max_shard_size)
    foreign = open_foreign(Path(src), kind)
    foreign = foreign._replace(
        optimizer=optimizer or foreign.optimizer,
        step=foreign.step if step is None else step,
    )
    return _write(foreign, Path(dst), _config_home(config, foreign), cast, limit)


def _write(
    foreign: Foreign, dst: Path, home: Path | None, dtype: torch.dtype | None, limit: int
) -> Imported:
    """Write what was opened; `home` has the config, `limit` bytes are in a file."""
    _refuse_adapters(foreign)
    notes: list[str] = []
    model = None if home is None else meta_model(str(home))
    if foreign.numbered is not None:
        foreign = name_states(model, foreign, notes)
    if model is None:
        notes.append(
            f"{foreign.home} has no {CONFIG_NAME}: tensors keep their names, and from_pretrained "
            f"cannot load the result. Give config= (--config) for that."
        )
        naming, shapes = _plain_naming(foreign, dtype, limit)
    else:
        naming, shapes = model_naming(model, foreign, dtype, limit, notes)
    if foreign.param_groups is None:
        notes.append(
            "The source has no optimizer state: a run that resumes it starts its optimizer anew."
        )

    def extras(staging: Path) -> None:
        if model is not None:
            HubConfigs(model, naming.plan).write(staging)
        _copy_companions(staging, [foreign.home] if home is None else [home, foreign.home])
        _write_trainer_files(staging, foreign)

    write_imported(
        dst,
        foreign,
        naming,
        _meta(foreign, naming, shapes),
        max_shard_bytes=limit,
        extras=extras,
    )
    for note in notes:
        _log.warning("%s", note)
    return Imported(
        dst,
        foreign.origin,
        foreign.step,
        sum(len(file.tensors) for file in naming.plan.files),
        sum(len(group.names) for group in naming.groups),
        tuple(notes),
    )


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ConfigError(
        f"import: dtype={dtype!r} is no floating-point dtype; use 'bfloat16', 'float16' or "
        f"'float32'."
    )


def _parse_size(size: int | str | None) -> int:
    if size is None:
        return 5 * GIB
    try:
        number = convert_file_size_to_int(size)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"import: max_shard_size={size!r} is no size; use e.g. '5GB'.")
    return number


def _config_home(config: str | Path | None, foreign: Foreign) -> Path | None:
    if config is not None:
        home = Path(config)
        home = home.parent if home.is_file() else home
        if not (home / CONFIG_NAME).is_file():
            raise ConfigError(f"import: config={str(config)!r} has no {CONFIG_NAME}.")
        return home
    return foreign.home if (foreign.home / CONFIG_NAME).is_file() else None


def _refuse_adapters(foreign: Foreign) -> None:
    adapters = [name for name in foreign.weights if name.startswith(_ADAPTER)]
    if adapters:
        raise CheckpointError(
            f"The source is of a PEFT model ({adapters[0]}), whose adapters have a layout of their "
            f"own. Save them with the model's save_pretrained, and load them with PEFT."
        )


def model_naming(
    model: PreTrainedModel,
    foreign: Foreign,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    notes: list[str],
) -> tuple[Naming, dict[str, tuple[int, ...]]]:
    """How the tensors of `foreign` become those of `model`, and the shapes of what was trained.

    Args:
        model: on the meta device.
        foreign: names its tensors as the model does in memory, or as it has them on the Hub.
        dtype: of the files.
        max_shard_bytes: of a file.
        notes: gets a line for what is left out.

    Raises:
        CheckpointError: they are of different models.
    """
    here = tensors_of(model)
    known = {name for stored in (*here.parameters, *here.buffers) for name in stored.names}
    ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    absent = [
        stored.names[0]
        for stored in (*here.parameters, *here.buffers)
        if _find(stored, foreign) is None and not ignored.intersection(stored.names)
    ]
    if not absent:
        _check_left(foreign, known, notes)
        return _memory_naming(model, here, foreign, dtype, max_shard_bytes)
    plan = plan_hub_model(model)
    targets = {target for group in plan.groups for target in group.targets}
    if targets <= foreign.weights.keys():
        _check_left(foreign, targets, notes)
        return _hub_naming(plan, here, foreign, dtype, max_shard_bytes)
    strange = sorted(foreign.weights.keys() - known)
    raise CheckpointError(
        f"The config describes a {type(model).__name__}, which needs {absent[0]} (and "
        f"{len(absent) - 1} more) that the checkpoint does not have; it has "
        f"{strange[0] if strange else 'no others'} instead. Give the config of the model that was "
        f"trained, with its class under 'architectures'."
    )


def _find(stored: Stored, foreign: Foreign) -> str | None:
    """The name under which a tensor of the model is in the checkpoint."""
    for name in stored.names:
        found = name if name in foreign.weights else foreign.aliases.get(name)
        if found in foreign.weights:
            return found
    return None


def _check_left(foreign: Foreign, known: set[str], notes: list[str]) -> None:
    """Refuse what was trained and has no place; note what else has none."""
    left = sorted(foreign.weights.keys() - known)
    trained = [name for name in left if name in (foreign.trained or ())]
    if trained:
        raise CheckpointError(
            f"The checkpoint has {trained[0]}, which was trained, but the config's model has no "
            f"such parameter. Give the config of the model that was trained."
        )
    if left:
        notes.append(
            f"{len(left)} tensors for which the model has no place are left out: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}."
        )


def _memory_naming(
    model: PreTrainedModel,
    here: StoredTensors,
    foreign: Foreign,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> tuple[Naming, dict[str, tuple[int, ...]]]:
    """Of a checkpoint with the names that the model has in memory."""

    def stored_as(stored: Stored) -> Stored:
        found = _find(stored, foreign)
        if found is None:
            return stored
        if foreign.weights[found].shape != stored.shape:
            raise CheckpointError(
                f"{found} has shape {foreign.weights[found].shape} in the checkpoint and "
                f"{stored.shape} in the config's model. Give the config of the model that was "
                f"trained."
            )
        return stored._replace(dtype=_file_dtype(foreign, found, dtype))

    tensors = StoredTensors(
        tuple(stored_as(each) for each in here.parameters),
        tuple(stored_as(each) for each in here.buffers),
    )
    plan = plan_hub_model(model, max_shard_bytes=max_shard_bytes, tensors=tensors)
    # What a model does not save need not be in the checkpoint either.
    plan = plan._replace(groups=tuple(group for group in plan.groups if group.targets))
    stored: dict[str, str] = {}
    groups: list[StateGroup] = []
    for each in (*here.parameters, *here.buffers):
        found = _find(each, foreign)
        if found is None:
            continue
        stored |= dict.fromkeys(each.names, found)
        if found in (foreign.trained or ()):
            groups.append(StateGroup((found,), (each.names[0],), (each.shape,)))
    shapes = {group.names[0]: group.shapes[0] for group in groups}
    return Naming(plan, stored, tuple(groups)), shapes


def _hub_naming(
    plan: ModelPlan,
    here: StoredTensors,
    foreign: Foreign,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> tuple[Naming, dict[str, tuple[int, ...]]]:
    """Of a checkpoint with the names that the model has on the Hub.

    Its weights are as they should be in the files; states are turned into those of the parameters
    that the model has in memory.
    """
    first = {name: each.names[0] for each in here.parameters for name in each.names}
    sizes = {name: each.shape for each in here.parameters for name in each.names}
    groups: list[StateGroup] = []
    kept: list[str] = []
    for group in plan.groups:
        kept += group.targets
        trained = [target for target in group.targets if target in (foreign.trained or ())]
        if not trained:
            continue
        if len(trained) < len(group.targets):
            raise CheckpointError(
                f"{trained[0]} was trained but not all of {', '.join(group.targets[:4])}, which "
                f"are one parameter of the model in memory."
            )
        groups.append(
            StateGroup(
                group.targets,
                tuple(first[source] for source in group.sources),
                tuple(sizes[source] for source in group.sources),
                None if group.is_rename else _backwards(plan, group, sizes, first),
            )
        )
    shapes = {
        name: shape
        for group in groups
        for name, shape in zip(group.names, group.shapes, strict=True)
    }
    naming = Naming(
        _plain_plan(foreign, kept, dtype, max_shard_bytes),
        {name: name for name in kept},
        tuple(groups),
    )
    return naming, shapes


def _backwards(
    plan: ModelPlan,
    group: TensorGroup,
    sizes: dict[str, tuple[int, ...]],
    first: dict[str, str],
) -> Callable[..., dict[str, torch.Tensor]]:
    """From values of a group's targets to those of its sources.

    Made anew for each kind: to keep it would hold the places of every element of the model.
    """

    def convert(values: Any) -> dict[str, torch.Tensor]:
        back = inverse(plan.convert, {source: sizes[source] for source in group.sources})
        return {first[source]: value for source, value in back(values).items()}

    return convert


def _plain_naming(
    foreign: Foreign, dtype: torch.dtype | None, max_shard_bytes: int
) -> tuple[Naming, dict[str, tuple[int, ...]]]:
    """Every tensor under the name that it has."""
    names = list(foreign.weights)
    groups = tuple(
        StateGroup((name,), (name,), (foreign.weights[name].shape,))
        for name in names
        if name in (foreign.trained or ())
    )
    plan = _plain_plan(foreign, names, dtype, max_shard_bytes)
    shapes = {group.names[0]: group.shapes[0] for group in groups}
    return Naming(plan, {name: name for name in names}, groups), shapes


def _plain_plan(
    foreign: Foreign, names: list[str], dtype: torch.dtype | None, max_shard_bytes: int
) -> ModelPlan:
    specs = [
        TensorSpec(name, foreign.weights[name].shape, _file_dtype(foreign, name, dtype))
        for name in names
    ]
    return ModelPlan(
        split_files(specs, max_shard_bytes),
        tuple(TensorGroup((name,), (name,), is_rename=True) for name in names),
        dict,
        {},
        sum(torch.Size(spec.shape).numel() for spec in specs),
    )


def _file_dtype(foreign: Foreign, name: str, dtype: torch.dtype | None) -> torch.dtype:
    own = foreign.dtypes[name]
    return dtype if dtype is not None and own.is_floating_point else own


def _meta(foreign: Foreign, naming: Naming, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the manifest says of the run, as an engine would say it."""
    meta: dict[str, Any] = {
        MESH: {axis: foreign.num_ranks if axis == "dp_shard" else 1 for axis in AXES},
        "stage": foreign.stage,
        OPTIMIZER: foreign.optimizer,
        LOSS_SCALE: None if foreign.loss_scale is None else dict(foreign.loss_scale),
        IMPORTED_FROM: foreign.origin,
    }
    kept = {spec.dtype for file in naming.plan.files for spec in file.tensors}
    if foreign.trained and kept == {torch.float32}:
        meta[MASTERS_IN_FILES] = dtype_name(torch.float32)
    if foreign.param_groups is not None:
        # Left out, a run keeps its own hyperparameters, and what it trains is its own choice.
        meta[PARAM_GROUPS] = [dict(group) for group in foreign.param_groups]
        meta[PARAMETER_SHAPES] = {name: list(shape) for name, shape in shapes.items()}
    return meta


def _copy_companions(staging: Path, homes: list[Path]) -> None:
    """Copy what belongs to the model or the run; of two of a name, the one from the last home."""
    for home in homes:
        for pattern in _COMPANIONS:
            for path in sorted(home.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, staging / path.name)


def _write_trainer_files(staging: Path, foreign: Foreign) -> None:
    """What the Trainer needs to go on, where the source was not a Trainer's."""
    state = staging / TRAINER_STATE_NAME
    if not state.is_file():
        # Only the step is known; the Trainer warns of a batch size that is not its own.
        unknown: Any = {"logging_steps": None, "eval_steps": None, "save_steps": None}
        made = TrainerState(global_step=foreign.step or 0, train_batch_size=0, **unknown)
        made.save_to_json(str(state))
    scheduler = staging / SCHEDULER_NAME
    groups = foreign.param_groups
    taken = foreign.scheduler_step if foreign.scheduler_step is not None else foreign.step
    if scheduler.is_file() or groups is None or taken is None:
        return
    # Of a schedule that is a function of the step, as all of transformers' are. Base rates are
    # those of the run that goes on.
    torch.save(
        {
            "last_epoch": taken,
            "_step_count": taken + 1,
            "_last_lr": [group.get("lr", 0.0) for group in groups],
            "lr_lambdas": [None] * len(groups),
        },
        scheduler,
    )
