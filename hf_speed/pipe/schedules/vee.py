"""Schedules of a V: rank r has the stages r and 2 p - 1 - r, so the loss is where the input is.

At the turn, and on the first rank at the end of the forward, nothing is sent. Both stages are half
the size of a stage without the V: figures below are for F = I = W = 1 on such a half, and memory is
in microbatches on one of them (1F1B holds 2 p).
"""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat

from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan, folded
from hf_speed.pipe.schedules.fill import filled
from hf_speed.pipe.simulate import Costs

Step = tuple[Kind, int]
"""A kind of action on a stage; the microbatch is the next one there."""


def zb_v(num_ranks: int, num_microbatches: int, costs: Costs) -> Plan:
    """No rank waits between its own first and last action, for 1F1B's memory: 2 p.

    Needs m >= 2 p - 1. The last rank starts p - 1 later than the first, and ends as much later.
    Source: arXiv:2401.10241, section 6.
    """
    orders = []
    for rank in range(num_ranks):
        down, up = rank, 2 * num_ranks - 1 - rank
        cycle = [
            (Kind.INPUT, up),
            (Kind.FORWARD, down),
            (Kind.INPUT, down),
            (Kind.FORWARD, up),
        ]
        steps = chain(
            _fill_the_pipe(num_ranks, rank),
            [(Kind.INPUT, up), (Kind.FORWARD, up)] * (num_ranks - 1 - rank),
            *repeat(cycle, num_microbatches + 1),
        )
        orders.append(_numbered(steps, num_microbatches))
    return filled("zb_v", folded(num_ranks), orders, limit=2 * num_ranks, costs=costs)


def v_half(num_ranks: int, num_microbatches: int, costs: Costs) -> Plan:
    """Half of 1F1B's memory and half of its bubble: p + 2 held, 3 p - 5 waited (2 for two ranks).

    1F1B holds 2 p and waits 6 (p - 1). A forward takes 1 to the next rank on the way down and 2 on
    the way up, and so does a backward.
    Source: V-Half of arXiv:2405.15362, section 3; the turns' pauses are found here.
    """
    pauses = (3, 0, 4) if num_ranks % 2 == 0 else (0, 0, 1)
    orders = _repeated(num_ranks, num_microbatches, strides=(1, 2, 1, 2), pauses=pauses)
    limit = min(num_ranks + 2, 2 * num_ranks)
    return filled("v_half", folded(num_ranks), orders, limit=limit, costs=costs)


def v_min(num_ranks: int, num_microbatches: int, costs: Costs) -> Plan:
    """A third of 1F1B's memory, two thirds of its bubble: (2 p + 8) / 3 held, 4 p - 5 waited.

    Every microbatch takes the shortest way. That leaves no slack: where F, I and W differ much, it
    waits more than 1F1B.
    Source: V-Min of arXiv:2405.15362, section 3; the turns' pauses are found here.
    """
    pauses = (2, 0, 2) if num_ranks % 3 == 0 else (0, 0, 0)
    orders = _repeated(num_ranks, num_microbatches, strides=(1, 1, 1, 1), pauses=pauses)
    limit = min(-(-(2 * num_ranks + 8) // 3), 2 * num_ranks)
    return filled("v_min", folded(num_ranks), orders, limit=limit, costs=costs)


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Plan:
    """Forwards and whole backwards in pairs that a rank can overlap; 2 p + 1 held, p - 1 waited.

    The pairs, F down with B up and F up with B down, stand next to each other. Backwards are split
    only where the step begins and ends. With fewer than 2 p microbatches it is the plan for 2 p
    without those that are not there.
    Source: DualPipe, arXiv:2412.19437, section 3.2.1, cut in half: github.com/deepseek-ai/DualPipe.
    """
    rows = []
    whole = max(num_microbatches, 2 * num_ranks)
    for rank in range(num_ranks):
        down, up = rank, 2 * num_ranks - 1 - rank
        behind, ahead = num_ranks - 1 - rank, rank + 1
        # The last `ahead` backwards of the two stages together keep their W for the end.
        tail = [(Kind.BACKWARD, up), (Kind.BACKWARD, down)] * ahead
        split = [(Kind.INPUT, stage) for _, stage in tail[ahead:]] + [(Kind.INPUT, down)] * behind
        weights = [(Kind.WEIGHT, stage) for _, stage in split]
        pairs = [(Kind.FORWARD, down), (Kind.BACKWARD, up), (Kind.FORWARD, up)]
        steps = [
            *_fill_the_pipe(num_ranks, rank),
            *[(Kind.INPUT, up), (Kind.WEIGHT, up), (Kind.FORWARD, up)] * behind,
            *[*pairs, (Kind.BACKWARD, down)] * (whole - 2 * num_ranks + ahead),
            *[*pairs[1:], (Kind.BACKWARD, down)] * behind,
            *tail[:ahead],
            *split[:ahead],
            *chain(*zip(weights[:behind], split[ahead:], strict=True)),
            *weights[behind:],
        ]
        rows.append(tuple(_numbered(steps, num_microbatches)))
    return Plan(
        "dualpipe_v", num_ranks, 2 * num_ranks, num_microbatches, folded(num_ranks), tuple(rows)
    )


def _fill_the_pipe(num_ranks: int, rank: int) -> list[Step]:
    """The forwards that a rank can do until the first one has come back up to it."""
    down, up = (Kind.FORWARD, rank), (Kind.FORWARD, 2 * num_ranks - 1 - rank)
    return [down] * 2 * (num_ranks - 1 - rank) + [down, up] * (rank + 1)


def _numbered(steps: Iterable[Step], num_microbatches: int) -> list[Action]:
    """Each stage's actions of a kind get the microbatches in order; those above the last go.

    Leaving out whole microbatches keeps an order free of deadlocks: no other waits for them.
    """
    done: dict[Step, int] = {}
    row = []
    for kind, stage in steps:
        # B makes what I makes: they count together, and W follows the I of its stage.
        counted = (Kind.INPUT if kind is Kind.BACKWARD else kind, stage)
        microbatch = done.get(counted, 0)
        done[counted] = microbatch + 1
        if kind is Kind.BACKWARD:
            done[Kind.WEIGHT, stage] = done.get((Kind.WEIGHT, stage), 0) + 1
        if microbatch < num_microbatches:
            row.append(Action(kind, stage, microbatch))
    return row


def _repeated(
    num_ranks: int, num_microbatches: int, *, strides: Sequence[int], pauses: Sequence[int]
) -> list[list[Action]]:
    """The orders of one microbatch's way, repeated every 6 slots, with the empty slots left out.

    A microbatch passes the ranks four times: F down, F up, I down (from the last stage), I up. Its
    way is `strides` (slots from a rank to the next, by pass) and `pauses` (slots at each turn), so
    chosen that the four actions of a rank fall in different slots modulo 6: two are left for W. The
    way from each F to its I is what a rank holds (arXiv:2405.15362, section 2). All orders go by
    one time, and what an action needs is earlier: they cannot deadlock.
    """
    ranks = range(num_ranks)
    passes = [
        (Kind.FORWARD, ranks),
        (Kind.FORWARD, ranks[::-1]),
        (Kind.INPUT, ranks),
        (Kind.INPUT, ranks[::-1]),
    ]
    timed: list[list[tuple[int, int, Step]]] = [[] for _ in ranks]
    slot = 0
    for index, (kind, way) in enumerate(passes):
        for rank in way:
            stage = 2 * num_ranks - 1 - rank if index in (1, 2) else rank
            timed[rank] += [(slot + 6 * m, m, (kind, stage)) for m in range(num_microbatches)]
            slot += strides[index]
        slot += 1 - strides[index] + (pauses[index] if index < len(pauses) else 0)
    return [[Action(*step, m) for _, m, step in sorted(row)] for row in timed]
