"""Checkpoints at addresses, for the Trainer and the Accelerator alike."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from hf_speed.checkpoint.remote import download, newest_url
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.stores import Store, shown
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import gather_objects

_log = get_logger(__name__)


def started_world() -> AxisGroup:
    """All started processes; this one alone where none were started together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return IDENTITY
    return AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "all processes")


def fetch_checkpoint(url: str, root: Path) -> str:
    """Download a checkpoint into a run's directory. Collective over all started processes.

    Args:
        url: of the checkpoint, or of a run whose `latest` names it.
        root: of the run, on storage that all processes share.

    Returns:
        Where it is now. Nothing is downloaded where it is there already.

    Raises:
        CheckpointError: on every process; it is not whole, or another one has its name here.
        ConfigError: no address, or its backend is not installed.
    """
    world = started_world()
    chosen = _chosen(url, world)
    target = root / (PurePosixPath(chosen).name or "checkpoint")
    _log.info("%s is downloaded to %s", shown(chosen), target)
    download(chosen, target, world=world)
    return str(target)


def has_checkpoint(url: str) -> bool:
    """Whether a run in a store has a newest checkpoint. Collective over all started processes."""
    world = started_world()
    return _chosen(url, world) != url


@contextmanager
def fetched(url: str, root: Path | None) -> Iterator[str]:
    """A downloaded checkpoint while the block runs. Collective over all started processes.

    Args:
        url: as in `fetch_checkpoint`.
        root: a directory that all processes share; None: the system's for temporary files, which
            processes of one machine share.

    Raises:
        CheckpointError: on every process; it is not whole.
        ConfigError: no address, or its backend is not installed.
    """
    with shared_scratch(root) as scratch:
        yield fetch_checkpoint(url, scratch)


@contextmanager
def shared_scratch(root: Path | None) -> Iterator[Path]:
    """An empty directory that all processes know, while the block runs. Collective."""
    world = started_world()
    made = ""
    with agreed(world, f"Making a directory in {root or tempfile.gettempdir()}"):
        if world.rank == 0:
            if root is not None:
                root.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=".hf_speed-", dir=root)
    scratch = Path(gather_objects(made, group=world)[0])
    try:
        with agreed(world, f"Looking into {scratch}"):
            if not scratch.is_dir():
                raise CheckpointError(
                    f"{scratch} is not visible here: checkpoints pass by a directory that all "
                    f"processes share. Set project_dir of the Accelerator to one."
                )
        # Until all are through: nobody removes what another one still reads or writes.
        with agreed(world, f"Using {scratch}"):
            yield scratch
    finally:
        if world.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _chosen(url: str, world: AxisGroup) -> str:
    """The address of the checkpoint that is meant, as the first process sees it."""
    Store(url)  # Its backend must be on every machine; said before anything is exchanged.
    found = ""
    with agreed(world, f"Looking for a checkpoint in {shown(url)}"):
        if world.rank == 0:
            found = newest_url(url)
    return gather_objects(found, group=world)[0]
