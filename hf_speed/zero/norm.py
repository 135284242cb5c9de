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


def global_norm(
    gradients: Sequence[Tensor],
    *,
    norm_type: float,
    group: AxisGroup,
    journal: Journal,
    device: torch.device,
) -> Tensor:
    """The p-norm over all elements of all ranks' gradients.

    Args:
        gradients: this rank's parts, any shapes.
        norm_type: p, or inf.
        group: the ranks that hold different elements.
        journal: of the run.
        device: of the result.

    Returns:
        0-d fp32. One all-reduce of one element.
    """
    local = torch.zeros((), dtype=torch.float32, device=device)
    if gradients:
        norms = torch._foreach_norm(list(gradients), norm_type, dtype=torch.float32)
        local = torch.linalg.vector_norm(
            torch.stack([each.to(device) for each in norms]), norm_type
        )
    if norm_type == float("inf"):
        return all_reduce_small(local, group=group, journal=journal, op=dist.ReduceOp.MAX)
    if group.is_identity:
        return local
    power = local.pow(norm_type)
    return all_reduce_small(power, group=group, journal=journal).pow(1.0 / norm_type)


def any_overflow(gradients: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """0-d fp32 on `device`: 1 where a local gradient has an infinity or a NaN, else 0."""
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device=device)
    norms = torch._foreach_norm(list(gradients), float("inf"))
    return (~torch.isfinite(torch.stack([each.to(device) for each in norms])).all()).float()
