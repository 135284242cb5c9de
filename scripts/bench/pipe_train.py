"""A real Llama on two pipeline stages: one process, torch.distributed.pipelining, DeepSpeed, ours.

Two processes with one thread each on two cores, fp32, 8 microbatches, AdamW included; everybody
trains the same values on the same tokens and cuts at the same layers (`pipe_llama`). Claims: our
best schedule at least 1.05x torch's best and 1.08x DeepSpeed's PipelineModule; with the same
schedule at least torch's. Without bars: one process on one core and on both, and half of one
process's time, which no two cores that share their memory reach: where all cut alike into equal
stages, it is also the most that any schedule can gain.

A second heat has a head as heavy as two layers, cut by each as it offers: torch's stages have equal
numbers of layers, ours are balanced by parameters (`pipe.balance`).

`ratio` is our steps/s over theirs, the median of the ratios within each round: all systems train in
turns. The best of several is the one with the lowest median. That all train the same is a test:
tests/scripts/test_pipe_bench.py compares their losses.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence

from common import Row, finish, interleave, make_row, parser, progress
from pipe_llama import (
    BALANCED,
    LARGE_HEAD,
    SMALL,
    TINY,
    Step,
    Trainer,
    Workload,
    deepspeed,
    one_process,
    ours,
    torch_pipeline,
)
from pipe_sleep import SCHEDULES, TORCH_SCHEDULES
from pipe_world import Task, World, worlds
from workload import num_parameters

QUICK = ("1f1b", "interleaved", "zb_h1", "zb_v")
"""Schedules of a quick run."""

OWN_CUT = ("1f1b", "zb_h1", "zb_v")
"""Schedules of the second heat."""

BEST_OF_TORCH, BEST_OF_DEEPSPEED, SAME = ">=1.05", ">=1.08", ">=1.0"


def _task(name: str, work: Workload) -> Task:
    """What a system's ranks build; names are `system` or `system-schedule`."""
    system, _, schedule = name.partition("-")
    if system == "one":
        build = functools.partial(one_process, work)
        return Task(name, 1, lambda rank: Trainer(build(rank)), threads=int(schedule))
    if system == "deepspeed":
        step: functools.partial[Step] = functools.partial(deepspeed, work)
    else:
        builder = {"torch": torch_pipeline, "ours": ours}[system]
        step = functools.partial(builder, work, schedule=schedule, chunks=SCHEDULES[schedule])
    return Task(name, 2, lambda rank: Trainer(step(rank)))


def systems(schedules: Sequence[str]) -> list[str]:
    """Every system, peers first."""
    peers = [f"torch-{name}" for name in schedules if name in TORCH_SCHEDULES]
    return ["one-1", "one-2", *peers, "deepspeed", *(f"ours-{name}" for name in schedules)]


def tasks(names: Sequence[str], work: Workload) -> list[Task]:
    """The worlds that train."""
    return [_task(name, work) for name in names]


def seconds_per_step(world: World, count: int) -> float:
    """Train `count` steps; the slowest rank's seconds."""
    return max(seconds for seconds, _ in world.ask("train", count)) / count


def best(seconds: Mapping[str, Sequence[float]], system: str) -> str | None:
    """The schedule of a system with the lowest median."""
    mine = [name for name in seconds if name.startswith(f"{system}-")]
    return min(mine, key=lambda name: statistics.median(seconds[name]), default=None)


def rows_of(seconds: Mapping[str, Sequence[float]], what: str) -> list[Row]:
    """The comparisons that the measurements allow."""
    fast, rival = best(seconds, "ours"), best(seconds, "torch")
    duels: list[tuple[str | None, str | None, str, str | None]] = [
        (fast, rival, "best schedule", BEST_OF_TORCH),
        (fast, "deepspeed", "best schedule", BEST_OF_DEEPSPEED),
    ]
    duels += [(f"ours-{name}", f"torch-{name}", "same schedule", SAME) for name in TORCH_SCHEDULES]
    duels += [(fast, f"one-{threads}", "against one process", None) for threads in (1, 2)]
    rows = []
    for mine, peer, claim, bar in duels:
        if mine is None or peer is None or mine not in seconds or peer not in seconds:
            continue
        rows.append(
            make_row(
                f"{claim}: {mine} vs {peer}",
                what,
                ours=1e3 * statistics.median(seconds[mine]),
                peer=peer,
                theirs=1e3 * statistics.median(seconds[peer]),
                unit="ms a step",
                ratios=[b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)],
                bar=bar,
            )
        )
    return rows


def rows_of_cuts(seconds: Mapping[str, Sequence[float]], what: str) -> list[Row]:
    """The comparisons of the second heat."""
    duels = [(best(seconds, "ours"), best(seconds, "torch"), "best schedule, own cut")]
    duels += [(f"ours-{name}", f"torch-{name}", "same schedule, own cut") for name in OWN_CUT]
    return [
        make_row(
            f"{claim}: {mine} vs {peer}",
            what,
            ours=1e3 * statistics.median(seconds[mine]),
            peer=peer,
            theirs=1e3 * statistics.median(seconds[peer]),
            unit="ms a step",
            ratios=[b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)],
            bar=BEST_OF_TORCH,
        )
        for mine, peer, claim in duels
        if mine in seconds and peer in seconds
    ]


def measure(
    names: Sequence[str], work: Workload, *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds a step of each system, round by round."""
    with worlds(tasks(names, work)) as started:
        for world in started.values():
            seconds_per_step(world, 2)
        return interleave(
            {
                name: lambda world=world: seconds_per_step(world, steps)
                for name, world in started.items()
            },
            rounds=rounds,
            say=progress,
        )


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="pipe_train")
    made.add_argument("--tiny", action="store_true", help="a model to see whether everything runs")
    args: argparse.Namespace = made.parse_args()
    work, rounds, steps = (SMALL, 5, 1) if args.quick else (BALANCED, 9, 1)
    if args.tiny:
        work, rounds = TINY, 2
    every = systems(QUICK if args.quick else tuple(SCHEDULES))
    names = [name for name in every if not args.only or name in args.only.split(",")]
    seconds = measure(names, work, rounds=rounds, steps=steps)
    rows = rows_of(seconds, _describe(work))
    report(seconds)
    if not (args.quick or args.tiny or args.only):
        duels = [f"{system}-{name}" for system in ("torch", "ours") for name in OWN_CUT]
        cuts = measure(duels, LARGE_HEAD, rounds=5, steps=steps)
        rows += rows_of_cuts(cuts, f"{_describe(LARGE_HEAD)}, head of two layers")
        report(cuts)
    return finish(rows, args, complete=names == every and not args.tiny)


def _describe(work: Workload) -> str:
    millions = num_parameters(work.shape) / 1e6
    return f"Llama {millions:.0f}M fp32, 2 stages, m={work.microbatches}"


def report(seconds: Mapping[str, Sequence[float]]) -> None:
    """Print each system's median and spread."""
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        progress(f"{name}: {1e3 * middle:.1f} ms a step, spread {spread:.1%}\n")


if __name__ == "__main__":
    raise SystemExit(main())
