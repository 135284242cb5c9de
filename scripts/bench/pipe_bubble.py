"""Bubbles of every pipeline schedule: measured, simulated, published; and torch's in the same run.

Stages sleep for their compute time (`pipe_sleep`), so that on two cores p processes wait for each
other only, as p devices would. F = I = W, the case that the papers' formulas are for; a rank's
stages share its time. What comes between two sleeps, Python and messages of p processes on two
cores, counts as bubble. It is 0.3 to 1 ms, so a rank's F takes 100 ms: of p=4 and m=16, 1F1B was
measured at 17.6% with 20 ms and at 16.2% with 100 ms, where 15.8% is the formula. The cores are
kept awake by processes that run only where nothing else would. `--quick` has shorter sleeps and
leaves out the bar on ZB-V's 2%.

Steps follow each other without a barrier, as they do in training. The time of a step is that
between the ends of two on one rank, the longest of all ranks; a bubble is the share of it in which
ranks do not sleep. For schedules whose ranks start and end together that is the usual bubble
(1 - busy / makespan). For ZB-V and ZB-H2, whose ranks end in the order in which they start, it is
the rate of the zero bubble papers (arXiv:2401.10241, section 5.3), which leaves out the start of
the first step: with p=4 and m=16, ZB-V's makespan would have 3% of bubble, its steps have none.

`ratio`: for bubbles, 1 + (measured - expected), in shares of the step's time; `ours` and `theirs`
are in per cent. For throughput, torch's time over ours, the median of the rounds. For peaks, ours
over 1F1B's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from common import Row, finish, interleave, make_row, parser, progress
from pipe_sleep import SCHEDULES, TORCH_SCHEDULES, Case, Sleeper, StepRecord, Times
from pipe_world import Task, World, cores_awake, worlds

BOUNDS = ("v_half", "dualpipe_v")
"""Published with formulas that the schedules stay below."""

TOLERANCE = 0.03

LONG_S = 0.1
"""Shortest F with which a bubble of 2% can be told from what comes between sleeps."""


class Heat(NamedTuple):
    """Schedules that run in turns on one world."""

    ranks: int
    microbatches: int
    schedules: tuple[str, ...]
    times: Times
    rounds: int
    steps: int

    @property
    def what(self) -> str:
        """For rows."""
        return f"p={self.ranks} m={self.microbatches}, {self.times}"


def published(schedule: str, p: int, m: int, v: int) -> float:
    """The bubble that papers give, as a share of a step, for F = I = W.

    Sources: gpipe, 1f1b, interleaved, looped_bfs: arXiv:2104.04473, section 2.2; zb_h1, zb_h2,
    zb_v: arXiv:2401.10241, table 1 and section 6; v_half: half of 1F1B's, arXiv:2405.15362;
    dualpipe_v: DeepSeek's DualPipe, (p - 1)(F&B + B - 3W) of half-size chunks, with F&B = F + B.
    """
    # Idle time of a rank, in units of F of all its stages; its work is 3m.
    idle = {
        "gpipe": 3.0 * (p - 1),
        "1f1b": 3.0 * (p - 1),
        "interleaved": 3.0 * (p - 1) / v,
        "looped_bfs": 3.0 * (p - 1) / v,
        "zb_h1": 1.0 * (p - 1),
        "zb_h2": 0.0,
        "zb_v": 0.0,
        "v_half": 1.5 * (p - 1),
        "dualpipe_v": 2.0 * (p - 1) / v,
    }[schedule]
    return idle / (3 * m + idle)


def simulated(case: Case) -> float:
    """The bubble that our simulator gives."""
    from hf_speed.pipe.schedules import make_plan
    from hf_speed.pipe.simulate import Costs, simulate

    times = case.times.of_stage(case.chunks)
    costs = Costs(forward=times.forward, input=times.input, weight=times.weight)
    plan = make_plan(
        case.schedule,
        num_ranks=case.ranks,
        num_microbatches=case.microbatches,
        chunks=case.chunks,
        costs=costs,
    )
    return simulate(plan, costs).span_bubble


class Measured(NamedTuple):
    """One system's steps of one round."""

    seconds: float
    """A step's."""
    bubble: float
    held: float
    """Peak of any rank, in microbatches on a whole rank."""


def digest(answers: Sequence[Sequence[StepRecord]]) -> Measured:
    """Sum up what the ranks say of steps that followed each other; the first only starts the clock.

    Args:
        answers: by rank, each at least two steps.
    """
    seconds = max((steps[-1].end - steps[0].end) / (len(steps) - 1) for steps in answers)
    busy = statistics.mean(step.busy for steps in answers for step in steps[1:])
    held = max(step.held for steps in answers for step in steps[1:])
    return Measured(seconds, 1 - busy / seconds, held)


def measure(heat: Heat, world: World, systems: Sequence[str]) -> dict[str, list[Measured]]:
    """Run the heat; what each "system schedule" did, round by round."""
    found: dict[str, list[Measured]] = {}
    cases = {
        f"{system} {schedule}": (
            system,
            Case(schedule, heat.ranks, heat.microbatches, SCHEDULES[schedule], heat.times),
        )
        for schedule in heat.schedules
        for system in systems
        if system == "ours" or schedule in TORCH_SCHEDULES
    }

    def run(name: str) -> float:
        system, case = cases[name]
        found.setdefault(name, []).append(digest(world.ask("run", system, case, heat.steps + 1)))
        return found[name][-1].seconds

    for system, case in cases.values():
        world.ask("run", system, case, 1)
    interleave(
        {name: lambda name=name: run(name) for name in cases},
        rounds=heat.rounds,
        say=lambda text: progress(f"p={heat.ranks} m={heat.microbatches} {text}"),
    )
    return found


def rows_of(heat: Heat, found: dict[str, list[Measured]]) -> list[Row]:
    """The comparisons that the measurements allow."""
    rows: list[Row] = []
    for schedule in heat.schedules:
        mine = found.get(f"ours {schedule}")
        theirs = found.get(f"torch {schedule}")
        if mine:
            rows += bubble_rows(heat, schedule, mine)
        if mine and theirs:
            rows.append(throughput_row(heat, schedule, mine, theirs))
    if "ours zb_v" in found:
        rows += zero_bubble_rows(heat, found)
    return rows


def bubble_rows(heat: Heat, schedule: str, mine: list[Measured]) -> list[Row]:
    """Measured against simulated and published."""
    chunks = SCHEDULES[schedule]
    case = Case(schedule, heat.ranks, heat.microbatches, chunks, heat.times)
    formula = published(schedule, heat.ranks, heat.microbatches, chunks)
    at_most, near = f"<={1 + TOLERANCE}", f"1+-{TOLERANCE}"
    rows = []
    for peer, expected, bar in (
        ("simulator", simulated(case), near),
        ("published", formula, at_most if schedule in BOUNDS else near),
    ):
        rows.append(
            make_row(
                f"bubble of {schedule}, against {peer}",
                heat.what,
                ours=100 * statistics.median(each.bubble for each in mine),
                peer=peer,
                theirs=100 * expected,
                unit="% idle",
                ratios=[1 + each.bubble - expected for each in mine],
                bar=bar,
            )
        )
    return rows


def throughput_row(heat: Heat, schedule: str, mine: list[Measured], theirs: list[Measured]) -> Row:
    """Microbatches a second against torch's with the same schedule."""
    return make_row(
        f"throughput of {schedule}",
        heat.what,
        ours=heat.microbatches / statistics.median(each.seconds for each in mine),
        peer=f"torch {TORCH_SCHEDULES[schedule]}",
        theirs=heat.microbatches / statistics.median(each.seconds for each in theirs),
        unit="microbatches/s",
        ratios=[b.seconds / a.seconds for a, b in zip(mine, theirs, strict=True)],
        bar=">=1.0",
    )


def zero_bubble_rows(heat: Heat, found: dict[str, list[Measured]]) -> list[Row]:
    """ZB-V has next to no bubble, and holds no more than 1F1B."""
    zero = found["ours zb_v"]
    rows = []
    if (heat.ranks, heat.microbatches) == (4, 16) and heat.times.forward >= LONG_S:
        rows.append(
            make_row(
                "bubble of zb_v, under 2%",
                heat.what,
                ours=100 * statistics.median(each.bubble for each in zero),
                peer="ideal",
                theirs=0.0,
                unit="% idle",
                ratios=[1 + each.bubble for each in zero],
                bar="<=1.02",
            )
        )
    if "ours 1f1b" in found:
        flat = found["ours 1f1b"]
        rows.append(
            make_row(
                "peak activations of zb_v, against 1f1b",
                heat.what,
                ours=max(each.held for each in zero),
                peer="ours 1f1b",
                theirs=max(each.held for each in flat),
                unit="microbatches",
                ratios=[a.held / b.held for a, b in zip(zero, flat, strict=True)],
                bar="<=1.0",
            )
        )
    return rows


def heats(args: argparse.Namespace) -> list[Heat]:
    """What is run: p=4 with m=16, where ZB-V's bar is, and eight processes."""
    every = tuple(SCHEDULES)
    if args.schedules:
        every = tuple(args.schedules.split(","))
    if args.quick:
        few = tuple(name for name in ("1f1b", "zb_v") if name in every)
        return [Heat(4, 16, few, Times(*[0.07] * 3), rounds=1, steps=1)]
    times = Times(*[args.sleep_ms * 1e-3] * 3)
    return [
        Heat(4, 16, every, times, rounds=3, steps=2),
        Heat(8, 16, every, times, rounds=3, steps=1),
    ]


def run_heat(heat: Heat, systems: Sequence[str], *, urgent: bool = False) -> list[Row]:
    """Start the heat's processes, measure, and compare."""
    task = Task(f"p={heat.ranks}", heat.ranks, Sleeper, urgent=urgent)
    with cores_awake(), worlds([task]) as started:
        found = measure(heat, started[task.name], systems)
    for name, each in found.items():
        seconds = statistics.median(one.seconds for one in each)
        bubble = statistics.median(one.bubble for one in each)
        progress(f"p={heat.ranks} {name}: {1e3 * seconds:.1f} ms a step, {bubble:.1%} idle\n")
    return rows_of(heat, found)


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="pipe_bubble")
    made.add_argument("--sleep-ms", type=float, default=1e3 * LONG_S, help="F, I and W of one rank")
    made.add_argument(
        "--urgent",
        action="store_true",
        help="real-time priority, for a busy machine, as root: never exits 0",
    )
    made.add_argument(
        "--schedules", default="", metavar="NAMES", help="comma list, for development"
    )
    args = made.parse_args()
    systems = [name for name in ("torch", "ours") if not args.only or name in args.only.split(",")]
    rows = [row for heat in heats(args) for row in run_heat(heat, systems, urgent=args.urgent)]
    whole = len(systems) == 2 and not args.schedules and not args.urgent
    return finish(rows, args, complete=whole)


if __name__ == "__main__":
    raise SystemExit(main())
