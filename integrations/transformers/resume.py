"""Which checkpoint of a run may be resumed.

The Trainer writes weights, then our state, then its own (trainer_state.json), and a process can die
between any two. What is whole has our manifest; a save without optimizer state (save_only_model)
has trainer_state.json, and none of what is written between.
"""

import re
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_speed.checkpoint.reader import read_manifest
from hf_speed.errors import CheckpointError, ConfigError, HfSpeedError
from hf_speed.integrations.weights import has_engine_state
from hf_speed.logs import get_logger

_log = get_logger(__name__)

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
            f"by number. Start from its weights alone (from_pretrained({checkpoint!r})), or resume "
            f"it with hf_speed=None."
        )
    if has_engine_state(checkpoint) or not has_weights_only(checkpoint):
        read_manifest(checkpoint)
    state = home / TRAINER_STATE_NAME
    if not state.is_file():
        raise CheckpointError(
            f"{state} is missing: the save of this checkpoint was cut short after its weights and "
            f"state. Resume an older one, or start from its weights with from_pretrained."
        )


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint of a run that can be resumed; None where there is none.

    Newer ones whose save was cut short are named in a warning.
    """
    home = Path(output_dir)
    numbered = {
        int(match[1]): path
        for path in (home.iterdir() if home.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    for step in sorted(numbered, reverse=True):
        try:
            require_resumable(str(numbered[step]))
        except HfSpeedError as error:
            _log.warning("%s is passed over: %s", numbered[step], error)
            continue
        return str(numbered[step])
    return None
