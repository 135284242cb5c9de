"""One checkpoint of the Trainer, from its first file to the removal of older ones.

    weights -> (the Trainer's small files) -> states -> scheduler, RNG, trainer_state.json
            -> whole? -> mirror -> `latest` -> save_total_limit

Weights, states and what comes after the last file are jobs of one save; with
checkpoint.asynchronous they run behind the training. The Trainer itself would remove older
checkpoints at the end of `_save_checkpoint`, when the new one is not yet known to be whole.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_speed.checkpoint.latest import Rotation, finish_checkpoint, read_latest, write_latest
from hf_speed.checkpoint.remote import mirror_of
from hf_speed.checkpoint.saver import Save
from hf_speed.engine import Engine
from hf_speed.integrations.transformers.resume import checkpoints_of, require_resumable


class RunningCheckpoint(NamedTuple):
    """The checkpoint that a Trainer is writing.

    Attributes:
        save: whose jobs write it.
        limit: `save_total_limit`, which the arguments do not show meanwhile.
        mirror: copies it elsewhere when it is whole (`checkpoint.mirror`).
    """

    save: Save
    limit: int | None
    mirror: Callable[[Path], object] | None


@contextlib.contextmanager
def running_checkpoint(args: Any, engine: Engine, directory: Path) -> Iterator[RunningCheckpoint]:
    """Begin a checkpoint; for as long as it lasts the Trainer removes none. Collective.

    Raises:
        CheckpointError: the one before has failed.
    """
    save = engine.saves.begin(f"Saving {directory}")
    mirror = mirror_of(engine.config, save.group)
    running = RunningCheckpoint(save, args.save_total_limit, mirror)
    with _limit(args, None), save.together():
        yield running


@contextlib.contextmanager
def whole_arguments(args: Any, running: RunningCheckpoint | None) -> Iterator[None]:
    """Show `save_total_limit` again, while the arguments are written to a file."""
    with _limit(args, args.save_total_limit if running is None else running.limit):
        yield


@contextlib.contextmanager
def _limit(args: Any, value: int | None) -> Iterator[None]:
    before, args.save_total_limit = args.save_total_limit, value
    try:
        yield
    finally:
        args.save_total_limit = before


def finish(running: RunningCheckpoint, directory: Path, *, best: str | None) -> None:
    """Queue what comes after the last file. Collective.

    Args:
        running: the checkpoint.
        directory: of it, in the directory of the run.
        best: the best checkpoint, which stays.

    Raises:
        CheckpointError: on every rank, where jobs run at once: it is not whole, or cannot be named.
    """
    root = directory.parent
    keep = () if best is None else (Path(best),)
    running.save.submit(
        partial(
            finish_checkpoint,
            directory,
            root=root,
            world=running.save.group,
            require_whole=lambda path: require_resumable(str(path)),
            rotation=Rotation(running.limit, keep, partial(checkpoints_of, root)),
            mirror=running.mirror,
        )
    )


def correct_latest(root: Path, best: str | None) -> None:
    """Let `latest` name the best checkpoint where the one that it names is gone."""
    named = read_latest(root)
    if named is not None and not named.is_dir() and best is not None and Path(best).is_dir():
        write_latest(root, Path(best))
