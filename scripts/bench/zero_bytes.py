"""Bytes that each rank sends per step, read from the counters of its own network namespace.

Claims, in units of the model's bytes in the dtype on the wire: at 2 and 4 ranks, stages 0 to 2 send
2(N-1)/N, within 2%; stage 3 at most 3(N-1)/N, and no less than 2(N-1)/N: the units whose weights
the backward does not need (the embedding), or that it needs first (the head and the last block),
are not gathered again, so a shallow model stays below the ideal. No stage sends more than its
peers. The dtype is bfloat16; DDP's gradients are fp32 under autocast, so its model counts in fp32.

In rows against `ideal`, `ratio` is ours over the ideal; against a peer it is theirs over ours.

The script starts itself again inside `unshare --net`, where `lo` carries nothing but its own ranks.
What 2 steps sent is taken from what 12 steps sent, so start-up and idle traffic cancel. TCP headers
are counted: they are sent.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import workers
from common import Row, finish, make_row, parser, progress
from workload import Shape, describe, num_parameters

INSIDE = "HF_SPEED_BENCH_NAMESPACE"
MODEL = Shape(vocab=2048, hidden=256, inter=704, layers=12, heads=4, batch=1, length=8)
SETTLE_S = 0.1
REGATHERS = 3
"""The stage that gathers the weights again in the backward."""
PEERS = {0: ("ddp", "deepspeed-0"), 1: ("deepspeed-1",), 2: ("deepspeed-2",),
         3: ("deepspeed-3", "fsdp2")}  # fmt: skip
BYTES_PER_ELEMENT = {"ddp": 4}
"""On the wire, where it is not bfloat16's 2."""


def ideal(stage: int, ranks: int) -> float:
    """Give the least bytes a rank can send in a step, in units of the model's bytes."""
    return (3 if stage == 3 else 2) * (ranks - 1) / ranks


def enter_namespace() -> int | None:
    """Start this script again in a network namespace; None if this process is already in one.

    Returns:
        The exit code of the run inside, or None.

    Raises:
        SystemExit: the kernel does not let this user make a namespace.
    """
    if os.environ.get(INSIDE) == "1":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return None
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], check=False).returncode != 0:
        raise SystemExit(
            "zero_bytes needs a network namespace, and `unshare --net` was refused. "
            "Run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)."
        )
    inside = {**os.environ, INSIDE: "1"}
    command = [*unshare, sys.executable, *sys.argv]
    return subprocess.run(command, env=inside, check=False).returncode


def lo_bytes() -> int:
    """Read the bytes that `lo` has sent since it came up."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev has no line for lo.")


def sent_per_step(job: workers.Job, *, few: int, many: int) -> float:
    """Give the bytes per rank and step, from runs of `few` and of `many` steps."""

    def sent(group: workers.Group, count: int) -> int:
        time.sleep(SETTLE_S)  # late acknowledgements of the steps before
        before = lo_bytes()
        group.call("steps", count)
        time.sleep(SETTLE_S)
        return lo_bytes() - before

    with workers.groups([job]) as started:
        group = started[job.system]
        group.call("steps", 2)
        difference = -sent(group, few) + sent(group, many)
    return difference / (many - few) / job.ranks


def measure(args: argparse.Namespace, ranks: int) -> tuple[list[Row], bool]:
    """Measure all systems at one world size; say whether none was left out."""
    wanted = args.only.split(",") if args.only else None
    elements = num_parameters(MODEL)
    what = describe(MODEL, "bfloat16", ranks)
    volumes: dict[str, float] = {}
    complete = True
    for stage, peers in PEERS.items():
        for system in (*peers, f"ours-{stage}"):
            if wanted is not None and system not in wanted:
                complete = False
                continue
            size = elements * BYTES_PER_ELEMENT.get(system, 2)
            job = workers.Job(system, MODEL, "bfloat16", ranks)
            volumes[system] = sent_per_step(job, few=2, many=4 if args.quick else 12) / size
            progress(f"x{ranks} {system}: {volumes[system]:.3f} of the model's bytes\n")
    rows = []
    for stage, peers in PEERS.items():
        mine = volumes.get(f"ours-{stage}")
        if mine is None:
            continue
        least = ideal(stage, ranks)
        pairs = [("ideal", least, mine / least, "<=1.02" if stage == REGATHERS else "1+-0.02")]
        if stage == REGATHERS:
            floor = ideal(0, ranks)
            pairs += [("ideal without a second gather", floor, mine / floor, ">=0.98")]
        pairs += [(p, volumes[p], volumes[p] / mine, ">=0.98") for p in peers if p in volumes]
        for peer, theirs, ratio, bar in pairs:
            claim = f"stage {stage} bytes sent, {ranks} ranks, vs {peer}"
            unit = "model bytes"
            rows.append(
                make_row(claim, what, ours=mine, peer=peer, theirs=theirs, unit=unit,
                         ratios=[ratio], bar=bar)
            )  # fmt: skip
    return rows, complete


def main() -> int:
    """Run the bench; see the module docstring."""
    args = parser(__doc__ or "", out="zero_bytes").parse_args()
    code = enter_namespace()
    if code is not None:
        return code
    rows: list[Row] = []
    complete = True
    for ranks in (2,) if args.quick else (2, 4):
        found, whole = measure(args, ranks)
        rows += found
        complete = complete and whole
    return finish(rows, args, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
