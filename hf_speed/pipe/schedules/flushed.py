"""Schedules of whole backwards: GPipe and 1F1B, with one or several stages a rank.

Every rank has all its forwards in one order and all its backwards in one, and the two alternate
after a number of forwards of its own ("warm-up"). All ranks start and end a step together. For p
ranks of v stages and m >= p microbatches that leaves a bubble of (p - 1) / (v * m + p - 1).

Each stage takes the microbatches in order, so that gradients add up as without a pipeline.
"""

from collections.abc import Callable, Sequence

from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan, looped


def gpipe(num_ranks: int, num_microbatches: int) -> Plan:
    """All forwards, then all backwards. Holds every microbatch.

    Backwards go in the order of the forwards, not in reverse as in the paper: as fast, as large.
    Source: GPipe, arXiv:1811.06965, section 2.3.
    """
    return _plan("gpipe", num_ranks, [num_microbatches], 1, warmup=lambda _: num_microbatches)


def looped_breadth_first(num_ranks: int, num_microbatches: int, chunks: int) -> Plan:
    """GPipe with `chunks` stages a rank: all microbatches through one stage, then the next.

    Holds every microbatch on every stage. Each stage's parameters are needed only twice in a step,
    and its gradients are complete early.
    Source: breadth-first pipeline parallelism, arXiv:2211.05953, section 4.
    """
    whole = num_microbatches * chunks
    return _plan("looped_bfs", num_ranks, [num_microbatches], chunks, warmup=lambda _: whole)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Plan:
    """Forward and backward in turn, from the first backward on. Rank r holds p - r microbatches.

    Source: PipeDream-Flush, arXiv:2006.09503, section 3.2.
    """
    return _plan("1f1b", num_ranks, [num_microbatches], 1, warmup=lambda r: num_ranks - 1 - r)


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> Plan:
    """1F1B with `chunks` stages a rank.

    Microbatches go in groups: one group through a rank's first stage, then through its second, ...
    With groups of p each stage gets its input as the rank turns to it. Megatron-LM asks for m to be
    a multiple of p. Here groups are larger where it is not, as evenly as can be: no rank waits for
    an input then either, and the bubble is the same formula, for up to v - 1 activations more for
    each microbatch above p in the largest group. Where m < p there is one group, and it waits.
    Source: Megatron-LM, arXiv:2104.04473, section 2.2.
    """
    num_groups = max(num_microbatches // num_ranks, 1)
    least, larger = divmod(num_microbatches, num_groups)
    groups = [least + (group < larger) for group in range(num_groups)]

    def warmup(rank: int) -> int:
        # Twice 1F1B's, since the backward comes back through the ranks' other stages: not where
        # there are none.
        ahead = num_ranks - 1 - rank
        return ahead if chunks == 1 else 2 * ahead + (chunks - 1) * max(groups)

    return _plan("interleaved", num_ranks, groups, chunks, warmup=warmup)


def _plan(
    name: str, num_ranks: int, groups: Sequence[int], chunks: int, *, warmup: Callable[[int], int]
) -> Plan:
    """Each group of microbatches through all stages of a rank before the next group."""
    placement = looped(num_ranks, chunks)
    rows = []
    for rank in range(num_ranks):
        stages = range(rank, len(placement), num_ranks)
        forwards, backwards, first = [], [], 0
        for size in groups:
            group = range(first, first + size)
            first += size
            forwards += [Action(Kind.FORWARD, s, m) for s in stages for m in group]
            backwards += [Action(Kind.BACKWARD, s, m) for s in reversed(stages) for m in group]
        rows.append(_alternate(forwards, backwards, warmup(rank)))
    return Plan(name, num_ranks, len(placement), sum(groups), placement, tuple(rows))


def _alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> tuple[Action, ...]:
    """The first `warmup` forwards, then forward and backward in turn, then what is left."""
    row = list(forwards[:warmup])
    rest = forwards[warmup:]
    for forward, backward in zip(rest, backwards, strict=False):
        row += [forward, backward]
    return (*row, *backwards[len(rest) :])
