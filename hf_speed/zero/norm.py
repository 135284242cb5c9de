"""The norm of a gradient whose elements are spread over the ranks.

Each element is counted once: parts are summed over the sharding axis, whose ranks hold different
elements, and not over replicas, whose ranks hold the same.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import all_reduce_small
from hf_speed.mesh.journal import Journal


def norms_of(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """The p-norm of each tensor: 0-d fp32."""
    if not tensors:
        return []
    return list(torch._foreach_norm(list(tensors), norm_type, dtype=torch.float32))


def global_norm(
    norms: Sequence[Tensor],
    *,
    norm_type: float,
    group: AxisGroup,
    journal: Journal,
    device: torch.device,
) -> Tensor:
    """The p-norm over all elements of all ranks' gradients.

    Args:
        norms: of this rank's parts, as `norms_of` computes them.
        norm_type: p, or inf.
        group: the ranks that hold different elements.
        journal: of the run.
        device: of the result.

    Returns:
        0-d fp32. One all-reduce of one element.
    """
    local = torch.zeros((), dtype=torch.float32, device=device)
    if norms:
        local = torch.linalg.vector_norm(
            torch.stack([each.to(device) for each in norms]), norm_type
        )
    if norm_type == float("inf"):
        return all_reduce_small(local, group=group, journal=journal, op=dist.ReduceOp.MAX)
    if group.is_identity:
        return local
    power = local.pow(norm_type)
    return all_reduce_small(power, group=group, journal=journal).pow(1.0 / norm_type)


def any_overflow(norms: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """0-d fp32 on `device`: 1 where one of the inf-norms is infinite or NaN, else 0."""
    if not norms:
        return torch.zeros((), dtype=torch.float32, device=device)
    return (~torch.isfinite(torch.stack([each.to(device) for each in norms])).all()).float()
