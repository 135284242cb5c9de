"""The random state of a rank in a checkpoint, and on which rank of another mesh it goes on.

On the mesh that it was saved on each rank goes on with its own. On another one a rank goes on with
that of the data-parallel rank of its index. All ranks that see one batch then get one state: so the
dropout that they repeat agrees.
"""

import random
from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from hf_speed.checkpoint.reader import StateReader
from hf_speed.engine.saved_run import IMPORTED_FROM, saved_mesh
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.axes import AXES, Axis
from hf_speed.mesh.collectives import broadcast_object
from hf_speed.mesh.topology import rank_of

_DATA_AXES: tuple[Axis, ...] = ("dp_replicate", "dp_shard", "ep")
"""Ranks apart along these see different batches; ranks along the others see the same."""

_log = get_logger(__name__)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of this rank's generators, as bytes."""
    states = {"cpu_rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    return states


def share_rng(mesh: ParallelMesh) -> None:
    """Give the ranks that see one batch the random states of the first of them. Collective.

    Python's and numpy's too, which data pipelines draw from. Dropout that these ranks repeat,
    tokens that they sample and rows that they shuffle then agree.
    """
    group = mesh.axis("pp", "tp")
    if group.is_identity:
        return
    # The global generator is what data pipelines draw from.
    numpy = np.random.get_state()  # noqa: NPY002
    mine = (random.getstate(), numpy, rng_state(mesh.device))
    python, numpy, states = broadcast_object(mine, group=group, device=mesh.device)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    _set_states(states, mesh)


def load_rng(mesh: ParallelMesh, reader: StateReader, *, says_so: bool = True) -> None:
    """Set this rank's generators.

    Args:
        mesh: of this run.
        reader: of the checkpoint.
        says_so: warn where some rank of this run has no state.

    Raises:
        CheckpointError: the file with the state is damaged.
    """
    there = saved_mesh(reader.meta, reader.where)
    if there is None:
        there = dict.fromkeys(AXES, 1) | {"dp_shard": max(reader.manifest.world_size, 1)}
    source = _source(mesh, there)
    local = reader.local(source) if source is not None else {}
    num_here, num_there = _num_data_ranks(mesh.sizes), _num_data_ranks(there)
    if says_so and IMPORTED_FROM in reader.meta:
        _log.warning(
            "%s was imported and has no RNG states of ours. The Trainer goes on with those in its "
            "rng_state*.pth, if they are there for as many processes; otherwise dropout and "
            "sampling will differ from the run that wrote it.",
            reader.directory,
        )
    elif says_so and (num_here > num_there or "cpu_rng" not in local):
        _log.warning(
            "%s has no RNG states for all of this run's %d data-parallel ranks (it was saved by "
            "%d): dropout and sampling of the others will differ from the run that wrote it.",
            reader.directory,
            num_here,
            num_there,
        )
    try:
        _set_states(local, mesh)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{reader.directory} holds random states of rank {source} that are none: {error}."
        ) from error


def _set_states(states: Mapping[str, torch.Tensor], mesh: ParallelMesh) -> None:
    if "cpu_rng" in states:
        torch.set_rng_state(states["cpu_rng"])
    if "cuda_rng" in states and mesh.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_rng"], mesh.device)


def _source(mesh: ParallelMesh, there: Mapping[Axis, int]) -> int | None:
    """The rank of the saved mesh whose state this rank takes over; None where it has no like."""
    if there == mesh.sizes:
        return mesh.rank
    index = 0
    for axis in _DATA_AXES:
        index = index * mesh.sizes[axis] + mesh.coordinates[axis]
    places: dict[Axis, int] = {"pp": 0, "tp": 0}
    for axis in reversed(_DATA_AXES):
        index, places[axis] = divmod(index, there[axis])
    return rank_of(places, there) if index == 0 else None


def _num_data_ranks(sizes: Mapping[Axis, int]) -> int:
    return prod(sizes[axis] for axis in _DATA_AXES)
