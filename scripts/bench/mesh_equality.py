"""Pipeline x tensor slices x data x ZeRO stage trains what one process trains: 8 processes on CPU.

Claims, in fp32, over ten steps of AdamW with clipping: on every mesh (pp, tp, dp) of 8 processes,
at ZeRO stages 1, 2 and 3, losses and gradient norms of Llama, Qwen3, GPT-2 and BERT are within 1e-5
of one process in plain PyTorch; a pipeline alone, with any schedule, is bitwise one process with
the same microbatches: losses and final parameters.

In the first kind of rows `ours` is the largest relative difference of any loss or norm at any of
the three stages, and `ratio` is `ours` over the 1e-5 that are allowed. In the second kind `ours`
is the number of losses and of parameters that differ in any bit, over all models and both ZeRO
stages that a schedule ran at, and `ratio` is the same number. There GPT-2 and BERT have a head of
their own: the gradient of a tied one, which two stages share, is added up in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from common import Row, finish, make_row, parser, progress
from mesh_toys import KINDS, NO_CLIP, NUM_ROWS, Case, Figures, Trainee, alone
from pipe_world import Task, worlds

from hf_speed.config.parallel import CHUNKS_OF
from hf_speed.config.tree import SCHEDULES

MESHES = ((2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 4, 1), (8, 1, 1))
"""(pp, tp, dp)."""
STAGES = (1, 2, 3)
STEPS = 10
ALLOWED = 1e-5
DEEPEST = 8
"""Stages that models of eight layers can have."""

Train = Callable[[Case], Sequence[Figures]]
"""Runs a case; what each rank says of it."""


def furthest(ours: Sequence[Figures], theirs: Figures) -> float:
    """The largest relative difference of any loss or norm on any rank."""
    found = torch.tensor([[each.losses, each.norms] for each in ours], dtype=torch.float64)
    expected = torch.tensor([theirs.losses, theirs.norms], dtype=torch.float64)
    return float((found / expected - 1).abs().max())


def num_different(ours: Sequence[Figures], theirs: Figures) -> int:
    """Losses and parameters that differ in any bit, on the rank with most of them."""

    def count(one: Figures) -> int:
        losses = sum(a != b for a, b in zip(one.losses, theirs.losses, strict=True))
        names = one.digests.keys() | theirs.digests.keys()
        return losses + sum(one.digests.get(name) != theirs.digests.get(name) for name in names)

    return max(count(one) for one in ours)


def equality_rows(
    train: Train, kinds: Sequence[str], meshes: Sequence[tuple[int, int, int]], *, steps: int
) -> list[Row]:
    """Meshes of all kinds against one process."""
    rows = []
    for kind in kinds:
        expected = alone(Case(kind, 1, 1, 0, steps))
        for pp, tp, dp in meshes:
            apart = []
            for stage in STAGES:
                progress(f"{kind}, pp {pp} x tp {tp} x dp {dp}, stage {stage}")
                apart.append(furthest(train(Case(kind, pp, tp, stage, steps)), expected))
            rows.append(
                make_row(
                    f"losses and gradient norms of {kind}, pp {pp} x tp {tp} x dp {dp}",
                    f"{kind} fp32, 8 processes, ZeRO 1 to 3, {steps} steps",
                    ours=max(apart),
                    peer="one process",
                    theirs=0.0,
                    unit="largest relative difference",
                    ratios=[max(apart) / ALLOWED],
                    bar="<=1",
                )
            )
    return rows


def bitwise_rows(
    train: Train, pp: int, kinds: Sequence[str], schedules: Sequence[str], *, steps: int
) -> list[Row]:
    """Schedules of a pipeline alone against one process with the same microbatches."""
    expected = {
        kind: alone(Case(kind, 1, 1, 0, steps, None, NUM_ROWS, tied=False, clip=NO_CLIP))
        for kind in kinds
    }
    rows = []
    for number, schedule in enumerate(schedules):
        wrong = 0
        for place, kind in enumerate(kinds):
            stage = (1, 3)[(number + place) % 2]
            progress(f"{schedule} on {pp} stages' ranks, {kind}, stage {stage}")
            case = Case(kind, pp, 1, stage, steps, schedule, NUM_ROWS, tied=False, clip=NO_CLIP)
            wrong += num_different(train(case), expected[kind])
        rows.append(
            make_row(
                f"bits of losses and parameters, {schedule} on {pp} ranks",
                f"{', '.join(kinds)}, fp32, {NUM_ROWS} microbatches, {steps} steps",
                ours=wrong,
                peer="one process",
                theirs=0.0,
                unit="values that differ",
                ratios=[float(wrong)],
                bar="<=0",
            )
        )
    return rows


def main() -> int:
    """Run the bench; see the module docstring."""
    args = parser(__doc__ or "", out="mesh_equality").parse_args()
    torch.set_num_threads(1)
    kinds = [kind for kind in KINDS if not args.only or kind in args.only.split(",")]
    meshes, steps, schedules = MESHES, STEPS, SCHEDULES
    if args.quick:
        kinds, meshes, steps = kinds[:1], MESHES[:1], 4
        schedules = ("1f1b", "zb_h1", "zb_v")
    rows = []
    # One world at a time: eight processes that wait would still take turns with four that work.
    for ranks in (8, 4):
        with worlds([Task(f"{ranks} ranks", ranks, lambda _: Trainee())]) as started:
            (world,) = started.values()
            train = functools.partial(world.ask, "train")
            if ranks == DEEPEST:
                rows += equality_rows(train, kinds, meshes, steps=steps)
            fitting = [name for name in schedules if ranks * (CHUNKS_OF[name] or 2) <= DEEPEST]
            if not (args.quick and ranks == DEEPEST):
                rows += bitwise_rows(train, ranks, kinds, fitting, steps=steps)
    return finish(rows, args, complete=not args.only)


if __name__ == "__main__":
    raise SystemExit(main())
