"""Bytes that each rank sends in one step, by what they are for, from sizes alone.

    data     gradients to the ranks of other batches, values from them
             stage 0:    2 (N - 1) / N of the gradients
             stage 1, 2: (N - 1) / N of the gradients and as much of the values
             stage 3:    (N - 1) / N of the gradients, and of the values at each of their gathers
    slices   sums of hidden states over the T ranks that divide each layer: 2 (T - 1) / T of them
             each, 4 to a layer (2 in the forward, 2 in the backward: Megatron-LM, arXiv:1909.08053)
    stages   hidden states to the next stage, their gradients to the one before

of P / (pipeline ranks x T) elements on a rank. Sums of weights that several stages or slices hold
count as data. Norms, flags and losses, a few numbers each, are not counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hf_speed.config import SpeedConfig
from hf_speed.engine.estimate import Estimator, GroupSize
from hf_speed.engine.shares import Share
from hf_speed.engine.workload import Workload
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan

LOSS_NUMBERS = 3
"""Of each token and rank, in fp32: what a loss over divided words exchanges."""


class Sent(NamedTuple):
    """Bytes that one rank sends in a step."""

    data: int
    slices: int
    stages: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Gathers(NamedTuple):
    """How often a step gathers units: the root, the last block, the other blocks."""

    root: int
    last: int
    others: int


def gathers_of(config: SpeedConfig, row: Sequence[Action] | None) -> Gathers:
    """How often stage 3 gathers in a step of one backward, or of one plan.

    Args:
        config: what the user set.
        row: of this rank in its pipeline's plan; None where there is none.
    """
    regathers = config.zero.regather
    if row is None:
        return Gathers(1, 1, 2 if regathers else 1)
    if config.pipe.gather == "step":
        return Gathers(1, 1, 1)
    kept, others, stays = 0, 0, False
    for action in row:
        kept += not stays
        others += regathers or not stays
        # A forward leaves the root and the last block for a backward, which leaves nothing.
        stays = action.kind is Kind.FORWARD
    return Gathers(kept, kept, others)


def sent_for_data(
    units: Sequence[Sequence[GroupSize]], estimator: Estimator, *, stage: int, gathers: Gathers
) -> int:
    """Bytes that one rank sends to its data-parallel ranks.

    Args:
        units: that it holds, root last.
        estimator: of the same.
        stage: 0 to 3.
        gathers: of its units.
    """
    total = 0
    for index, unit in enumerate(units):
        from_end = len(units) - 1 - index
        times = (gathers.root, gathers.last)[from_end] if from_end < 2 else gathers.others
        for group in unit:
            total += _sent_for_group(group, estimator, stage=stage, num_gathers=times)
    return total


def _sent_for_group(group: GroupSize, estimator: Estimator, *, stage: int, num_gathers: int) -> int:
    layout = estimator.layout(group, stage)
    part, others = layout.part_numel, layout.parts - 1
    copies = estimator.copies(group)
    if group.trained and layout.parts == 1:
        values = 0
        gradients = 2 * (copies - 1) * (layout.padded_numel // copies)
    else:
        replicas = copies // layout.parts
        values = others * part * (num_gathers if stage == 3 else int(group.trained))
        gradients = others * part + 2 * (replicas - 1) * (part // replicas)
    return values * group.compute + (gradients * group.wire if group.trained else 0)


def sent_for_slices(share: Share, workload: Workload, *, num_slices: int) -> int:
    """Bytes that one rank sends to those that divide its layers."""
    others = num_slices - 1
    times = share.num_sums + (share.num_repeated_sums if workload.recomputes else 0)
    hidden = int(2 * times * workload.state_bytes * others / num_slices)
    numbers = LOSS_NUMBERS * 4 if share.has_sliced_loss else 0
    logits = share.gathered_words * workload.itemsize
    return hidden + (numbers + logits) * workload.num_rows * workload.num_tokens * others


def sent_for_stages(plan: Plan, workload: Workload, *, rank: int) -> int:
    """Bytes that a pipeline rank sends to its neighbours."""
    messages = sum(len(plan.sends_of(action)) for action in plan.rows[rank])
    return messages * workload.state_bytes // plan.num_microbatches
