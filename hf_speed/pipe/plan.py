"""Plan: what every pipeline rank does in one step, in order. A schedule is a value.

    rows[0]   F0 F1 .. B0 ..      one row a rank; where a rank waits is not part of the plan
    rows[1]   F0 B0 F1 ..

`print(plan)` is its picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hf_speed.pipe.action import Action, Kind, counterpart, needs


@dataclass(frozen=True)
class Plan:
    """The actions of every pipeline rank for one batch."""

    schedule: str
    """Name of the schedule that made it."""
    num_ranks: int
    num_stages: int
    num_microbatches: int
    placement: tuple[int, ...]
    """Stage -> pipeline rank."""
    rows: tuple[tuple[Action, ...], ...]
    """By pipeline rank, in order. Compute actions only until `lower` adds the rest."""

    def __str__(self) -> str:
        from hf_speed.pipe.render import grid

        return grid(self)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages on `rank`, first to last."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive."""
        return self.placement[counterpart(action).stage]

    def sends_of(self, action: Action) -> tuple[Action, ...]:
        """The send that follows a compute action: none where the next stage is on its rank."""
        if action.kind is Kind.WEIGHT:
            return ()
        forward = action.kind is Kind.FORWARD
        send = action._replace(kind=Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD)
        other = counterpart(send).stage
        if not 0 <= other < self.num_stages:
            return ()
        return () if self.placement[other] == self.placement[action.stage] else (send,)

    def receives_of(self, action: Action) -> tuple[Action, ...]:
        """The receive that a compute action waits for: none where its needs are on its rank."""
        receive = Kind.RECV_FORWARD if action.kind is Kind.FORWARD else Kind.RECV_BACKWARD
        return tuple(
            action._replace(kind=receive)
            for need in needs(action, self.num_stages)
            if self.placement[need.stage] != self.placement[action.stage]
        )

    def actions(self) -> Iterator[tuple[int, Action]]:
        """(rank, action) of every action, rank by rank."""
        for rank, row in enumerate(self.rows):
            for action in row:
                yield rank, action

    def keep(self, *kinds: Kind) -> "Plan":
        """The same plan with actions of these kinds only.

        `plan.keep(Kind.FORWARD)` is a plan for evaluation.
        """
        rows = tuple(tuple(action for action in row if action.kind in kinds) for row in self.rows)
        return replace(self, rows=rows)


def looped(num_ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage s on rank s % num_ranks: the ranks are gone through `chunks` times."""
    return tuple(range(num_ranks)) * chunks


def folded(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, in a V: first and last stage on rank 0, the turn on the last rank.

    Source: arXiv:2401.10241, section 6.
    """
    return (*range(num_ranks), *reversed(range(num_ranks)))
