"""From a checkpoint directory to a plain Hub model: its files without those of the training run.

A checkpoint is a Hub model already, so an export copies. With `dtype` or `max_shard_size` the
weights pass by tensor by tensor, so that memory holds one tensor, whatever the model.

    source -> whole? -> staging beside the target -> weights, others -> finish -> rename

`hf_speed.export` (integrations/hub) adds models in memory, URLs, the model card and the Hub.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.digest import digest_file
from hf_speed.checkpoint.hubweights import HubWeights, Masters, find_weights, report_unused
from hf_speed.checkpoint.manifest import STATE_DIRECTORY, Manifest, dump_json
from hf_speed.checkpoint.paths import Home
from hf_speed.checkpoint.plan import (
    INDEX_NAME,
    SINGLE_NAME,
    ModelPlan,
    PlannedFile,
    split_files,
)
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.checkpoint.sources import TensorSource
from hf_speed.checkpoint.tensorfile import (
    TensorFile,
    TensorSpec,
    sync_directory,
    sync_file,
    write_text,
)
from hf_speed.errors import CheckpointError, ConfigError

_TRAINING = re.compile(
    r"hf_speed|checkpoint-\d+|runs|global_step\d+|optimizer.*|scheduler.*|scaler.*|rng_state.*|"
    r"random_states.*|sampler.*|dl_state_dict.*|trainer_state\.json|latest|\..*|"
    # Pickles: the run's, or weights of another export that would contradict ours.
    r".*\.(bin|pt|pth|pkl|bin\.index\.json)"
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DEFAULT_SHARD_BYTES = 5 << 30


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        directory: where; None: on the Hub alone.
        files: names within it.
        left_out: names in the source that belong to the training run and were not copied.
        url: of the commit on the Hub, or of the remote store; None where there is none.
    """

    directory: Path | None
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    url: str | None = None


class ExportOptions(NamedTuple):
    """How the weights are to be written, checked.

    Attributes:
        cast: the dtype of floating-point weights; None: as they are.
        max_shard_bytes: of a file; None: the files as they are.
    """

    cast: torch.dtype | None
    max_shard_bytes: int | None

    @classmethod
    def parse(
        cls, dtype: torch.dtype | str | None, max_shard_size: int | str | None
    ) -> "ExportOptions":
        """Read what a user gave.

        Raises:
            ConfigError: a dtype or size that means nothing.
        """
        limit = None if max_shard_size is None else _parse_size(max_shard_size)
        return cls(_parse_dtype(dtype), limit)

    @property
    def is_copy(self) -> bool:
        """Whether the files stay as they are."""
        return self.cast is None and self.max_shard_bytes is None


def export(
    src: str | Path,
    dst: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    *,
    layout: Callable[[Path], ModelPlan | None] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> Exported:
    """Write the Hub model in `src` to `dst`, which `from_pretrained` loads without hf_speed.

    The model appears whole or not at all: it is written beside `dst` and renamed. Where the dtype
    changes and the checkpoint keeps masters of more bits than its files, values come from those.

    Args:
        src: a checkpoint of hf_speed, or any directory with safetensors weights.
        dst: absent or empty.
        dtype: of the floating-point weights, as in torch.bfloat16 or "bfloat16"; None: as they are.
        max_shard_size: bytes, or as in "5GB" and "512MiB"; None: the files as they are.
        layout: how the model in `src` is laid out on the Hub; None, or its result None: under the
            names that it has in memory. Asked for only where masters are read.
        finish: adds files of its own to the staging directory before it is renamed.

    Raises:
        CheckpointError: `src` has no weights, is not whole, or a link in it leaves it.
        ConfigError: a dtype or size that means nothing or cannot be had, or `dst` is not empty.
    """
    source, target = Path(src), Path(dst)
    options = ExportOptions.parse(dtype, max_shard_size)
    require_empty(target)
    # An unfinished save must not be published.
    has_state = (source / STATE_DIRECTORY).is_dir()
    manifest = read_manifest(source, is_strict=True) if has_state else None
    weights = find_weights(source, manifest)
    _check_options(weights, options)
    staging = staging_of(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        left_out = _copy_others(source, staging, weights, manifest)
        if options.is_copy and weights.says_format:
            for name in [*weights.files, *([INDEX_NAME] if weights.has_index else [])]:
                _copy(Home(source), staging, name, manifest)
        else:
            plan = layout(source) if layout and _has_masters(manifest) and options.cast else None
            _rewrite(weights, Masters(source, manifest, plan), staging, options)
            set_dtype(staging / "config.json", options.cast)
        if finish is not None:
            finish(staging)
        publish_directory(staging, target)
    except OSError as error:
        raise CheckpointError(f"Exporting {source} to {target} failed: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(target, files_in(target), tuple(left_out))


def require_empty(target: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: it is a file, or a directory that is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already and is not empty; export to a new directory.")


def staging_of(target: Path) -> Path:
    """Where an export is written before it is whole: on the same file system."""
    return target.with_name(f".{target.name}.staging")


def publish_directory(staging: Path, target: Path) -> None:
    """Put a whole directory in its place, forced to disk."""
    sync_directory(staging)
    staging.replace(target)
    sync_directory(target.parent)


def files_in(directory: Path) -> tuple[str, ...]:
    """Names of all files below a directory, sorted."""
    return tuple(
        sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    )


def set_dtype(path: Path, cast: torch.dtype | None) -> None:
    """Have config.json say what the weights now are, in its parts too (text_config)."""
    if cast is None or not path.is_file():
        return
    config = read_config(path)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = None
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        if key in part:
            part[key] = str(cast).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json says; {} where there is none. Some models' hold infinities.

    Raises:
        CheckpointError: it is not readable as a table.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table.")
    return config


def _has_masters(manifest: Manifest | None) -> bool:
    return manifest is not None and any(entry.kind == "master" for entry in manifest.entries)


def _check_options(weights: HubWeights, options: ExportOptions) -> None:
    path = weights.directory / "config.json"
    if options.cast is not None and read_config(path).get("quantization_config"):
        raise ConfigError(
            f"{path} has a quantization_config: dtype={options.cast} would turn its codes and "
            f"scales into other numbers. Export it as it is, or dequantize the model first."
        )
    if options.max_shard_bytes is not None and weights.is_adapter:
        raise ConfigError(
            f"{weights.directory} holds an adapter, which is one file: leave out max_shard_size."
        )


def _copy_others(
    source: Path, staging: Path, weights: HubWeights, manifest: Manifest | None
) -> list[str]:
    """Copy all but weights and the files of the run; names of the latter."""
    skipped = {*weights.files, INDEX_NAME, SINGLE_NAME}
    home = Home(source)
    left_out = []
    for path in sorted(source.iterdir()):
        if _TRAINING.fullmatch(path.name):
            left_out.append(path.name)
        elif path.is_dir():
            for file in path.rglob("*"):
                _own(home, str(file.relative_to(source)))
            shutil.copytree(_own(home, path.name), staging / path.name)
        elif path.name not in skipped:
            _copy(home, staging, path.name, manifest)
    return left_out


def _copy(home: Home, staging: Path, name: str, manifest: Manifest | None) -> None:
    """Copy one file, and check the copy against the manifest's checksum."""
    shutil.copyfile(_own(home, name), staging / name)
    sync_file(staging / name)
    record = None if manifest is None else manifest.files.get(name)
    if record is not None and record.digest not in (None, digest_file(staging / name).digest):
        raise CheckpointError(
            f"{home.directory / name} is damaged: it has another checksum than the manifest says. "
            f"Copy the file again, or use another checkpoint."
        )


def _own(home: Home, name: str) -> Path:
    """A file of the source, unless a link leads out: what it leads to would be published."""
    path = home.directory / name
    if home.owns(name):
        return path
    raise CheckpointError(
        f"{path} is a link to {path.resolve()}, outside of {home.directory}, and would be "
        f"published with the model. Put the file itself there, or remove the link."
    )


def _rewrite(weights: HubWeights, masters: Masters, staging: Path, options: ExportOptions) -> None:
    """Stream the weights into new files, one tensor in memory."""
    specs = weights.specs(options.cast)
    if options.cast is not None:
        report_unused(masters, weights)
    limit = options.max_shard_bytes or DEFAULT_SHARD_BYTES
    files = split_files(specs, limit)
    if weights.is_adapter:
        files = (PlannedFile(weights.files[0], tuple(specs)),)
    for planned in files:
        _fill(weights, masters, staging, planned)
    if len(files) > 1:
        total = {"total_size": sum(spec.nbytes for spec in specs)}
        weight_map = {spec.name: file.name for file in files for spec in file.tensors}
        index: dict[str, Any] = {"metadata": {**weights.metadata, **total}}
        index["weight_map"] = weight_map
        write_text(
            staging / INDEX_NAME, dump_json(index, "The index of the model", indent=2) + "\n"
        )


def _fill(weights: HubWeights, masters: Masters, staging: Path, planned: PlannedFile) -> None:
    """Write one file: first what comes from files, source by source, then what has masters."""
    served = {
        spec.name: spec
        for spec in planned.tensors
        if masters.serves(spec.name, weights.tensors[spec.name], spec.dtype)
    }
    with TensorFile(staging / planned.name, planned.tensors) as out:
        for file in sorted({weights.homes[spec.name] for spec in planned.tensors}):
            with TensorSource(_own(Home(weights.directory), file)) as source:
                for spec in planned.tensors:
                    if weights.homes[spec.name] == file and spec.name not in served:
                        out.write(spec.name, _read(source, spec, weights))
        for name in sorted(served, key=masters.order):
            out.write(name, masters.read(name).to(served[name].dtype))


def _read(source: TensorSource, spec: TensorSpec, weights: HubWeights) -> Tensor:
    value = source.read(spec.name, weights.digests.get(spec.name))
    return value.to(spec.dtype)


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"export: dtype={dtype!r} is no floating-point dtype; use 'bfloat16', 'float16' or "
            f"'float32'."
        )
    return found


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]I?B)?\s*", str(size).upper())
    number = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if number < 1:
        raise ConfigError(f"export: max_shard_size={size!r} is no size; use e.g. '5GB'.")
    return number
