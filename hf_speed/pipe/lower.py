"""From a plan of compute actions to one that a runtime can run: messages and shard actions added.

    F(s, m) on another rank than stage s + 1   ->  F(s, m)  SEND_FORWARD(s, m)
    stage s + 1 there                          ->  RECV_FORWARD(s + 1, m) .. F(s + 1, m)

A send stands right after the action that makes the message. A receive stands where the message is
expected in the simulated run: before the action that is under way then, so that a runtime that
only posts it there (and lets its consumer wait) has posted it before the message comes.

All actions of all ranks are thereby in the order of one simulated run. Hence both ends of every
pair of ranks see the messages between them, of both directions, in one and the same order, and no
rank can wait in a circle: not even where every send and receive blocks, or where all messages of a
pair share one queue (NCCL).
"""

from dataclasses import replace
from typing import Literal

from hf_speed.pipe.action import Action, Kind, counterpart
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.simulate import Costs, simulate

Moment = tuple[float, int]
"""When an action ends in the simulated run, and on which rank: unlike for any two messages."""


def lower(
    plan: Plan,
    *,
    shard: Literal["step", "microbatch"] | None = None,
    costs: Costs | None = None,
) -> Plan:
    """Insert sends and receives, and what the sharding of parameters asks for.

    Args:
        plan: compute actions only.
        shard: "step": a stage is gathered (UNSHARD) once, one action ahead of its first, and
            released (RESHARD) after its last; gradients are reduced (REDUCE) after the last
            weight gradient. "microbatch": REDUCE only; whoever runs an action gathers for it.
            None: neither.
        costs: times by which messages are expected, the same on every rank; None: F = I = W = 1.
            Only the place of the receives depends on them, never correctness.

    Returns:
        The same plan with the new actions in its rows.

    Raises:
        ConfigError: the plan deadlocks.
    """
    ends = [[event.end for event in row] for row in simulate(plan, costs).events]
    inbox = _inboxes(plan, ends)
    rows: list[tuple[Action, ...]] = []
    for rank, row in enumerate(plan.rows):
        lowered: list[Action] = []
        expected = iter(inbox[rank])
        coming = next(expected, None)
        for action, end in zip(row, ends[rank], strict=True):
            while coming is not None and coming[0] < (end, rank):
                lowered.append(coming[1])
                coming = next(expected, None)
            lowered.append(action)
            lowered += plan.sends_of(action)
        rows.append(tuple(lowered))
    if shard is not None:
        rows = [_shard_row(row, gather=shard == "step") for row in rows]
    return replace(plan, rows=tuple(rows))


def _inboxes(plan: Plan, ends: list[list[float]]) -> list[list[tuple[Moment, Action]]]:
    """By rank: its receives with the moment when the message was made, in order."""
    inbox: list[list[tuple[Moment, Action]]] = [[] for _ in plan.rows]
    for rank, row in enumerate(plan.rows):
        for action, end in zip(row, ends[rank], strict=True):
            for send in plan.sends_of(action):
                inbox[plan.peer(send)].append(((end, rank), counterpart(send)))
    return [sorted(box) for box in inbox]


def _shard_row(row: tuple[Action, ...], *, gather: bool) -> tuple[Action, ...]:
    computing = [index for index, action in enumerate(row) if action.kind.computes]
    before: dict[int, list[Action]] = {}
    after: dict[int, list[Action]] = {}
    for stage in sorted({row[index].stage for index in computing}):
        uses = [index for index in computing if row[index].stage == stage]
        if gather:
            # One compute action ahead, so that the gather is under way while that one runs.
            turn = computing.index(uses[0])
            ahead = computing[turn - 1] if turn else 0
            before.setdefault(ahead, []).append(Action(Kind.UNSHARD, stage, -1))
            after.setdefault(_sent(row, uses[-1]), []).append(Action(Kind.RESHARD, stage, -1))
        made = [index for index in uses if row[index].kind in (Kind.BACKWARD, Kind.WEIGHT)]
        if made:
            after.setdefault(_sent(row, made[-1]), []).append(Action(Kind.REDUCE, stage, -1))
    lowered: list[Action] = []
    for index, action in enumerate(row):
        lowered += before.get(index, [])
        lowered.append(action)
        lowered += after.get(index, [])
    return tuple(lowered)


def _sent(row: tuple[Action, ...], index: int) -> int:
    """The index of the last message that the action at `index` makes: others wait for that."""
    while index + 1 < len(row) and row[index + 1].kind.sends:
        index += 1
    return index
