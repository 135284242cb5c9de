"""Bytes of model state alive on each rank, by counting tensor storages, at ZeRO stages 0 to 3.

Claims, with P parameters in bf16 training (bf16 weights and gradients, fp32 masters, two fp32
moments) on N ranks, at the end of the backward, when everything is alive: 16P, 4P+12P/N, 2P+14P/N
and 16P/N, within 2%. That is the paper's count (arXiv:1910.02054, section 3.1), where gradients
stay in bf16 (`accumulate_dtype: same`). By default hf_speed accumulates gradients in fp32, two
bytes a gradient more; those rows are judged by their own formula. `peak` rows take the largest
count at the end of any layer's backward, when units are still in flight: at stage 3 the ideal is
raised by the weights and gradients of `IN_FLIGHT` blocks, at stage 2 by their gradients. `ratio` is
ours over the ideal; rows of the peers are reported, not judged.

The count knows nothing of the engine (census.py): every storage that Python objects of the process
can reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import workers
from common import Row, finish, make_row, parser, progress
from workload import Shape, describe, num_parameters

MODEL = Shape(vocab=1024, hidden=256, inter=704, layers=16, heads=4, batch=1, length=16)
QUICK = MODEL._replace(layers=8)
PEERS = ("ddp", "fsdp2", "deepspeed-1-lean", "deepspeed-2-lean", "deepspeed-3-lean")


def paper(stage: int, ranks: int) -> float:
    """Give the bytes per parameter of the paper's count."""
    return (16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks)[stage]


def fp32_gradients(stage: int, ranks: int) -> float:
    """Give the bytes per parameter where reduced gradients are kept in fp32, our default."""
    return (18, 2 + 4 + 12 / ranks, 2 + 16 / ranks, 18 / ranks)[stage]


def measure(args: argparse.Namespace, shape: Shape, ranks: int) -> tuple[list[Row], bool]:
    """Count all systems at one world size; say whether none was left out."""
    systems: list[tuple[str, int | None, Callable[[int, int], float] | None]] = [
        (peer, None, None) for peer in PEERS
    ]
    for stage in range(4):
        systems += [(f"ours-{stage}-same", stage, paper), (f"ours-{stage}", stage, fp32_gradients)]
    what = describe(shape, "bfloat16", ranks)
    elements = num_parameters(shape)
    rows: list[Row] = []
    complete = True
    for name, stage, formula in systems:
        if args.only and name not in args.only.split(","):
            complete = False
            continue
        with workers.groups([workers.Job(name, shape, "bfloat16", ranks)]) as started:
            started[name].call("steps", 2)
            counts = started[name].call("memory")
        backward = max(count[0] for count in counts) / elements
        peak = max(count[1] for count in counts) / elements
        progress(f"x{ranks} {name}: {backward:.2f} B/param, peak {peak:.2f}\n")
        for kind, mine in (("end of backward", backward), ("peak in backward", peak)):
            least = formula(stage, ranks) if formula and stage is not None else mine
            judged = formula is not None and kind == "end of backward"
            rows.append(
                make_row(
                    f"{name}, {kind}, {ranks} ranks",
                    what,
                    ours=mine,
                    peer="ideal" if formula else "-",
                    theirs=least,
                    unit="bytes/param",
                    ratios=[mine / least],
                    bar="1+-0.02" if judged else None,
                )
            )
    return rows, complete


def main() -> int:
    """Run the bench; see the module docstring."""
    args = parser(__doc__ or "", out="zero_memory").parse_args()
    shape = QUICK if args.quick else MODEL
    rows: list[Row] = []
    complete = True
    for ranks in (2,) if args.quick else (2, 4):
        found, whole = measure(args, shape, ranks)
        rows += found
        complete = complete and whole
    return finish(rows, args, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
