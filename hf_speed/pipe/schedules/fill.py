"""Where the weight gradients go: into the gaps of an order of forwards and input gradients.

Nobody waits for a weight gradient, so a schedule of the zero bubble family is two decisions: the
order of F and I on every rank (given), and the places of W (made here). The run is simulated action
by action, earliest first. A rank does its oldest W

    - where its next F or I is not ready, and the gap is worth it (`patience`);
    - where its next F would hold more than `limit`: W lets go of activations;
    - at the end.

That is the heuristic of arXiv:2401.10241, section 3.1, without its choice of warm-up forwards,
which the given order has made. W never changes the order of F and I, so the plan can no more
deadlock than the order can.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_speed.pipe.action import Action, Kind, needs, result_of
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.simulate import Costs, simulate

PATIENCE = (0.0, 0.5, 1.0)
"""Gaps tried, in lengths of W: shorter ones are waited out."""


def filled(
    name: str,
    placement: tuple[int, ...],
    orders: Sequence[Sequence[Action]],
    *,
    limit: float,
    costs: Costs,
) -> Plan:
    """The plan of the given order with W in its gaps: the shortest that PATIENCE gives.

    Args:
        name: of the schedule.
        placement: stage -> rank.
        orders: by rank, F and I of every microbatch and stage, in an order that cannot deadlock.
        limit: microbatches on one stage that a rank may hold (see `simulate`). Kept by the order
            itself, W permitting: an order that holds more without any W waiting holds more.
        costs: times to simulate with.
    """
    num_microbatches = 1 + max(action.microbatch for row in orders for action in row)
    plans = [
        Plan(
            name,
            len(orders),
            len(placement),
            num_microbatches,
            placement,
            _Run(placement, orders, limit, costs, patience).rows(),
        )
        for patience in PATIENCE
    ]

    def length(plan: Plan) -> tuple[float, float]:
        simulation = simulate(plan, costs)
        return simulation.span, simulation.makespan

    return min(plans, key=length)


@dataclass(slots=True)
class _Rank:
    order: Sequence[Action]
    done: int = 0
    """Actions of `order` that are in `row`."""
    free: float = 0.0
    """When the rank has done its row."""
    held: float = 0.0
    weights: deque[Action] = field(default_factory=deque)
    """W that could be done, oldest first."""
    row: list[Action] = field(default_factory=list)
    decisions: int = 0
    """How often it has decided; only the newest decision counts."""


class _Run:
    """One simulated run. What each rank does next lies in a heap by time.

    A rank decides anew after each of its actions, and when what it waits for is made.
    """

    def __init__(
        self,
        placement: tuple[int, ...],
        orders: Sequence[Sequence[Action]],
        limit: float,
        costs: Costs,
        patience: float,
    ) -> None:
        self.placement, self.limit, self.costs, self.patience = placement, limit, costs, patience
        self.ranks = [_Rank(order) for order in orders]
        self.ends: dict[Action, float] = {}
        self.waiting: defaultdict[Action, list[int]] = defaultdict(list)
        self.heap: list[tuple[float, bool, int, int, Action]] = []
        """(start, after others of the same start, rank, number of its decision, action)."""

    def rows(self) -> tuple[tuple[Action, ...], ...]:
        """Every rank's row, W included."""
        for index in range(len(self.ranks)):
            self._decide(index)
        while self.heap:
            start, _, index, decision, action = heapq.heappop(self.heap)
            if decision == self.ranks[index].decisions:
                self._do(index, action, start)
        return tuple(tuple(rank.row) for rank in self.ranks)

    def _decide(self, index: int) -> None:
        rank = self.ranks[index]
        rank.decisions += 1
        weight = rank.weights[0] if rank.weights else None
        action = rank.order[rank.done] if rank.done < len(rank.order) else None
        start = None if action is None else self._ready(index, action)
        if weight is not None and (action is None or self._prefers_weight(rank, action, start)):
            # Last of those with this start: another may make what this rank waits for.
            entry = (rank.free, start is None, index, rank.decisions, weight)
            heapq.heappush(self.heap, entry)
        elif action is not None and start is not None:
            heapq.heappush(self.heap, (start, False, index, rank.decisions, action))

    def _ready(self, index: int, action: Action) -> float | None:
        """When the rank can start the action; None where that is not known yet."""
        ready = self.ranks[index].free
        for need in needs(action, len(self.placement)):
            if need not in self.ends:
                self.waiting[need].append(index)
                return None
            here = self.placement[need.stage] == index
            ready = max(ready, self.ends[need] + (0.0 if here else self.costs.hop))
        return ready

    def _prefers_weight(self, rank: _Rank, action: Action, start: float | None) -> bool:
        if start is None:
            return True
        if action.kind is Kind.FORWARD and rank.held + 1 > self.limit:
            return True
        gap = start - rank.free
        return gap > 0 and gap >= self.patience * self.costs.time(rank.weights[0])

    def _do(self, index: int, action: Action, start: float) -> None:
        rank = self.ranks[index]
        rank.free = start + self.costs.time(action)
        rank.row.append(action)
        self.ends[result_of(action)] = rank.free
        if action.kind is Kind.WEIGHT:
            rank.weights.popleft()
            rank.held -= self.costs.kept
        else:
            rank.done += 1
            if action.kind is Kind.FORWARD:
                rank.held += 1
            else:
                rank.held -= 1 - self.costs.kept
                rank.weights.append(action._replace(kind=Kind.WEIGHT))
        for other in {index, *self.waiting.pop(result_of(action), [])}:
            self._decide(other)
