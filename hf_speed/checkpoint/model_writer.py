"""Writing a Hub model from all ranks at once.

The full tensors pass by on every rank, a unit at a time. Each rank keeps copies of those that go
into its own files and hands them to a writing thread:

    full parameters -> group complete -> convert to Hub tensors -> host copy -> thread -> own file

At most one file's bytes wait in host memory per rank, and rank 0 writes file 1 to disk while file 2
is being gathered on rank 1.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_speed.checkpoint.background import BackgroundWriter
from hf_speed.checkpoint.digest import FileRecord
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME, ModelPlan, TensorGroup
from hf_speed.checkpoint.staging import agreed, check_visible, publish, staged
from hf_speed.checkpoint.tensorfile import (
    TensorFile,
    TensorSpec,
    sync_directory,
    sync_file,
    write_text,
)
from hf_speed.checkpoint.written import WrittenFiles
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup

STAGING_NAME = ".hf_speed-model-staging"

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

_log = get_logger(__name__)


def write_model(
    directory: str | Path,
    plan: ModelPlan,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    world: AxisGroup,
    extras: Callable[[Path], None] | None = None,
    written: WrittenFiles | None = None,
    at_once: bool = False,
) -> tuple[str, ...]:
    """Write a Hub model: its safetensors files, the index, and what `extras` adds.

    Collective: every rank of `world` calls it with the same plan, and `parameters` yields the same
    names in the same order on each. If one rank's disk fails, that rank goes on taking part in what
    `parameters` gathers, and all ranks raise at the end. Three object all-gathers.

    A finished checkpoint in the same directory loses its `hf_speed/manifest.json` at the moment the
    new model takes the place of the old one, for the two no longer belong together.

    Args:
        directory: the checkpoint, on storage that all ranks share; made if absent.
        plan: file i is written by rank i % world.size.
        parameters: every source of the plan once (aliases may come too), as full tensors that are
            valid until the next one; on any device.
        world: the ranks that write.
        extras: called on rank 0 with a directory; the files that it writes there (config.json)
            appear with the model.
        written: is told the checksums of this rank's files, for `write_states`.
        at_once: write each value before the next is asked for, without a copy: where all ranks get
            theirs at the same time.

    Returns:
        Names of all files now in `directory` because of this call; on rank 0, extras included.

    Raises:
        CheckpointError: on every rank; a rank could not write, or `parameters` and plan differ.
    """
    directory = Path(directory)
    staging = directory / STAGING_NAME
    what = f"Saving the model to {directory}"
    names = [file.name for file in plan.files]
    with staged(staging, world, what):
        with agreed(world, what):
            records = _write_own_files(staging, plan, parameters, world, at_once=at_once)
            if written is not None:
                written.note(staging, directory, records)
            if world.rank == 0:
                if plan.is_sharded:
                    write_text(staging / INDEX_NAME, plan.index_json() + "\n")
                    names.append(INDEX_NAME)
                if extras is not None:
                    extras(staging)
                    others = _others(staging)
                    for other in others:
                        sync_file(staging / other)
                    names.extend(others)
        with agreed(world, what):
            if world.rank == 0:
                _replace_model(staging, directory, names)
    return tuple(names)


class _OwnFiles:
    """The files of this rank that are open, and the routing of tensors into them."""

    def __init__(self, staging: Path, plan: ModelPlan, world: AxisGroup) -> None:
        self._staging = staging
        self._plan = plan
        self._groups = {source: group for group in plan.groups for source in group.sources}
        self._homes: dict[str, tuple[int, TensorSpec]] = {
            spec.name: (index, spec)
            for index, file in enumerate(plan.files)
            if index % world.size == world.rank
            for spec in file.tensors
        }
        self._held: dict[str, dict[str, Tensor]] = {}
        self._open: dict[int, TensorFile] = {}
        self._expected = set(self._groups)
        self.records: dict[str, FileRecord] = {}

    @property
    def limit_bytes(self) -> int:
        """Bytes that may wait to be written: this rank's largest file."""
        mine = {index for index, _ in self._homes.values()}
        return max((self._plan.files[index].nbytes for index in mine), default=0)

    def take(self, name: str, value: Tensor, background: BackgroundWriter | None) -> None:
        """Route one full tensor; it is copied before this returns, or written on this thread."""
        source = self._plan.aliases.get(name, name)
        if source not in self._expected:
            if source in self._groups:
                return  # A tied weight that came under its other name before.
            raise CheckpointError(f"The model yields {name}, which the plan does not know.")
        self._expected.discard(source)
        group = self._groups[source]
        if not any(target in self._homes for target in group.targets):
            return
        for target, tensor in self._complete(group, source, value.detach()).items():
            if target not in self._homes:
                continue
            index, spec = self._homes[target]
            if background is None:
                self._write(index, spec.name, _checked(tensor, spec).to("cpu", spec.dtype))
                continue
            host = torch.empty(spec.shape, dtype=spec.dtype).copy_(_checked(tensor, spec))
            job = partial(self._write, index, spec.name, host)
            background.submit(job, nbytes=spec.nbytes)
            del job, host

    def finish(self) -> None:
        """Check that everything came."""
        if self._expected:
            raise CheckpointError(
                f"The model did not yield {sorted(self._expected)[:5]}, which the plan needs."
            )

    def abandon(self) -> None:
        """Close what is still open; the writing thread has ended."""
        while self._open:
            self._open.popitem()[1].abandon()

    def _complete(self, group: TensorGroup, source: str, value: Tensor) -> dict[str, Tensor]:
        """The group's targets if `source` was the last to come, else nothing."""
        if group.is_rename:
            return {group.targets[0]: value}
        held = self._held.setdefault(group.sources[0], {})
        # The last one need not outlive this call; the others do, and their memory is the engine's.
        held[source] = value if len(held) + 1 == len(group.sources) else value.clone()
        if len(held) < len(group.sources):
            return {}
        del self._held[group.sources[0]]
        # In the plan's order: stacked experts are told apart by it.
        return dict(self._plan.convert({name: held[name] for name in group.sources}))

    def _write(self, index: int, name: str, value: Tensor) -> None:
        """On the writing thread: to the tensor's place, and close the file after its last one."""
        if index not in self._open:
            planned = self._plan.files[index]
            self._open[index] = TensorFile(self._staging / planned.name, planned.tensors)
        file = self._open[index]
        file.write(name, value)
        if file.is_full:
            del self._open[index]
            file.close()
            self.records[file.path.name] = file.record


def _write_own_files(
    staging: Path,
    plan: ModelPlan,
    parameters: Iterable[tuple[str, Tensor]],
    world: AxisGroup,
    *,
    at_once: bool,
) -> dict[str, FileRecord]:
    """Write the files that are this rank's; what is in them."""
    files = _OwnFiles(staging, plan, world)
    failure: Exception | None = None
    thread = nullcontext() if at_once else BackgroundWriter(limit_bytes=files.limit_bytes)
    try:
        with thread as background:
            for name, value in parameters:
                if failure is not None:
                    continue  # Other ranks need this one in the gathers that are still to come.
                try:
                    files.take(name, value, background)
                except Exception as error:  # noqa: BLE001 - raised below
                    failure = error
            if failure is not None:
                raise failure
            files.finish()
    finally:
        files.abandon()
    return files.records


def _checked(value: Tensor, spec: TensorSpec) -> Tensor:
    """The value, if it is what the plan says but for the precision of floats."""
    both_float = value.is_floating_point() and spec.dtype.is_floating_point
    if tuple(value.shape) != spec.shape or not (value.dtype == spec.dtype or both_float):
        raise CheckpointError(
            f"{spec.name} came as {tuple(value.shape)} {value.dtype}; the plan has {spec.shape} "
            f"{spec.dtype}. Plan again after the model has changed."
        )
    return value


def _others(staging: Path) -> list[str]:
    """What extras wrote: relative paths of files that are no weights."""
    return [
        str(path.relative_to(staging))
        for path in sorted(staging.rglob("*"))
        if path.is_file() and path.name != INDEX_NAME and not _WEIGHTS.fullmatch(path.name)
    ]


def _replace_model(staging: Path, directory: Path, names: list[str]) -> None:
    """On rank 0: old model out, new model in."""
    check_visible(staging, names)
    manifest = directory / MANIFEST_PATH
    if manifest.exists():
        _log.warning(
            "%s: a new model replaces that of a finished checkpoint, so its hf_speed/ state no "
            "longer fits and is dropped until it is saved again.",
            directory,
        )
        manifest.unlink()
        sync_directory(manifest.parent)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    publish(staging, directory, {name: name for name in names})
    for path in directory.iterdir():
        is_ours = _WEIGHTS.fullmatch(path.name) or path.name in (INDEX_NAME, SINGLE_NAME)
        if is_ours and path.name not in names:
            path.unlink()
    sync_directory(directory)
