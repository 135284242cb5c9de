"""Which framework wrote a directory, and where in it the checkpoint and its companions are."""

from pathlib import Path

from hf_speed.checkpoint.imports.dcp import is_dcp, open_dcp
from hf_speed.checkpoint.imports.deepspeed import is_deepspeed, open_deepspeed
from hf_speed.checkpoint.imports.foreign import Foreign
from hf_speed.checkpoint.imports.hub import is_hub_model, open_hub
from hf_speed.checkpoint.imports.universal import is_universal, open_universal
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.errors import CheckpointError, ConfigError

KINDS = ("auto", "deepspeed", "universal", "dcp", "hub")
"""What can be imported; "auto" finds out."""

_ACCELERATE_DIRECTORY = "pytorch_model"
"""Where accelerate's save_state puts what DeepSpeed saves."""

_OPENERS = {
    "deepspeed": open_deepspeed,
    "universal": open_universal,
    "dcp": open_dcp,
    "hub": open_hub,
}


def open_foreign(source: Path, kind: str = "auto") -> Foreign:
    """Open a checkpoint of another framework. Reads descriptions only, no values.

    Args:
        source: a directory: a Trainer's checkpoint-N, one of accelerate's save_state, one that was
            given to DeepSpeed's save_checkpoint or to torch.distributed.checkpoint, a Hub model.
        kind: one of KINDS.

    Raises:
        CheckpointError: it is none, damaged, or of a kind that cannot be read.
        ConfigError: no such kind or directory, or it is a checkpoint of hf_speed.
    """
    if kind not in KINDS:
        raise ConfigError(f"import: kind={kind!r} is unknown; use one of {', '.join(KINDS)}.")
    if not source.is_dir():
        raise ConfigError(f"import: {source} is no directory.")
    if (source / MANIFEST_PATH).is_file():
        raise ConfigError(
            f"import: {source} is a checkpoint of hf_speed already: any mesh resumes it as it is."
        )
    directory = source
    inner = source / _ACCELERATE_DIRECTORY
    if inner.is_dir() and (is_deepspeed(inner) or is_universal(inner)):
        directory = inner
    found = _kind_of(directory) if kind == "auto" else kind
    if found is None:
        names = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{source} is no checkpoint that can be imported: it holds {names}. Known are "
            f"DeepSpeed (latest, global_step*), universal (zero/), FSDP and "
            f"torch.distributed.checkpoint (.metadata, pytorch_model_fsdp_0), and Hub models "
            f"(model.safetensors)."
        )
    return _OPENERS[found](directory, home=_home(source))


def _kind_of(directory: Path) -> str | None:
    # Weights for from_pretrained may lie beside any of the others, so a Hub model comes last.
    if (directory / "zero").is_dir():
        return "universal"
    tests = {
        "deepspeed": is_deepspeed,
        "universal": is_universal,
        "dcp": is_dcp,
        "hub": is_hub_model,
    }
    return next((kind for kind, test in tests.items() if test(directory)), None)


def _home(source: Path) -> Path:
    """Where config.json is: in the directory, or in the one above that of a single save."""
    has_own = (source / "config.json").is_file()
    above = source.absolute().parent
    return above if not has_own and (above / "config.json").is_file() else source
