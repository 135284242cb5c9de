"""What fits where: the largest model of given blocks, for every stage and tiers.

A larger model here has more blocks of the same size, and the same root (embeddings, head). Bytes
grow linearly with the number of blocks, so two estimates are enough. In a pipeline every rank has
as many blocks as the one that has most to hold.
"""

from collections.abc import Sequence
from math import ceil, floor
from typing import NamedTuple

from hf_speed.config import Memory, SpeedConfig, TierBytes, Tiers
from hf_speed.config.planner import candidates, limits_of
from hf_speed.engine.estimate import Estimator, GroupSize

MIN_BLOCKS = 16
"""Enough blocks that as many as ever are in flight."""


class Capacity(NamedTuple):
    """Elements of the largest model at stages 0 to 3; 0 where not even one block fits."""

    tiers: Tiers
    numels: tuple[int, ...]


def what_fits(
    units: Sequence[Sequence[GroupSize]],
    config: SpeedConfig,
    *,
    world_size: int,
    memory: Memory,
    whole: Sequence[Sequence[GroupSize]] | None = None,
) -> list[Capacity]:
    """The largest models, one row for each choice of tiers that the planner would try.

    Args:
        units: the groups of each unit of some model, root last: those of its fullest rank.
        config: its stage is ignored: all four are answered.
        world_size: number of ranks.
        memory: what there is for one rank.
        whole: the units of the whole model, where ranks have parts of it.
    """
    *blocks, root = units
    *whole_blocks, whole_root = units if whole is None else whole
    copies = ceil(MIN_BLOCKS / max(len(blocks), 1))
    device_type = "cpu" if memory.shared else "cuda"
    small, large = (
        Estimator([*(blocks * times), root], config, world_size=world_size, device_type=device_type)
        for times in (copies, 2 * copies)
    )
    limits = limits_of(config.offload, memory, is_open=True)
    of_blocks = sum(group.numel for block in whole_blocks for group in block)
    of_root = sum(group.numel for group in whole_root)
    rows = []
    for tiers in candidates(config.offload, shared=memory.shared):
        numels = []
        for stage in range(4):
            one, two = small.needed(stage, tiers), large.needed(stage, tiers)
            most = _most_copies(one, two, limits, shared=memory.shared, copies=copies)
            num_blocks = floor(most * len(blocks)) * config.mesh.pp
            per_model = num_blocks * of_blocks // max(len(whole_blocks), 1)
            numels.append(of_root + per_model if num_blocks > 0 else 0)
        rows.append(Capacity(tiers, tuple(numels)))
    return rows


def _most_copies(
    one: TierBytes, two: TierBytes, limits: TierBytes, *, shared: bool, copies: int
) -> float:
    """How often the blocks fit, given the bytes of `copies` and of twice as many."""
    if shared:
        one, two = (each._replace(device=each.device + each.host, host=0) for each in (one, two))
    most = []
    for small, large, limit in zip(one, two, limits, strict=True):
        growth = (large - small) / copies
        fixed = small - growth * copies
        if growth > 0:
            most.append((limit - fixed) / growth)
        elif fixed > limit:
            return 0.0
    return max(min(most, default=0.0), 0.0)
