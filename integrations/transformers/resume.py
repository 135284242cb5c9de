"""Which checkpoint of a run may be resumed.

The Trainer writes weights, then our state, then its own (trainer_state.json), and a process can die
between any two. What is whole has our manifest; a save without optimizer state (save_only_model)
has trainer_state.json, and none of what is written between.
"""

import re
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_speed.checkpoint.latest import newest_whole
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.integrations.weights import has_engine_state

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def has_weights_only(checkpoint: str) -> bool:
    """Whether a checkpoint was saved to the end, but without optimizer state (save_only_model)."""
    home = Path(checkpoint)
    return (home / TRAINER_STATE_NAME).is_file() and not (home / SCHEDULER_NAME).exists()


def require_resumable(checkpoint: str) -> None:
    """Refuse what cannot be resumed: a save that was cut short, or one of plain transformers.

    Raises:
        CheckpointError: it has neither our manifest nor what a save without state leaves; files
            that the manifest lists are missing or of another size; or the Trainer's own last file
            is missing.
        ConfigError: it holds the optimizer state of plain transformers.
    """
    home = Path(checkpoint)
    if (home / OPTIMIZER_NAME).is_file() and not has_engine_state(checkpoint):
        raise ConfigError(
            f"{checkpoint} was written without hf_speed: its {OPTIMIZER_NAME} holds whole tensors "
            f"by number. Import it (hf-speed import {checkpoint} NEW_DIR) and resume that, start "
            f"from its weights alone (from_pretrained({checkpoint!r})), or resume it with "
            f"hf_speed=None."
        )
    if has_engine_state(checkpoint) or not has_weights_only(checkpoint):
        read_manifest(checkpoint)
    state = home / TRAINER_STATE_NAME
    if not state.is_file():
        raise CheckpointError(
            f"{state} is missing: the save of this checkpoint was cut short after its weights and "
            f"state. Resume an older one, or start from its weights with from_pretrained."
        )


def checkpoints_of(root: Path) -> list[Path]:
    """The checkpoints in a run's directory, whole or not, in the order in which they were made."""
    numbered = [
        (path.stat().st_mtime_ns, int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(numbered)]


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The checkpoint that a run goes on from; None where there is none. Collective.

    The one that `latest` names, or else the newest that can be resumed, as process 0 sees them:
    others may see a shared directory later. Those passed over are named in a warning.

    Raises:
        CheckpointError: on every process; the directory cannot be read.
    """
    found: list[str | None] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = _last_whole(Path(output_dir))
        except OSError as error:
            found[1] = f"The checkpoints in {output_dir} cannot be looked through: {error}."
    name, problem = broadcast_object_list(found)
    if problem is not None:
        raise CheckpointError(problem)
    return name


def _last_whole(root: Path) -> str | None:
    by_step = sorted(checkpoints_of(root), key=lambda path: int(path.name.rpartition("-")[2]))
    newest = newest_whole(root, by_step, require_whole=lambda path: require_resumable(str(path)))
    return None if newest is None else str(newest)
