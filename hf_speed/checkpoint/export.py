"""From a checkpoint directory to a plain Hub model: its files without those of the training run.

A checkpoint is a Hub model already, so an export copies. With `dtype` or `max_shard_size` the
weights pass by tensor by tensor, so that memory holds one tensor, whatever the model.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hf_speed.checkpoint.manifest import STATE_DIRECTORY, dump_json, load_json
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME, PlannedFile, split_files
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.checkpoint.tensorfile import (
    DTYPE_OF_CODE,
    TensorFile,
    TensorSpec,
    sync_directory,
    write_text,
)
from hf_speed.errors import CheckpointError, ConfigError

_TRAINING = re.compile(
    r"hf_speed|checkpoint-\d+|runs|global_step\d+|optimizer.*|scheduler.*|scaler.*|rng_state.*|"
    r"random_states.*|sampler.*|trainer_state\.json|training_args\.bin|\..*"
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DEFAULT_SHARD_BYTES = 5 << 30


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        directory: where.
        files: names within it.
        left_out: names in the source that belong to the training run and were not copied.
    """

    directory: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]


class _Weights(NamedTuple):
    """The weights of a Hub model on disk: each tensor's file."""

    directory: Path
    homes: dict[str, str]
    metadata: dict[str, Any]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.homes.values()))


def export(
    src: str | Path,
    dst: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
) -> Exported:
    """Write the Hub model in `src` to `dst`, which `from_pretrained` loads without hf_speed.

    The model appears whole or not at all: it is written beside `dst` and renamed.

    Args:
        src: a checkpoint of hf_speed, or any directory with safetensors weights.
        dst: absent or empty.
        dtype: of the floating-point weights, as in torch.bfloat16 or "bfloat16"; None: as they are.
        max_shard_size: bytes, or as in "5GB" and "512MiB"; None: the files as they are.

    Raises:
        CheckpointError: `src` has no weights, or is not whole.
        ConfigError: a dtype or size that means nothing, or `dst` is not empty.
    """
    source, target = Path(src), Path(dst)
    cast = _parse_dtype(dtype)
    limit = None if max_shard_size is None else _parse_size(max_shard_size)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already and is not empty; export to a new directory.")
    if (source / STATE_DIRECTORY).is_dir():
        read_manifest(source)  # An unfinished save must not be published.
    weights = _find_weights(source)
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        left_out = _copy_others(source, staging, weights)
        if cast is None and limit is None:
            for name in [*weights.files, *([INDEX_NAME] if _has_index(source) else [])]:
                shutil.copyfile(source / name, staging / name)
        else:
            _rewrite(weights, staging, cast, limit or _DEFAULT_SHARD_BYTES)
            _set_dtype(staging / "config.json", cast)
        sync_directory(staging)
        staging.replace(target)
    except OSError as error:
        raise CheckpointError(f"Exporting {source} to {target} failed: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    return Exported(target, tuple(files), tuple(left_out))


def _has_index(directory: Path) -> bool:
    return (directory / INDEX_NAME).is_file()


def _find_weights(directory: Path) -> _Weights:
    """Where each tensor is; every file is opened once, which shows if it is cut short."""
    if _has_index(directory):
        where = str(directory / INDEX_NAME)
        index = load_json((directory / INDEX_NAME).read_text(encoding="utf-8"), where)
        homes = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(homes, dict) or not homes:
            raise CheckpointError(f"{where} has no weight_map.")
        for file in set(homes.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{where} names the file {file!r}, which leaves {directory}.")
        weights = _Weights(directory, homes, index.get("metadata") or {})
    elif (directory / SINGLE_NAME).is_file():
        weights = _Weights(
            directory, dict.fromkeys(_keys(directory / SINGLE_NAME), SINGLE_NAME), {}
        )
    else:
        raise CheckpointError(
            f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: there is no model to export. "
            f"Give a checkpoint-N directory, or one that save_pretrained has written."
        )
    for file in weights.files:
        there = _keys(directory / file)
        absent = [
            name for name, home in weights.homes.items() if home == file and name not in there
        ]
        if absent:
            raise CheckpointError(
                f"{directory / file} lacks {absent[0]}, which the index puts there."
            )
    return weights


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from error


def _keys(path: Path) -> set[str]:
    with _open(path) as file:
        return set(file.keys())


def _copy_others(source: Path, staging: Path, weights: _Weights) -> list[str]:
    """Copy all but weights and the files of the run; names of the latter."""
    skipped = {*weights.files, INDEX_NAME}
    left_out = []
    for path in sorted(source.iterdir()):
        if _TRAINING.fullmatch(path.name):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, staging / path.name)
        elif path.name not in skipped:
            shutil.copyfile(path, staging / path.name)
    return left_out


def _rewrite(
    weights: _Weights, staging: Path, cast: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Stream the weights into new files, one tensor in memory."""
    specs = list(_specs(weights, cast))
    files = split_files(specs, max_shard_bytes)
    for planned in files:
        _fill(weights, staging, planned)
    if len(files) > 1:
        total = {"total_size": sum(spec.nbytes for spec in specs)}
        weight_map = {spec.name: file.name for file in files for spec in file.tensors}
        index = {"metadata": {**weights.metadata, **total}, "weight_map": weight_map}
        write_text(
            staging / INDEX_NAME, dump_json(index, "The index of the model", indent=2) + "\n"
        )


def _specs(weights: _Weights, cast: torch.dtype | None) -> Iterator[TensorSpec]:
    for file in weights.files:
        with _open(weights.directory / file) as handle:
            for name in sorted(name for name, home in weights.homes.items() if home == file):
                stored = handle.get_slice(name)
                dtype = DTYPE_OF_CODE.get(stored.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{weights.directory / file}: {name} has the dtype {stored.get_dtype()}, "
                        f"which hf_speed cannot rewrite. Export without dtype and max_shard_size."
                    )
                wanted = cast if cast is not None and dtype.is_floating_point else dtype
                yield TensorSpec(name, tuple(stored.get_shape()), wanted)


def _fill(weights: _Weights, staging: Path, planned: PlannedFile) -> None:
    out = TensorFile(staging / planned.name, planned.tensors)
    try:
        for source in sorted({weights.homes[spec.name] for spec in planned.tensors}):
            with _open(weights.directory / source) as handle:
                for spec in planned.tensors:
                    if weights.homes[spec.name] == source:
                        out.write(spec.name, handle.get_tensor(spec.name).to(spec.dtype))
    except BaseException:
        out.abandon()
        raise
    out.close()


def _set_dtype(path: Path, cast: torch.dtype | None) -> None:
    """Have config.json say what the weights now are."""
    if cast is None or not path.is_file():
        return
    config = load_json(path.read_text(encoding="utf-8"), str(path))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(cast).removeprefix("torch.")
    path.write_text(dump_json(config, "The model's config", indent=2) + "\n", encoding="utf-8")


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
