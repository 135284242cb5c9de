"""Whether a plan is right: complete, in order, free of deadlocks, with bounded buffers.

Of deadlocks there are three models, from the mildest runtime to the strictest:

    eager      sends and receives are posted and go on at once; messages of one direction between
               two ranks match in the order in which they were posted (gloo)
    one_queue  as eager, but all messages between two ranks, of both directions, go one after the
               other: each waits for those before it on both sides (NCCL, one stream a pair)
    blocking   a send waits until its receiver receives, and a receive until its sender sends

A plan that deadlocks under the first is an error. There a rank waits for nothing but what it
computes with, so the check is the simulated run, together with the order of the messages. Whether
it survives the others is reported. What `lower` makes survives all three.
"""

from collections import Counter, defaultdict
from typing import NamedTuple, Protocol

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind, counterpart
from hf_speed.pipe.lower import lower
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.render import fault
from hf_speed.pipe.simulate import simulate


class Validation(NamedTuple):
    """What a valid plan asks of the runtime."""

    one_queue: bool
    """It cannot deadlock where the messages of a pair of ranks share one queue."""
    blocking: bool
    """It cannot deadlock where every send and receive blocks."""
    peak_messages: tuple[int, ...]
    """By rank: the most messages received (or posted to be) and not yet consumed."""


def validate(plan: Plan, *, max_messages: int | None = None) -> Validation:
    """Check a plan, lowered or not: one of compute actions only is lowered first.

    A plan of forwards only (evaluation) is valid. Where it trains, every stage does every
    microbatch once: F, then B, or I and later W.

    Args:
        plan: the plan.
        max_messages: the most that may wait on a rank at once (see Validation.peak_messages).

    Raises:
        ConfigError: the plan breaks a law. The message ends with the grid, the action marked.
    """
    _check_places(plan)
    _check_complete(plan)
    simulate(plan)
    lowered = plan
    if all(action.kind.computes for _, action in plan.actions()):
        lowered = lower(plan)
    _check_messages(lowered)
    _check_overtaking(lowered)
    _check_shards(lowered)
    return Validation(
        one_queue=_pairs_agree(lowered) and _ends(lowered, _OneQueue(lowered)),
        blocking=_ends(lowered, _Blocking()),
        peak_messages=_peak_messages(lowered, max_messages),
    )


def _check_places(plan: Plan) -> None:
    if len(plan.placement) != plan.num_stages or len(plan.rows) != plan.num_ranks:
        raise ConfigError(
            f"The plan {plan.schedule!r} places {len(plan.placement)} stages and has "
            f"{len(plan.rows)} rows, for {plan.num_stages} stages on {plan.num_ranks} ranks. Give "
            f"every stage a rank and every rank a row."
        )
    for rank, action in plan.actions():
        if not 0 <= action.stage < plan.num_stages or plan.placement[action.stage] != rank:
            message = f"stage {action.stage} is not on rank {rank}"
        elif action.kind in (Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE):
            continue
        elif not 0 <= action.microbatch < plan.num_microbatches:
            message = f"microbatch {action.microbatch} is not one of {plan.num_microbatches}"
        else:
            continue
        raise ConfigError(fault(plan, message, rank=rank, action=action))


def _check_complete(plan: Plan) -> None:
    """Every forward once; every backward once, whole or in both parts, if there are any."""
    counts = Counter(action for _, action in plan.actions())
    for rank, action in plan.actions():
        if counts[action] > 1:
            raise ConfigError(fault(plan, f"{action} is there twice", rank=rank, action=action))
    trains = any(action.kind.computes and action.kind is not Kind.FORWARD for action in counts)
    for stage, rank in enumerate(plan.placement):
        for microbatch in range(plan.num_microbatches):
            has = [kind for kind in Kind if (kind, stage, microbatch) in counts and kind.computes]
            whole = [Kind.FORWARD, Kind.BACKWARD], [Kind.FORWARD, Kind.INPUT, Kind.WEIGHT]
            if has not in (whole if trains else ([Kind.FORWARD],)):
                message = (
                    f"rank {rank} does {'+'.join(has) or 'nothing'} for microbatch {microbatch} on "
                    f"stage {stage}, and not F{'+B or F+I+W' if trains else ''}"
                )
                last = Action(has[-1], stage, microbatch) if has else None
                raise ConfigError(fault(plan, message, rank=rank, action=last))


def _check_messages(plan: Plan) -> None:
    """Each message that is needed is sent after it is made, and received before it is used."""
    expected: set[Action] = set()
    for rank, row in enumerate(plan.rows):
        places = {action: index for index, action in enumerate(row)}
        for index, action in enumerate(row):
            others = ()
            if action.kind.computes:
                others = (*plan.sends_of(action), *plan.receives_of(action))
            expected.update(others)
            for other in others:
                place = places.get(other)
                if place is None or (place < index) is not other.kind.receives:
                    side = "before" if other.kind.receives else "after"
                    message = f"{action} needs {other} {side} it"
                    raise ConfigError(fault(plan, message, rank=rank, action=action))
    for rank, action in plan.actions():
        if (action.kind.sends or action.kind.receives) and action not in expected:
            raise ConfigError(fault(plan, f"nobody needs {action}", rank=rank, action=action))


def _check_overtaking(plan: Plan) -> None:
    """Between two ranks, messages of one direction are received in the order of their sends."""
    received = _channels(plan, receives=True)
    for (sender, receiver), sends in _channels(plan, receives=False).items():
        for send, receive in zip(sends, received[sender, receiver], strict=True):
            if receive != counterpart(send):
                message = f"{receive} would get what {send} sends: messages overtake each other"
                raise ConfigError(fault(plan, message, rank=receiver, action=receive))


def _check_shards(plan: Plan) -> None:
    """UNSHARD before a stage's first action, RESHARD after its last, REDUCE after its last W."""
    makes_weights = (Kind.BACKWARD, Kind.WEIGHT)
    for rank, row in enumerate(plan.rows):
        for index, action in enumerate(row):
            if action.kind not in (Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE):
                continue
            first = action.kind is Kind.UNSHARD
            part = row[:index] if first else row[index:]
            kinds = [other.kind for other in part if other.stage == action.stage]
            if action.kind is Kind.REDUCE:
                kinds = [kind for kind in kinds if kind in makes_weights]
            if any(kind.computes for kind in kinds):
                side = "before" if first else "after"
                message = f"{action} is not {side} all that it serves"
                raise ConfigError(fault(plan, message, rank=rank, action=action))


def _channels(plan: Plan, *, receives: bool) -> dict[tuple[int, int], list[Action]]:
    """(sender, receiver) -> the sends between them, or the receives, in order."""
    channels: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, action in plan.actions():
        if receives and action.kind.receives:
            channels[plan.peer(action), rank].append(action)
        elif not receives and action.kind.sends:
            channels[rank, plan.peer(action)].append(action)
    return channels


def _queues(plan: Plan) -> dict[tuple[int, int], list[Action]]:
    """(rank, peer) -> all messages between the two, named by their sends, as `rank` posts them."""
    queues: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, action in plan.actions():
        if action.kind.sends or action.kind.receives:
            send = action if action.kind.sends else counterpart(action)
            queues[rank, plan.peer(action)].append(send)
    return queues


def _pairs_agree(plan: Plan) -> bool:
    queues = _queues(plan)
    return all(queue == queues[peer, rank] for (rank, peer), queue in queues.items())


class _Model(Protocol):
    def passes(self, rank: int, action: Action) -> bool:
        """Whether `rank`, which has come to `action`, gets past it now."""
        ...


class _OneQueue:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.turn = {
            (pair, send): turn
            for pair, queue in _queues(plan).items()
            for turn, send in enumerate(queue)
        }
        self.posted: Counter[tuple[int, int]] = Counter()

    def passes(self, rank: int, action: Action) -> bool:
        if action.kind.sends or action.kind.receives:
            self.posted[rank, self.plan.peer(action)] += 1
        elif action.kind.computes:
            return all(self._arrived(rank, one) for one in self.plan.receives_of(action))
        return True

    def _arrived(self, rank: int, receive: Action) -> bool:
        peer = self.plan.peer(receive)
        both = min(self.posted[rank, peer], self.posted[peer, rank])
        return self.turn[(rank, peer), counterpart(receive)] < both


class _Blocking:
    def __init__(self) -> None:
        self.reached: set[Action] = set()

    def passes(self, rank: int, action: Action) -> bool:
        del rank
        if not (action.kind.sends or action.kind.receives):
            return True
        # Whoever comes first stays here until the other has come as well.
        self.reached.add(action)
        return counterpart(action) in self.reached


def _ends(plan: Plan, model: _Model) -> bool:
    """Whether all ranks reach the end of their rows."""
    done = [0] * plan.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(plan.rows):
            while done[rank] < len(row) and model.passes(rank, row[done[rank]]):
                done[rank] += 1
                moved = True
    return done == [len(row) for row in plan.rows]


def _peak_messages(plan: Plan, limit: int | None) -> tuple[int, ...]:
    peaks = []
    for rank, row in enumerate(plan.rows):
        here = peak = 0
        for action in row:
            if action.kind.receives:
                here += 1
                peak = max(peak, here)
                if limit is not None and here > limit:
                    message = f"rank {rank} has {here} messages waiting, more than {limit}"
                    raise ConfigError(fault(plan, message, rank=rank, action=action))
            elif action.kind.computes:
                here -= len(plan.receives_of(action))
        peaks.append(peak)
    return tuple(peaks)
