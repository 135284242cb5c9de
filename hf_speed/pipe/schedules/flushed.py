"""Schedules with whole backwards: GPipe, 1F1B, and both with several stages a rank.

All ranks start and end a step together ("flush"), which costs a bubble of (p - 1) forwards and
backwards for p ranks; with v stages a rank it is v times smaller.
"""

from collections.abc import Callable, Sequence

from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan, looped


def gpipe(num_ranks: int, num_microbatches: int) -> Plan:
    """All forwards, then all backwards. Holds every microbatch.

    Backwards go in the order of the forwards, not in reverse as in the paper: the same time and
    peak, and gradients add up in the order of the microbatches.
    Source: GPipe, arXiv:1811.06965, section 2.3.
    """
    return _plan("gpipe", num_ranks, num_microbatches, warmup=lambda _: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Plan:
    """One forward, one backward in turn, as soon as the first backward can be.

    Rank r holds p - r microbatches.

    Source: PipeDream-Flush, arXiv:2006.09503, section 3.2.
    """
    return _plan("1f1b", num_ranks, num_microbatches, warmup=lambda rank: num_ranks - 1 - rank)


def _plan(
    name: str, num_ranks: int, num_microbatches: int, *, warmup: Callable[[int], int]
) -> Plan:
    rows = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.FORWARD, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Kind.BACKWARD, rank, m) for m in range(num_microbatches)]
        rows.append(alternate(forwards, backwards, warmup(rank)))
    return Plan(name, num_ranks, num_ranks, num_microbatches, looped(num_ranks, 1), tuple(rows))


def alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> tuple[Action, ...]:
    """The first `warmup` forwards, then forward and backward in turn, then what is left."""
    row = list(forwards[:warmup])
    rest = forwards[warmup:]
    for forward, backward in zip(rest, backwards, strict=False):
        row += [forward, backward]
    return (*row, *backwards[len(rest) :])
