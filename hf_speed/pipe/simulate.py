"""How long a plan takes and how much it holds, by arithmetic.

Every rank does its row in order; an action starts when the rank is free and what it needs is there.
A message takes `Costs.hop` and occupies nobody. Communication and shard actions of a lowered plan
are passed over.

Activations are counted in microbatches on one stage of the plan. A forward's are held from its
start to the end of its BACKWARD or INPUT; the share `Costs.kept` of them to the end of its WEIGHT.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind, needs, result_of
from hf_speed.pipe.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of one microbatch on one stage, in any one unit: a number, or one for each stage."""

    forward: float | tuple[float, ...] = 1.0
    input: float | tuple[float, ...] = 1.0
    weight: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] | None = None
    """A whole backward. None: input + weight."""
    hop: float = 0.0
    """From the end of an action to the start of one on another rank that waits for it."""
    activation: float | tuple[float, ...] = 1.0
    """What a forward keeps, relative to the unit in which activations are counted."""
    kept: float = 1.0
    """Share of a forward's activations that INPUT leaves for WEIGHT, 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("forward", "input", "weight", "backward"):
            time = getattr(self, name)
            times = time if isinstance(time, tuple) else (time,)
            if any(one is not None and not one > 0 for one in times):
                raise ConfigError(
                    f"Costs.{name}={time} is no time: an action that takes none could not be put "
                    f"in order. Give times above 0, one for all stages or a tuple of one each."
                )
        if not self.hop >= 0 or not 0 <= self.kept <= 1:
            raise ConfigError(
                f"Costs.hop={self.hop} and Costs.kept={self.kept}: a message takes 0 or more, and "
                f"kept is a share from 0 to 1. Give such values."
            )

    def time(self, action: Action) -> float:
        """How long a compute action takes."""
        if action.kind is Kind.FORWARD:
            return _of(self.forward, action.stage)
        if action.kind is Kind.INPUT:
            return _of(self.input, action.stage)
        if action.kind is Kind.WEIGHT:
            return _of(self.weight, action.stage)
        if self.backward is None:
            return _of(self.input, action.stage) + _of(self.weight, action.stage)
        return _of(self.backward, action.stage)

    def held(self, stage: int) -> float:
        """What a forward of `stage` keeps."""
        return _of(self.activation, stage)


class Event(NamedTuple):
    """A compute action with its time."""

    action: Action
    start: float
    end: float


class Simulation(NamedTuple):
    """What a plan costs."""

    events: tuple[tuple[Event, ...], ...]
    """By rank, in order."""
    makespan: float
    """From the first start to the last end, over all ranks."""
    busy: tuple[float, ...]
    """Time that each rank computes."""
    peak_activations: tuple[float, ...]
    """By rank, in microbatches on one stage (times Costs.activation)."""

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait: 1 - busy / (ranks * makespan)."""
        return _waiting(sum(self.busy), len(self.busy) * self.makespan)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """By rank: the share of the makespan in which it waits."""
        return tuple(_waiting(busy, self.makespan) for busy in self.busy)

    @property
    def span(self) -> float:
        """From a rank's own first start to its own last end: the longest of all ranks.

        This is the time a step takes where ranks begin the next one without waiting for each other.
        """
        return max((row[-1].end - row[0].start for row in self.events if row), default=0.0)

    @property
    def span_bubble(self) -> float:
        """The bubble rate of the zero bubble papers: `bubble` with `span` for the makespan.

        Source: arXiv:2401.10241, section 5.3.
        """
        return _waiting(sum(self.busy), len(self.busy) * self.span)


def simulate(plan: Plan, costs: Costs | None = None) -> Simulation:
    """Give every compute action of `plan` its time.

    Args:
        plan: every action's needs are met by some action of the plan (see `validate`).
        costs: times and sizes; None: F = I = W = 1, B = 2, messages take no time.

    Raises:
        ConfigError: ranks wait for each other for ever; the message is the grid with one marked.
    """
    costs = costs if costs is not None else Costs()
    rows = [[action for action in row if action.kind.computes] for row in plan.rows]
    events: list[list[Event]] = [[] for _ in rows]
    done: dict[Action, tuple[float, int]] = {}
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        row, past = rows[rank], events[rank]
        while len(past) < len(row):
            action = row[len(past)]
            missing = [need for need in needs(action, plan.num_stages) if need not in done]
            if missing:
                waiting[missing[0]].append(rank)
                break
            free = past[-1].end if past else 0.0
            start = max([free, *_arrivals(action, rank, plan, done, costs)])
            past.append(Event(action, start, start + costs.time(action)))
            done[result_of(action)] = (past[-1].end, rank)
            ready += waiting.pop(result_of(action), [])
    if waiting:
        raise ConfigError(_stuck(plan, rows, events))
    return Simulation(
        events=tuple(map(tuple, events)),
        makespan=max((row[-1].end for row in events if row), default=0.0),
        busy=tuple(sum(costs.time(action) for action in row) for row in rows),
        peak_activations=tuple(_peak(row, costs) for row in rows),
    )


def _of(cost: float | tuple[float, ...], stage: int) -> float:
    return cost[stage] if isinstance(cost, tuple) else cost


def _waiting(busy: float, total: float) -> float:
    return 1 - busy / total if total > 0 else 0.0


def _arrivals(
    action: Action, rank: int, plan: Plan, done: Mapping[Action, tuple[float, int]], costs: Costs
) -> list[float]:
    """When each thing that the action needs is on this rank."""
    found = [done[need] for need in needs(action, plan.num_stages)]
    return [end if maker == rank else end + costs.hop for end, maker in found]


def _peak(row: list[Action], costs: Costs) -> float:
    """The most that one rank holds. Its order alone decides it: a rank does one thing at a time."""
    here = most = 0.0
    for action in row:
        held = costs.held(action.stage)
        if action.kind is Kind.FORWARD:
            here += held
            most = max(most, here)
        elif action.kind is Kind.BACKWARD:
            here -= held
        elif action.kind is Kind.INPUT:
            here -= held * (1 - costs.kept)
        else:
            here -= held * costs.kept
    return most


def _stuck(plan: Plan, rows: list[list[Action]], events: list[list[Event]]) -> str:
    """The grid with one action that waits for ever: one that waits for its own rank, if any."""
    from hf_speed.pipe.render import fault

    done = {result_of(event.action) for past in events for event in past}
    found: list[tuple[bool, int, Action, Action]] = []
    for rank, (row, past) in enumerate(zip(rows, events, strict=True)):
        if len(past) < len(row):
            action = row[len(past)]
            need = next(need for need in needs(action, plan.num_stages) if need not in done)
            found.append((plan.placement[need.stage] != rank, rank, action, need))
    elsewhere, rank, action, need = min(found)
    why = "whose rank waits as well" if elsewhere else "which comes later on the same rank"
    message = f"rank {rank} waits for ever at {action} for {need}, {why}"
    return fault(plan, message, rank=rank, action=action)
