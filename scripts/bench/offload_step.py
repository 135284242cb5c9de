"""Training with everything on the disk tier: memory, numbers, speed beside DeepSpeed's offload.

Claims (CPU): at stage 3 with parameters, gradients and optimizer state on disk

memory   the peak of resident memory is at most what the planner said beforehand (`ratio`: measured
         over planned), and under 35% of the model states (`ratio`: measured over states);
numbers  20 losses are bitwise those of the device tier (`ratio`: how many of them);
speed    tokens/s are at least 1.3x DeepSpeed ZeRO-3's with the same tiers, two ranks of one thread
         in turns (`ratio`: ours over theirs).

Resident memory is what the process has gained since its model existed without values; the planner
counts nothing of autograd's, so what it saves for the backward, measured on a plain model, and the
largest gradient that it makes are added.
glibc gives freed memory back in these processes (MALLOC_MMAP_THRESHOLD_=1 MiB), as whoever is short
of memory should have it do.
DeepSpeed's disk path needs its async_io operator, which is built at the first run (libaio).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import workers
from common import Row, finish, interleave, make_row, parser, progress
from workload import (
    LEARNING_RATE,
    LLAMA_5M,
    LLAMA_33M,
    Shape,
    build_model,
    describe,
    make_batch,
    num_parameters,
)

KIB = 1024
MIB = 1 << 20
WARMUP_STEPS = 2
NUM_LOSSES = 20
DEEP = Shape(8192, 1024, 2752, 24, 16, 1, 32)
"""Many blocks, so that a unit in flight is a small part of the whole."""
DEEP_QUICK = Shape(8192, 1024, 2752, 16, 16, 1, 32)
KINDS = ("optimizer", "gradients", "parameters")
STAGING_BYTES = 64 * MIB
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""Without it glibc keeps what autograd has freed: 5 to 10% of the peak here."""
SMALL_STAGING_BYTES = 16 * MIB


def _config(tier: str, path: str, staging_bytes: int) -> dict[str, Any]:
    offload: dict[str, Any] = {**dict.fromkeys(KINDS, tier), "update": "fused"}
    if tier != "device":
        offload["staging_bytes"] = staging_bytes
    if tier == "disk":
        offload["paths"] = [path]
    return {"zero": {"stage": 3}, "offload": offload}


def _status_bytes(field: str) -> int:
    """Bytes of this process from /proc: VmRSS now, VmHWM at most; both forget who started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"/proc/self/status has no {field}.")


def _load_libraries(shape: Shape) -> None:
    """Train one block of the shape, so that what libraries load and keep on first use is there."""
    small = shape._replace(vocab=64, layers=1)
    model = build_model(small)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = make_batch(small, 0, "cpu")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _autograd_bytes(shape: Shape) -> int:
    """Bytes that autograd saves for the backward of one batch, and of the largest gradient."""
    model = build_model(shape)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    ids = make_batch(shape, 0, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(input_ids=ids, labels=ids)
    largest = max(p.nbytes for p in model.parameters())
    return sum(saved.values()) + largest


def _child(shape: Shape, tier: str, steps: int, staging_bytes: int) -> dict[str, Any]:
    """Train in this fresh process; give losses, peak memory and what was planned."""
    from hf_speed.config import load_config
    from hf_speed.engine import Engine

    torch.set_num_threads(2)
    with torch.device("meta"):
        model = build_model(shape)
    # Its table of frequencies is no parameter: it needs values.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with tempfile.TemporaryDirectory() as path:
        config = load_config(_config(tier, path, staging_bytes))
        planned = _planned_bytes(model, config)
        _load_libraries(shape)
        before = _status_bytes("VmRSS")
        engine = Engine.attach(model, config, device=torch.device("cpu"))
        generator = torch.Generator()
        buffer = torch.empty(max(p.numel() for p in model.parameters()))

        def values(name: str, start: int, numel: int) -> torch.Tensor:
            # Alike whatever the tier, and in one buffer: a heap would keep holes of all sizes.
            generator.manual_seed(hash_of(name) + start)
            drawn = torch.randn(numel, generator=generator, out=buffer[:numel])
            return drawn.mul_(0.02)

        engine.load_parameters(values)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        engine.bind_optimizer(optimizer)
        losses = []
        for step in range(steps):
            ids = make_batch(shape, step, "cpu")
            loss = model(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        peak = _status_bytes("VmHWM")
        del engine
    return {"losses": losses, "gained": peak - before, "planned": planned}


def hash_of(name: str) -> int:
    """Give a number of 31 bits that depends on the name alone."""
    import zlib

    return zlib.crc32(name.encode()) >> 1


def _planned_bytes(model: torch.nn.Module, config: Any) -> int:
    """Bytes of memory, device and host together, that the planner announces for one rank."""
    from hf_speed.config import Tiers
    from hf_speed.engine.estimate import Estimator
    from hf_speed.engine.planning import sizes_of

    units = sizes_of(model, config, compute_dtype=None)
    offload = config.offload
    tiers = Tiers(offload.optimizer, offload.gradients, offload.parameters)
    planned = Estimator(units, config, world_size=1, device_type="cpu").at(3, tiers)
    return planned.by_tier.device + planned.by_tier.host


def _in_fresh_process(shape: Shape, tier: str, steps: int, staging_bytes: int) -> dict[str, Any]:
    order = json.dumps({"shape": shape, "tier": tier, "steps": steps, "staging": staging_bytes})
    done = subprocess.run(
        [sys.executable, __file__, "--child", order],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ALLOCATOR},
    )
    if done.returncode:
        raise RuntimeError(f"the run on {tier} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_and_numbers(args: argparse.Namespace) -> list[Row]:
    """Compare the disk tier with the planner, with the states, and with the device tier."""
    shape = DEEP_QUICK if args.quick else DEEP
    progress("memory: everything on disk\n")
    disk = _in_fresh_process(shape, "disk", 3, STAGING_BYTES)
    saved = _autograd_bytes(shape)
    states = 16 * num_parameters(shape)
    what = describe(shape, "float32", 1)
    rows = [
        make_row(
            "peak resident memory, everything on disk, against the plan",
            what,
            ours=disk["gained"] / MIB,
            peer="planned",
            theirs=(disk["planned"] + saved) / MIB,
            unit="MiB",
            ratios=[disk["gained"] / (disk["planned"] + saved)],
            bar="<=1.0",
        ),
        make_row(
            "peak resident memory, everything on disk, against the model states",
            what,
            ours=disk["gained"] / MIB,
            peer="model states",
            theirs=states / MIB,
            unit="MiB",
            ratios=[disk["gained"] / states],
            bar="<=0.35",
        ),
    ]
    small = LLAMA_5M if args.quick else LLAMA_33M
    steps = 5 if args.quick else NUM_LOSSES
    runs = {}
    for tier in ("device", "host", "disk"):
        progress(f"numbers: {tier}\n")
        runs[tier] = _in_fresh_process(small, tier, steps, SMALL_STAGING_BYTES)["losses"]
    for tier in ("host", "disk"):
        same = sum(a == b for a, b in zip(runs[tier], runs["device"], strict=True))
        rows.append(
            make_row(
                f"losses on the {tier} tier that are bitwise those of the device tier",
                describe(small, "float32", 1),
                ours=same,
                peer="device tier",
                theirs=steps,
                unit="losses",
                ratios=[same / steps],
                bar=">=1.0",
            )
        )
    return rows


def races(args: argparse.Namespace) -> tuple[list[Row], bool]:
    """Race DeepSpeed's ZeRO-3 offload."""
    shape = LLAMA_5M if args.quick else LLAMA_33M
    rounds, steps = (2, 1) if args.quick else (5, 3)
    rows: list[Row] = []
    complete = True
    for dtype in ("float32", "bfloat16"):
        for tier, theirs in (
            ("host", "deepspeed-3-offload-cpu"),
            ("disk", "deepspeed-3-offload-nvme"),
        ):
            names = [theirs, f"ours-3-offload-{tier}"]
            wanted = [n for n in names if not args.only or n in args.only.split(",")]
            complete &= wanted == names
            with contextlib.ExitStack() as stack:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=args.scratch))
                jobs = [workers.Job(f"{n}:{scratch}", shape, dtype, 2, args.device) for n in wanted]
                started = stack.enter_context(workers.groups(jobs))
                for group in started.values():
                    group.seconds_per_step(WARMUP_STEPS)
                seconds = interleave(
                    {n: lambda g=g: g.seconds_per_step(steps) for n, g in started.items()},
                    rounds=rounds,
                    say=lambda text, dtype=dtype: progress(f"{dtype} {text}"),
                )
            peer, mine = (
                next((v for k, v in seconds.items() if k.startswith(n)), None) for n in names
            )
            if peer is None or mine is None:
                continue
            tokens = 2 * shape.tokens
            rows.append(
                make_row(
                    f"stage 3, everything on the {tier} tier",
                    describe(shape, dtype, 2),
                    ours=tokens / statistics.median(mine),
                    peer=theirs,
                    theirs=tokens / statistics.median(peer),
                    unit="tokens/s",
                    ratios=[b / a for a, b in zip(mine, peer, strict=True)],
                    bar=">=1.3",
                )
            )
    return rows, complete


def main() -> int:
    """Run the claims and report."""
    made = parser(__doc__ or "", out="offload_step")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--device", default="cpu", choices=["cpu"])
    made.add_argument("--scratch", help="directory of the disk tier, on a real disk")
    args = made.parse_args()
    if args.child:
        order = json.loads(args.child)
        found = _child(Shape(*order["shape"]), order["tier"], order["steps"], order["staging"])
        print(json.dumps(found))
        return 0
    rows = memory_and_numbers(args)
    raced, complete = races(args)
    return finish([*rows, *raced], args, device="cpu", complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
