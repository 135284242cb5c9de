"""Schedules of split backwards with one stage a rank: ZB-H1 and ZB-H2.

While W waits, a rank goes on with I, so that the ranks before it start earlier; the W that are left
fill the end of the step. How many microbatches may be held decides how far that goes. Figures below
are for F = I = W = 1.
"""

from collections.abc import Callable

from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan, looped
from hf_speed.pipe.schedules.fill import filled
from hf_speed.pipe.simulate import Costs


def zb_h1(num_ranks: int, num_microbatches: int, costs: Costs) -> Plan:
    """1F1B's order and memory (p microbatches), a third of its bubble: p - 1 instead of 3 (p - 1).

    Source: arXiv:2401.10241, section 2.1.
    """
    return _plan(
        "zb_h1",
        num_ranks,
        num_microbatches,
        warmup=lambda rank: num_ranks - rank,
        limit=num_ranks,
        costs=costs,
    )


def zb_h2(num_ranks: int, num_microbatches: int, costs: Costs) -> Plan:
    """No rank waits between its own first and last action, for 2 p - 1 microbatches held.

    Needs m >= 2 p - 1. Later ranks start and end later: measured from the first start to the last
    end, their p - 1 at the start is a bubble as large as ZB-H1's (see Simulation.span).
    Source: arXiv:2401.10241, section 2.2.
    """
    return _plan(
        "zb_h2",
        num_ranks,
        num_microbatches,
        warmup=lambda rank: 2 * (num_ranks - rank) - 1,
        limit=2 * num_ranks - 1,
        costs=costs,
    )


def _plan(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    warmup: Callable[[int], int],
    limit: int,
    costs: Costs,
) -> Plan:
    """`warmup` forwards, then I and F in turn."""
    orders = []
    for rank in range(num_ranks):
        ahead = warmup(rank)
        order = [Action(Kind.FORWARD, rank, m) for m in range(min(ahead, num_microbatches))]
        for m in range(num_microbatches):
            order.append(Action(Kind.INPUT, rank, m))
            if m + ahead < num_microbatches:
                order.append(Action(Kind.FORWARD, rank, m + ahead))
        orders.append(order)
    return filled(name, looped(num_ranks, 1), orders, limit=limit, costs=costs)
