"""Bytes of model state alive on each rank, by counting tensor storages, at ZeRO stages 0 to 3.

Claims, with P parameters in bf16 training (bf16 weights and gradients, fp32 masters, two fp32
moments) on N ranks, at the end of the backward, when everything is alive: at most 16P, 4P+12P/N,
2P+14P/N and 16P/N, within 2%, plus the units in flight. That is the paper's count
(arXiv:1910.02054, section 3.1), where gradients stay in bf16: rows `(bf16 gradients)`, with
`accumulate_dtype: same`. By default hf_speed accumulates gradients in fp32, two bytes a gradient
more; those rows are judged by their own formula.

Units in flight are bf16 buffers of one block each, IN_FLIGHT of them, whatever the depth: two
reductions under way (what is sent and what arrives), one unit being filled, the root. `theirs`
is the formula plus those, `ratio` is ours over it. Rows of the peers are reported, not judged;
DeepSpeed has the small bucket that transformers' integration would choose for it.

Some rows stay below their formula: stage 3 casts its part of the masters when it gathers and keeps
no bf16 copy of that part (14P/N), and stage 1 drops full gradients once they are reduced.

The count knows nothing of the engine (census.py): every storage that Python objects of the process
can reach.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import workers
from common import Row, finish, make_row, parser, progress
from workload import Shape, describe, num_block_parameters, num_parameters

MODEL = Shape(vocab=1024, hidden=256, inter=704, layers=24, heads=4, batch=1, length=16)
QUICK = MODEL._replace(layers=8)
IN_FLIGHT = 6
"""Block-sized bf16 buffers that stay between the backward's units."""


class System(NamedTuple):
    """What is counted, and the bytes per parameter that it may keep by the formula."""

    name: str
    claim: str
    formula: float | None


def systems(ranks: int) -> list[System]:
    """List the peers and every stage of ours in both accumulation dtypes."""
    paper = (16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks)
    fp32_gradients = (18, 6 + 12 / ranks, 2 + 16 / ranks, 18 / ranks)
    listed = [System("ddp", "DDP", None), System("fsdp2", "FSDP2", None)]
    listed += [System(f"deepspeed-{k}-lean", f"DeepSpeed ZeRO-{k}", None) for k in (1, 2, 3)]
    for stage in range(4):
        same = System(f"ours-{stage}-same", f"stage {stage} (bf16 gradients)", paper[stage])
        default = System(f"ours-{stage}", f"stage {stage} (default)", fp32_gradients[stage])
        listed += [same, default]
    return listed


def measure(args: argparse.Namespace, shape: Shape, ranks: int) -> tuple[list[Row], bool]:
    """Count all systems at one world size; say whether none was left out."""
    what = describe(shape, "bfloat16", ranks)
    elements = num_parameters(shape)
    flight = IN_FLIGHT * 2 * num_block_parameters(shape) / elements
    rows: list[Row] = []
    complete = True
    for system in systems(ranks):
        if args.only and system.name not in args.only.split(","):
            complete = False
            continue
        with workers.groups([workers.Job(system.name, shape, "bfloat16", ranks)]) as started:
            started[system.name].call("steps", 2)
            mine = max(started[system.name].call("memory")) / elements
        progress(f"x{ranks} {system.name}: {mine:.2f} bytes per parameter\n")
        judged = system.formula is not None
        limit = (system.formula or 0.0) + flight if judged else mine
        rows.append(
            make_row(
                f"state alive, {system.claim}, {ranks} ranks",
                what,
                ours=mine,
                peer=f"{system.formula:g} + {flight:.2f}" if judged else "(a peer itself)",
                theirs=limit,
                unit="bytes/param",
                ratios=[mine / limit],
                bar="<=1.02" if judged else None,
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
