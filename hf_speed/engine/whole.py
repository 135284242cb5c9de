"""Whole parameters from what pipeline and slicing ranks hold of them."""

import torch
from torch import Tensor

from hf_speed.engine.catalogue import Catalogue
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import all_gather_flat, broadcast_flat


class Wholes:
    """Joins slices over `tp` and brings them to every pipeline rank.

    Args:
        catalogue: of the whole model.
        mesh: of the run.
    """

    def __init__(self, catalogue: Catalogue, mesh: ParallelMesh) -> None:
        self._catalogue = catalogue
        self._mesh = mesh

    def assemble(self, name: str, local: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """One whole tensor of a parameter's shape on every rank. Collective.

        One all-gather over `tp` where it is sliced, one broadcast over `pp`.

        Args:
            name: of the parameter.
            local: what this rank has of it, in its local shape; None where it has nothing.
            dtype: of the result, the same on every rank.
        """
        record = self._catalogue.record(name)
        pipeline = self._mesh.axis("pp")
        value = None if local is None else self._join(name, local)
        if pipeline.is_identity and value is not None:
            return value
        whole = torch.empty(record.shape, dtype=dtype, device=self._mesh.device)
        if value is not None:
            whole.copy_(value)
        flat = whole.view(-1).view(torch.uint8) if whole.numel() else whole.view(-1)
        if whole.numel():
            source = record.stages[0]
            broadcast_flat(flat, group=pipeline, journal=self._mesh.journal, source=source)
        return whole

    def local(self, name: str, whole: Tensor) -> Tensor | None:
        """What this rank holds of a whole tensor; None where it holds nothing. No collective."""
        if not self._catalogue.is_here(name):
            return None
        slicing = self._catalogue.record(name).slicing
        return whole if slicing is None else slicing.cut(whole, self._catalogue.tp_rank)

    def _join(self, name: str, local: Tensor) -> Tensor:
        slicing = self._catalogue.record(name).slicing
        ranks = self._mesh.axis("tp")
        if slicing is None or ranks.is_identity:
            return local
        shape = self._catalogue.record(name).shape
        shapes = [slicing.local_shape(shape, rank) for rank in range(ranks.size)]
        numels = [torch.Size(each).numel() for each in shapes]
        room = max(numels)
        # Equal slots, of which uneven slices fill their beginnings.
        buffer = torch.empty(ranks.size * room, dtype=local.dtype, device=self._mesh.device)
        start = ranks.rank * room
        buffer[start : start + numels[ranks.rank]].copy_(local.detach().reshape(-1))
        all_gather_flat(buffer, group=ranks, journal=self._mesh.journal).wait()
        return slicing.join(
            [
                buffer[rank * room : rank * room + numel].view(shapes[rank])
                for rank, numel in enumerate(numels)
            ]
        )
