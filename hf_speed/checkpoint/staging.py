"""How several ranks write one directory so that a reader sees all of it or nothing.

    prepare   rank 0 makes an empty staging directory beside what is there          agree
    stage     every rank writes its own files into it, each forced to disk          agree
    publish   rank 0 checks that it sees them all, and moves them by rename         agree

After each step the ranks agree: an error on any becomes a CheckpointError on all of them, and what
was published before is still there. A process killed during a save leaves a staging directory,
which no reader looks at and the next save clears.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hf_speed.checkpoint.tensorfile import sync_directory
from hf_speed.errors import CheckpointError, MeshError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import agree


@contextmanager
def agreed(
    world: AxisGroup, what: str, *, left: str = "What was saved before is untouched."
) -> Iterator[None]:
    """Run a block on every rank; if it fails on one, raise on all.

    The block must issue no collective that a failure could keep this rank from joining. One object
    all-gather at its end.

    Args:
        world: the ranks that take part.
        what: names the work and its directory, as in "Saving the model to out/checkpoint-10".
        left: what the failure leaves behind.

    Raises:
        CheckpointError: the block failed on some rank, or a rank is gone.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - becomes a CheckpointError on every rank
        failure = error
    try:
        first = agree(failure, group=world)
    except MeshError as error:
        raise CheckpointError(f"{what} did not finish: a rank is gone ({error}). {left}") from (
            failure or error
        )
    if first is not None:
        raise CheckpointError(f"{what} failed on {first.rstrip('.')}. {left}") from failure


@contextmanager
def staged(staging: Path, world: AxisGroup, what: str) -> Iterator[None]:
    """Make `staging` empty on entry and remove it on exit. Collective: all ranks of `world`."""
    with agreed(world, what):
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    try:
        yield
    finally:
        # After a failure too: the ranks have agreed by now, so nobody writes any more.
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


def check_visible(staging: Path, names: Iterable[str]) -> None:
    """Check that this process sees the files that the ranks have written.

    Raises:
        CheckpointError: it does not see one of them.
    """
    for name in names:
        if not (staging / name).is_file():
            raise CheckpointError(
                f"{staging / name} was written by another rank but is not visible on rank 0. A "
                f"checkpoint directory must be on storage that all ranks share."
            )


def publish(staging: Path, directory: Path, names: Mapping[str, str]) -> None:
    """Rename files of `staging` into `directory`, staged to final name, and force it to disk."""
    for name, final in names.items():
        (staging / name).replace(directory / final)
    sync_directory(directory)
