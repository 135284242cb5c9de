"""What a mesh comes to for a model and a batch: memory, bytes sent and waiting, rank by rank.

    shares -> Estimator    bytes of model states      } one RankPlan for each pipeline rank
    workload + schedule -> activations, bubble        }
    all of them -> bytes sent by axis                 }

Nothing is allocated and no other rank is asked: for machines that are not at hand.
"""

from typing import NamedTuple

from hf_speed.config import ResolvedConfig, SpeedConfig, Tiers
from hf_speed.engine.estimate import Estimator, StateBytes
from hf_speed.engine.shares import Shares
from hf_speed.engine.traffic import (
    Sent,
    gathers_of,
    sent_for_data,
    sent_for_slices,
    sent_for_stages,
)
from hf_speed.engine.workload import Workload, activation_bytes
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.simulate import simulate


class RankPlan(NamedTuple):
    """One pipeline rank; its ranks along `tp` and the data-parallel axes are alike.

    Attributes:
        pp_rank: its place.
        num_layers: of each of its stages.
        numel: elements of its parameters.
        state: bytes of model states.
        activations: bytes that wait for the backward, by a formula (see `workload`).
        sent: bytes of a step.
    """

    pp_rank: int
    num_layers: tuple[int, ...]
    numel: int
    state: StateBytes
    activations: int
    sent: Sent


class MeshPlan(NamedTuple):
    """All of a mesh.

    Attributes:
        plan: of the pipeline; None without one.
        bubble: share of the time that ranks wait, where F, I and W take equal times.
        ranks: by pipeline rank.
    """

    plan: Plan | None
    bubble: float
    ranks: tuple[RankPlan, ...]


def plan_mesh(
    shares: Shares,
    config: SpeedConfig,
    resolved: ResolvedConfig,
    workload: Workload,
    *,
    plan: Plan | None,
    device_type: str = "cuda",
) -> MeshPlan:
    """Plan a step on every pipeline rank.

    Args:
        shares: what the ranks hold.
        config: what the user set.
        resolved: the same with stage and tiers chosen.
        workload: of a step.
        plan: `plan_of` the workload; None where mesh.pp is 1.
        device_type: where modules compute.
    """
    kept = activation_bytes(
        workload,
        plan,
        num_layers=shares.dealing.counts,
        num_slices=resolved.tp,
        sequence_parallel=resolved.sequence_parallel,
    )
    tiers = Tiers(*resolved.offload.tiers[:3])
    ranks = []
    for share in shares.ranks:
        rank = share.pp_rank
        estimator = Estimator(
            share.units, config, world_size=resolved.world_size, device_type=device_type
        )
        gathers = gathers_of(config, None if plan is None else plan.rows[rank])
        sent = Sent(
            sent_for_data(share.units, estimator, stage=resolved.stage, gathers=gathers),
            sent_for_slices(share, workload, num_slices=resolved.tp),
            0 if plan is None else sent_for_stages(plan, workload, rank=rank),
        )
        state = estimator.at(resolved.stage, tiers)
        ranks.append(RankPlan(rank, share.num_layers, share.numel, state, kept[rank], sent))
    bubble = simulate(plan).bubble if plan is not None else 0.0
    return MeshPlan(plan, bubble, tuple(ranks))
