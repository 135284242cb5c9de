"""Tokens per second of every ZeRO stage against DDP, FSDP2, DeepSpeed and plain PyTorch.

Claims (CPU: two ranks with one thread each): stage 3 at least 1.25x FSDP2 and 1.5x DeepSpeed
ZeRO-3; stages 1 and 2 at least 1.3x DeepSpeed's; stage 0 at least DDP's; one process at most 3%
slower than plain PyTorch. On a GPU (`--device cuda`) only the one-process claim is measured.
`ratio` is our tokens/s over theirs, the median of the ratios within each round: all systems of a
comparison train in turns, a few steps at a time.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

import workers
from common import Row, finish, interleave, make_row, parser, progress
from workload import LLAMA_5M, LLAMA_33M, Shape, describe

WARMUP_STEPS = 2


class Duel(NamedTuple):
    """A bar: our system against a peer."""

    ours: str
    peer: str
    bar: str


class Heat(NamedTuple):
    """Systems that train in turns, with the duels among them."""

    ranks: int
    duels: tuple[Duel, ...]

    @property
    def systems(self) -> list[str]:
        """Every system of the heat, once, peers first."""
        peers = dict.fromkeys(duel.peer for duel in self.duels)
        return [*peers, *dict.fromkeys(duel.ours for duel in self.duels)]


ONE_PROCESS = Heat(1, (Duel("ours-0", "plain", ">=0.97"),))
HEATS = (
    ONE_PROCESS,
    Heat(2, (Duel("ours-0", "ddp", ">=1.0"),)),
    Heat(2, (Duel("ours-1", "deepspeed-1", ">=1.3"), Duel("ours-2", "deepspeed-2", ">=1.3"))),
    Heat(2, (Duel("ours-3", "fsdp2", ">=1.25"), Duel("ours-3", "deepspeed-3", ">=1.5"))),
)


def measure(
    heat: Heat, shape: Shape, dtype: str, args: argparse.Namespace, *, rounds: int, steps: int
) -> tuple[list[Row], bool]:
    """Run one heat in interleaved rounds.

    Returns:
        The rows, and whether `--only` left none of the systems out.
    """
    wanted = [s for s in heat.systems if not args.only or s in args.only.split(",")]
    jobs = [workers.Job(name, shape, dtype, heat.ranks, args.device) for name in wanted]
    with workers.groups(jobs) as started:
        for group in started.values():
            group.seconds_per_step(WARMUP_STEPS)
        group_time = (
            workers.Group.cpu_seconds_per_step if args.cpu_time else workers.Group.seconds_per_step
        )
        seconds = interleave(
            {name: lambda group=group: group_time(group, steps) for name, group in started.items()},
            rounds=rounds,
            say=lambda text: progress(f"{dtype} x{heat.ranks} {text}"),
        )
    what = describe(shape, dtype, heat.ranks)
    tokens = heat.ranks * shape.tokens
    for name, values in seconds.items():
        progress(f"{what} {name}: {1e3 * statistics.median(values):.1f} ms a step\n")
    rows = []
    for duel in heat.duels:
        if duel.ours not in seconds or duel.peer not in seconds:
            continue
        mine, theirs = seconds[duel.ours], seconds[duel.peer]
        rows.append(
            make_row(
                f"{duel.ours} vs {duel.peer}, {'fp32' if dtype == 'float32' else 'bf16'}",
                what,
                ours=tokens / statistics.median(mine),
                peer=duel.peer,
                theirs=tokens / statistics.median(theirs),
                unit="tokens/s",
                ratios=[b / a for a, b in zip(mine, theirs, strict=True)],
                bar=duel.bar,
            )
        )
    return rows, len(wanted) == len(heat.systems)


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="zero_step")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("both", "float32", "bfloat16"), default="both")
    made.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time in place of elapsed time, for a busy machine: never exits 0",
    )
    args = made.parse_args()
    shape = LLAMA_5M if args.quick else LLAMA_33M
    rounds, steps = (3, 1) if args.quick else (9, 3)
    heats = (ONE_PROCESS,) if args.device == "cuda" else HEATS
    dtypes = ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,)
    rows: list[Row] = []
    complete = args.dtype == "both" and not args.cpu_time
    for dtype in dtypes:
        for heat in heats:
            found, whole = measure(heat, shape, dtype, args, rounds=rounds, steps=steps)
            rows += found
            complete = complete and whole
    return finish(rows, args, device=args.device, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
