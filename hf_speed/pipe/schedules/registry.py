"""The schedules by name."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from hf_speed.errors import ConfigError
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.schedules import flushed, vee, zero_bubble
from hf_speed.pipe.simulate import Costs


class Entry(NamedTuple):
    """A schedule and the numbers of stages a rank that it takes."""

    build: Callable[[int, int, int, Costs], Plan]
    """(num_ranks, num_microbatches, chunks, costs) -> Plan."""
    chunks: int | None
    """Stages a rank; None: any number."""


SCHEDULES: dict[str, Entry] = {
    "gpipe": Entry(lambda p, m, _v, _costs: flushed.gpipe(p, m), 1),
    "1f1b": Entry(lambda p, m, _v, _costs: flushed.one_f_one_b(p, m), 1),
    "interleaved": Entry(lambda p, m, v, _costs: flushed.interleaved(p, m, v), None),
    "looped_bfs": Entry(lambda p, m, v, _costs: flushed.looped_breadth_first(p, m, v), None),
    "zb_h1": Entry(lambda p, m, _v, costs: zero_bubble.zb_h1(p, m, costs), 1),
    "zb_h2": Entry(lambda p, m, _v, costs: zero_bubble.zb_h2(p, m, costs), 1),
    "zb_v": Entry(lambda p, m, _v, costs: vee.zb_v(p, m, costs), 2),
    "v_half": Entry(lambda p, m, _v, costs: vee.v_half(p, m, costs), 2),
    "v_min": Entry(lambda p, m, _v, costs: vee.v_min(p, m, costs), 2),
    "dualpipe_v": Entry(lambda p, m, _v, _costs: vee.dualpipe_v(p, m), 2),
}
"""Every schedule by the name that pipe.schedule gives it."""

DEFAULT_CHUNKS = 2
"""Stages a rank of a schedule that takes any number."""


def make_plan(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    chunks: int | None = None,
    costs: Costs | None = None,
) -> Plan:
    """The plan of a schedule: compute actions only, in an order that cannot deadlock.

    Args:
        name: as in pipe.schedule; one of SCHEDULES.
        num_ranks: pipeline ranks, at least 1.
        num_microbatches: at least 1; may be fewer than ranks, and need not be a multiple.
        chunks: stages a rank; None: what the schedule has, 2 where it takes any number.
        costs: times by which the zero bubble schedules fill their gaps; None: F = I = W = 1.

    Raises:
        ConfigError: an unknown name, a number below 1, or chunks that the schedule cannot take.
    """
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(str(name), SCHEDULES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"pipe.schedule={name!r} is no schedule. Did you mean {nearest!r}? There are "
            f"{', '.join(SCHEDULES)}."
        )
    if num_ranks < 1:
        raise ConfigError(f"mesh.pp={num_ranks} has no ranks. Give a size of at least 1.")
    if num_microbatches < 1:
        raise ConfigError(
            f"pipe.microbatches={num_microbatches} leaves nothing to do. Give at least 1."
        )
    entry = SCHEDULES[name]
    wanted = chunks if chunks is not None else entry.chunks or DEFAULT_CHUNKS
    if wanted < 1 or entry.chunks not in (None, wanted):
        takes = "at least 1" if entry.chunks is None else f"exactly {entry.chunks}"
        others = ", ".join(repr(other) for other, one in SCHEDULES.items() if one.chunks is None)
        raise ConfigError(
            f"pipe.chunks={chunks} does not go with pipe.schedule={name!r}, which puts {takes} "
            f"stage(s) on a rank. Leave pipe.chunks out, or use a schedule that takes any number "
            f"({others})."
        )
    return entry.build(num_ranks, num_microbatches, wanted, costs if costs is not None else Costs())
