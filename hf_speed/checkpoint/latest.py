"""Which checkpoint of a run is the newest whole one, and which ones make room for it.

A save ends with `finish_checkpoint`: the checkpoint is looked through, then the file `latest` in
the run's directory names it, and only then may older ones go:

    whole? -> mirror -> latest -> rotate

So whenever a process dies, `latest` names a whole checkpoint.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.tensorfile import sync_directory, sync_file, write_text
from hf_speed.errors import HfSpeedError
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup

LATEST_NAME = "latest"
_MAX_NAME_BYTES = 4096

_log = get_logger(__name__)


class Rotation(NamedTuple):
    """How many checkpoints a run keeps.

    Attributes:
        limit: at most so many; None: all.
        keep: never removed, besides the newest: the best one.
        find: all checkpoints of the run, oldest first.
    """

    limit: int | None
    keep: Collection[Path]
    find: Callable[[], Sequence[Path]]


def finish_checkpoint(
    directory: str | Path,
    *,
    root: Path | None,
    world: AxisGroup,
    require_whole: Callable[[Path], object],
    rotation: Rotation,
    mirror: Callable[[Path], object] | None = None,
) -> None:
    """Make a checkpoint whose files are all written the newest of its run. Collective.

    Args:
        directory: the checkpoint.
        root: of the run, where `latest` is written; None: the checkpoint belongs to no run.
        world: the ranks that wrote it.
        require_whole: raises for a checkpoint that cannot be resumed.
        rotation: which older ones go then.
        mirror: collective; copies the checkpoint elsewhere. `latest` waits for it.

    Raises:
        CheckpointError: on every rank; the checkpoint is not whole, or could not be mirrored or
            named. Older ones are all there.
    """
    directory = Path(directory)
    what = f"Finishing {directory}"
    # Every rank has written its last file when it comes here.
    with agreed(world, what):
        pass
    with agreed(world, what):
        if world.rank == 0:
            require_whole(directory)
            _sync_files(directory)
    if mirror is not None:
        mirror(directory)
    with agreed(world, what):
        if world.rank == 0:
            if root is not None:
                write_latest(root, directory)
            rotate(directory, rotation, require_whole)


def write_latest(root: Path, directory: Path) -> None:
    """Let `root`/latest name a checkpoint inside `root`, by one rename."""
    name = directory.resolve().relative_to(root.resolve()).as_posix()
    staged = root / f".{LATEST_NAME}-staging"
    write_text(staged, f"{name}\n")
    staged.replace(root / LATEST_NAME)
    sync_directory(root)


def read_latest(root: str | Path) -> Path | None:
    """The checkpoint that `root`/latest names, whole or not; None where it names none."""
    path = Path(root) / LATEST_NAME
    try:
        with path.open("rb") as file:
            name = file.read(_MAX_NAME_BYTES + 1).decode().removesuffix("\n")
    except (OSError, UnicodeDecodeError):
        return None
    parts = PurePosixPath(name).parts
    # A name that leads out of the run is none of ours.
    inside = parts and not {"..", "/"} & set(parts) and name.isprintable()
    if not inside or len(name) > _MAX_NAME_BYTES:
        _log.warning("%s names no checkpoint of this run and is ignored.", path)
        return None
    return Path(root) / name


def newest_whole(
    root: str | Path,
    checkpoints: Sequence[Path],
    *,
    require_whole: Callable[[Path], object],
) -> Path | None:
    """The checkpoint to go on from: what `latest` names, or else the newest that is whole.

    Those passed over are named in a warning.

    Args:
        root: of the run.
        checkpoints: of the run, oldest first.
        require_whole: raises for a checkpoint that cannot be resumed.
    """
    named = read_latest(root)
    found = [each for each in reversed(checkpoints) if each != named]
    for each in [named, *found] if named is not None else found:
        try:
            require_whole(each)
        except HfSpeedError as error:
            _log.warning("%s is passed over: %s", each, error)
            continue
        return each
    return None


def rotate(newest: Path, rotation: Rotation, require_whole: Callable[[Path], object]) -> None:
    """Remove what is beyond the limit; `newest` is whole and stays."""
    if rotation.limit is None or rotation.limit <= 0:
        return

    def is_cut(path: Path) -> bool:
        try:
            require_whole(path)
        except HfSpeedError:
            return True
        return False

    keep = {each.resolve() for each in (newest, *rotation.keep)}
    for path in beyond_limit(rotation.find(), limit=rotation.limit, keep=keep, is_cut=is_cut):
        try:
            remove_checkpoint(path)
        except OSError as error:
            _log.warning("%s is beyond the limit but cannot be removed: %s", path, error)


def beyond_limit(
    checkpoints: Sequence[Path],
    *,
    limit: int,
    keep: Collection[Path],
    is_cut: Callable[[Path], bool],
) -> list[Path]:
    """Which checkpoints go so that `limit` are left, or as many as have to be kept.

    First those whose save was cut short, then the oldest. (transformers removes the oldest, and
    may leave only what was cut short.)

    Args:
        checkpoints: oldest first.
        limit: at least 1.
        keep: resolved paths of those that stay.
        is_cut: whether one cannot be resumed; asked only where something has to go.
    """
    free = [each for each in checkpoints if each.resolve() not in keep]
    kept = len(checkpoints) - len(free)
    excess = len(checkpoints) - max(limit, kept)
    if excess <= 0:
        return []
    cut = [each for each in free if is_cut(each)]
    return [*cut, *(each for each in free if each not in cut)][:excess]


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, manifest first: what is half deleted must not pass for whole."""
    for manifest in (directory / MANIFEST_PATH, *directory.glob(f"*/{MANIFEST_PATH}")):
        manifest.unlink(missing_ok=True)
    shutil.rmtree(directory)


def _sync_files(directory: Path) -> None:
    """Force to disk what others than the writers of tensors have put there."""
    for path in directory.rglob("*"):
        if path.is_file():
            sync_file(path)
    sync_directory(directory)
    sync_directory(directory.parent)
