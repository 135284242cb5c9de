"""DeepSpeed's checkpoints of ZeRO stages 1 to 3, by their files alone.

    <root>/latest                                      names the directory of the last save
    <root>/global_step7/mp_rank_00_model_states.pt     weights, shapes, counters (stages 1, 2)
                        zero_pp_rank_R_mp_rank_00_model_states.pt            by rank (stage 3)
                        [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     by rank

How ranks divide parameters is in `fragments.py`.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.checkpoint.imports.foreign import (
    Foreign,
    ForeignTensor,
    Strip,
    Strips,
    integer,
    mapping,
    number,
    optimizer_name,
    plain_name,
    sequence,
    shape_of,
    text,
)
from hf_speed.checkpoint.imports.fragments import (
    FP32,
    Fragments,
    ModelStates,
    flat_fragments,
    stage_3_fragments,
)
from hf_speed.checkpoint.imports.pickles import EnumMember, Record
from hf_speed.errors import CheckpointError

OPTIMIZER_FILE = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt"
)
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_\d+.*model_states\.pt")


def find_save(root: Path, tag_file: str = "latest") -> Path:
    """The directory with the files of one save.

    Args:
        root: that directory, or the one above it, with a file that names the last save.
        tag_file: the name of that file.

    Raises:
        CheckpointError: neither.
    """
    if _has_save(root, MODEL_FILE):
        return root
    tag = root / tag_file
    if tag.is_file():
        name = tag.read_text(encoding="utf-8").strip()
        if not name or Path(name).name != name or not (root / name).is_dir():
            raise CheckpointError(
                f"{tag} names {name!r:.80}, which is no directory in {root}. Give the directory of "
                f"the save itself."
            )
        return root / name
    saves = sorted(
        path.name for path in root.iterdir() if path.is_dir() and _has_save(path, MODEL_FILE)
    )
    if len(saves) == 1:
        return root / saves[0]
    raise CheckpointError(
        f"{root} has no file {tag_file!r} that names a save of DeepSpeed; it holds "
        f"{', '.join(saves) or 'none'}. Give one of them."
    )


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory holds saves of ZeRO's ranks, or is one."""
    if _has_save(directory, OPTIMIZER_FILE):
        return True
    return any(
        path.is_dir() and _has_save(path, MODEL_FILE) and not (path / "zero").is_dir()
        for path in directory.iterdir()
    )


def _has_save(directory: Path, pattern: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(path.name) for path in directory.iterdir())


def open_deepspeed(root: Path, *, home: Path) -> Foreign:
    """A checkpoint of ZeRO stage 1, 2 or 3.

    Args:
        root: the directory that was given to `save_checkpoint`, or that of one save.
        home: where config.json and the like are.

    Raises:
        CheckpointError: not such a checkpoint, damaged, or of a kind that is not read here: sliced
            layers, pipelines, experts that DeepSpeed divides.
    """
    directory = find_save(root)
    states = read_model_states(directory)
    files = _rank_files(directory, OPTIMIZER_FILE)
    if not files:
        raise CheckpointError(
            f"{directory} has no *_optim_states.pt: it was written at ZeRO stage 0, whose "
            f"optimizer numbers its parameters, or its optimizer was left out. Start from its "
            f"weights (from_pretrained), or save it again at stage 1."
        )
    optims = [_optimizer_state(path) for path in files]
    where = str(files[0])
    is_stage_3 = "fp32_flat_groups" in optims[0]
    _check_count(optims[0].get("partition_count"), len(files), where)
    if is_stage_3:
        fragments = stage_3_fragments(optims, states, where)
    else:
        fragments = flat_fragments(optims, states, where)
    stage = 3 if is_stage_3 else _stage(optims[0].get("zero_stage"))
    version = states.first.get("ds_version", "of an unknown version")
    return assemble(
        states,
        fragments,
        origin=f"DeepSpeed {version!s:.20}, ZeRO stage {stage}, {len(files)} rank(s)",
        home=home,
        stage=stage,
        num_ranks=len(files),
        loss_scaler=optims[0].get("loss_scaler"),
    )


def assemble(
    states: ModelStates,
    fragments: Fragments,
    *,
    origin: str,
    home: Path,
    stage: int,
    num_ranks: int,
    loss_scaler: object,
) -> Foreign:
    """Join what the files of the model and those of the optimizer say."""
    frozen = _untrained(states, num_ranks)
    masters = {name: kinds[FP32] for name, kinds in fragments.tensors.items()}
    moments = {
        name: {kind: value for kind, value in kinds.items() if kind != FP32}
        for name, kinds in fragments.tensors.items()
    }
    module = states.first.get("module") or {}
    dtypes = {name: value.dtype for name, value in (frozen | masters).items()}
    for name, value in module.items():
        # At stage 3 these are empty, but of the dtype that the model computed in.
        if isinstance(value, StoredTensor) and plain_name(name) in masters:
            dtypes[plain_name(name)] = value.dtype
    kinds = {kind for values in moments.values() for kind in values}
    named = states.config.get("optimizer")
    return Foreign(
        origin=origin,
        weights=frozen | masters,
        dtypes=dtypes,
        home=home,
        states=moments,
        scalars=fragments.scalars,
        aliases=states.aliases,
        trained=frozenset(masters),
        param_groups=fragments.groups,
        optimizer=optimizer_name(
            kinds, fragments.groups, named.get("type") if isinstance(named, dict) else None
        ),
        loss_scale=_loss_scale(loss_scaler),
        step=integer(states.first.get("global_steps")),
        stage=stage,
        num_ranks=num_ranks,
        scheduler_step=_scheduler_step(states.first.get("lr_scheduler")),
    )


def read_model_states(directory: Path, *, is_joined: bool = False) -> ModelStates:
    """Load the files of model states of one save.

    Args:
        directory: of the save.
        is_joined: parts of sliced layers are joined elsewhere; the first one's files will do.

    Raises:
        CheckpointError: none, damaged, or of sliced layers, pipelines or divided experts.
    """
    for path in directory.iterdir():
        if _LAYER_FILE.fullmatch(path.name):
            raise CheckpointError(
                f"{path} belongs to a pipeline or to experts that DeepSpeed divides, which are not "
                f"read here. Convert it with DeepSpeed's ds_to_universal, and import that."
            )
    files = _rank_files(directory, MODEL_FILE, is_joined=is_joined)
    if not files:
        raise CheckpointError(f"{directory} has no *_model_states.pt: it is no save of DeepSpeed.")
    where = str(files[0])
    trees = tuple(mapping(load_archive(path), "the file", str(path)) for path in files)
    first = trees[0]
    shapes = first.get("param_shapes")
    if shapes is None:
        raise CheckpointError(
            f"{where} has no param_shapes: it was written without ZeRO (stage 0). Start from its "
            f"weights, or save it again at stage 1."
        )
    groups = [shapes] if isinstance(shapes, dict) else sequence(shapes, "param_shapes", where)
    shared = first.get("shared_params") or {}
    pairs = shared.items() if isinstance(shared, dict) else sequence(shared, "shared_params", where)
    return ModelStates(
        where,
        trees,
        tuple(
            {
                plain_name(text(name, "a parameter", where)): shape_of(shape, str(name), where)
                for name, shape in mapping(group, "param_shapes", where).items()
            }
            for group in groups
        ),
        {
            plain_name(text(alias, "a name", where)): plain_name(text(name, "a name", where))
            for alias, name in pairs
        },
    )


def _rank_files(
    directory: Path, pattern: re.Pattern[str], *, is_joined: bool = False
) -> list[Path]:
    """Files by data-parallel rank, all of them.

    Raises:
        CheckpointError: a rank's is missing, or layers were sliced.
    """
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match["mp"]) > 0 and is_joined:
            continue
        if int(match["mp"]) > 0:
            raise CheckpointError(
                f"{path} belongs to sliced layers or a pipeline (mp_rank {match['mp']}), whose "
                f"parts are not joined here. Convert the checkpoint with DeepSpeed's "
                f"ds_to_universal, and import that."
            )
        found[int(match["dp"] or 0)] = path
    missing = set(range(max(found, default=-1) + 1)) - found.keys()
    if missing:
        raise CheckpointError(
            f"{directory} lacks the file of rank {min(missing)} beside {found[max(found)].name}: "
            f"not all ranks have saved to this directory."
        )
    return [found[rank] for rank in sorted(found)]


def _optimizer_state(path: Path) -> Mapping[Any, Any]:
    tree = mapping(load_archive(path), "the file", str(path))
    return mapping(tree.get("optimizer_state_dict"), "optimizer_state_dict", str(path))


def _check_count(stored: object, count: int, where: str) -> None:
    values = stored if isinstance(stored, list) else [stored]
    counts = [value for value in values if integer(value) is not None]
    if counts and max(counts) != count:
        raise CheckpointError(
            f"{where} says that {max(counts)} ranks share the optimizer's state, but there are "
            f"{count} files. Some ranks have not saved, or files of an earlier save are left."
        )


def _stage(stored: object) -> int:
    value = stored.value if isinstance(stored, EnumMember) else stored
    by_name = {"optimizer_states": 1, "gradients": 2, "weights": 3}
    found = by_name.get(value) if isinstance(value, str) else integer(value)
    # DeepSpeed's optimizer for bfloat16 is one of stage 1 and does not say so.
    return 1 if found is None else found


# ---- what was not trained, and counters ----


def _untrained(states: ModelStates, num_ranks: int) -> dict[str, ForeignTensor]:
    """Frozen parameters and buffers."""
    trained = states.all_shapes
    found: dict[str, ForeignTensor] = {}
    for name, value in mapping(states.first.get("module"), "module", states.where).items():
        plain = plain_name(text(name, "a parameter", states.where))
        if isinstance(value, StoredTensor) and plain not in trained and plain not in states.aliases:
            found[plain] = Strips.whole(value)
    for name, shape in _frozen_shapes(states):
        plain = plain_name(name)
        found_pieces = (
            (tree.get("frozen_param_fragments") or {}).get(name) for tree in states.trees
        )
        pieces = [piece for piece in found_pieces if isinstance(piece, StoredTensor)]
        if len(pieces) < len(states.trees):
            raise CheckpointError(f"{states.where}: the frozen parameter {name} is not there.")
        if len(pieces) == 1:
            pieces_of = [Strip(pieces[0], 0, prod(shape))]
        else:
            share = -(-prod(shape) // num_ranks)
            pieces_of = [
                Strip(piece, 0, min(share, max(0, prod(shape) - rank * share)))
                for rank, piece in enumerate(pieces)
            ]
        found[plain] = Strips.join(shape, pieces_of, what=f"{name} ({states.where})")
    return found


def _frozen_shapes(states: ModelStates) -> Iterator[tuple[str, tuple[int, ...]]]:
    stored = states.first.get("frozen_param_shapes") or {}
    for name, shape in mapping(stored, "frozen_param_shapes", states.where).items():
        known = text(name, "a parameter", states.where)
        yield known, shape_of(shape, known, states.where)


def _loss_scale(scaler: object) -> dict[str, float] | None:
    """DeepSpeed's loss scaler in the terms of ours; None where nothing was scaled."""
    if not isinstance(scaler, Record):
        return None
    scale = number(scaler.get("cur_scale"))
    if scale is None or scale == 1.0:
        return None
    begun = number(scaler.get("cur_iter")) or 0.0
    overflowed = number(scaler.get("last_overflow_iter"))
    good = begun - (-1.0 if overflowed is None else overflowed) - 1.0
    tolerance = number(scaler.get("cur_hysteresis")) or 1.0
    return {"scale": scale, "good_steps": max(0.0, good), "tolerance": tolerance}


def _scheduler_step(state: object) -> int | None:
    """Steps that the learning rate's schedule has taken."""
    if not isinstance(state, dict):
        return None
    begun = integer(state.get("last_batch_iteration"))
    return begun + 1 if begun is not None else integer(state.get("last_epoch"))
