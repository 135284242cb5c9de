"""Which ranks see one batch, and gathering what each batch gave, once.

The ranks of a pipeline, and those that divide layers, work on the same batch: a step has as many
batches as there are data-parallel ranks, not processes. Data loaders, schedulers and metrics ask
here; accelerate's own `gather` stays one over all processes, by which the Trainer counts tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor

from hf_speed.config.tree import SpeedConfig
from hf_speed.engine.assemble import make_mesh
from hf_speed.mesh.collectives import all_gather_flat, guard


class BatchMesh:
    """The processes of an Accelerator by the batches that they see.

    Args:
        config: says how they are laid out.
        device: of batches and outputs.

    Attributes:
        num_batches: different batches at a time: data-parallel ranks.
        index: of this rank's batch, 0 to num_batches - 1.
        num_sharing: ranks that see the same batch.

    Raises:
        ConfigError: the config asks for another number of processes.
    """

    def __init__(self, config: SpeedConfig, device: torch.device) -> None:
        self._mesh = make_mesh(config, device)
        sizes = self._mesh.sizes
        places = self._mesh.coordinates
        self.num_batches = sizes["dp_replicate"] * sizes["dp_shard"]
        self.index = places["dp_replicate"] * sizes["dp_shard"] + places["dp_shard"]
        self.num_sharing = sizes["pp"] * sizes["tp"]

    @property
    def is_shared(self) -> bool:
        """Whether several ranks see one batch."""
        return self.num_sharing > 1

    def gather(self, data: Any) -> Any:
        """The rows of every batch once, in the order of the batches. Collective.

        Args:
            data: tensors of equal shapes on all ranks, however nested; a 0-d one is one row.
        """
        return recursively_apply(self._gather_tensor, data, error_on_other_type=True)

    def _gather_tensor(self, value: Tensor) -> Tensor:
        rows = value.unsqueeze(0) if value.dim() == 0 else value
        group = self._mesh.axis("dp_replicate", "dp_shard")
        if group.is_identity or not rows.numel():
            return rows
        everyone = rows.new_empty(group.size, *rows.shape)
        everyone[group.rank] = rows
        # Bytes: backends do not know every dtype.
        flat = everyone.view(-1).view(torch.uint8)
        all_gather_flat(flat, group=group, journal=self._mesh.journal).wait()
        return everyone.flatten(0, 1)

    def gather_objects(self, data: Any) -> list[Any]:
        """Lists of anything that can be pickled, joined: those of every batch once. Collective."""
        group = self._mesh.axis("dp_replicate", "dp_shard")
        if group.is_identity:
            return list(data)
        everyone: list[Any] = [None] * group.size
        guard(
            f"all_gather of objects over {group.label}",
            lambda: dist.all_gather_object(everyone, data, group=group.group),
        )
        return [each for own in everyone for each in own]


def gather_samples(batches: BatchMesh, data: Any, *, num_rows: int | None, objects: bool) -> Any:
    """What every sample gave, once. Collective.

    Args:
        batches: the processes.
        data: tensors, however nested; or anything else, as a list of one object a sample.
        num_rows: how many count; None: all. What is behind fills up the last batches.
        objects: gather by pickling, as is done where `data` has other things than tensors.
    """
    if objects or not _has_tensors_only(data):
        return batches.gather_objects(data)[:num_rows]
    return recursively_apply(lambda value: value[:num_rows], batches.gather(data))


def _has_tensors_only(data: Any) -> bool:
    try:
        recursively_apply(lambda value: value, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
