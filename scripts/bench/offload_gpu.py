"""Offload on one GPU: how large a model trains, and how fast beside the same model all in the GPU.

Claims (a GPU of 80 GB or more, a host of 128 GiB), bf16 with 8-bit moments and float32 masters

capped    13B parameters train with the GPU capped at 32 GB, at 8 to 10 host bytes a parameter
          (`ratio`: measured host bytes a parameter over 10);
largest   the most parameters that train on the whole card (reported; `ratio`: over 13B);
fraction  tokens/s with the optimizer's state on the host over tokens/s with everything in the GPU,
          at the largest of 7B, 3B and 1B parameters that fits there (bar 0.9; where 7B does not fit
          because 16 bytes a parameter exceed the card, the row says at which size it was measured);
update    bytes/s of the one-pass AdamW kernel over those of torch's fused AdamW, 200M parameters.

Every training runs in a process of its own: a cap and a failure end with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from common import Row, finish, interleave, make_row, parser, progress
from workload import LEARNING_RATE, Shape, build_model, make_batch, num_parameters

GIB = 1 << 30
CAP_BYTES = 32 * GIB
SIZES = {
    "1B": Shape(32000, 2048, 5504, 20, 16, 16, 1024),
    "3B": Shape(32000, 3072, 8192, 26, 24, 16, 1024),
    "7B": Shape(32000, 4096, 11008, 32, 32, 16, 1024),
    "13B": Shape(32000, 5120, 13824, 40, 40, 4, 1024),
    "20B": Shape(32000, 6144, 16384, 44, 48, 4, 1024),
    "30B": Shape(32000, 6656, 17920, 60, 52, 4, 1024),
}
QUICK = {"1B": Shape(8192, 1024, 2816, 8, 16, 4, 256)}
HOST = {"optimizer": "host", "gradients": "host", "parameters": "device", "moments": "int8"}
HOST_ALL = HOST | {"parameters": "host"}
WARMUP_STEPS, STEPS = 2, 4


def _train(shape: Shape, offload: dict[str, Any], cap_bytes: int | None) -> dict[str, float]:
    """Train in this process; give seconds a step, and the peaks of GPU and host."""
    from hf_speed.config import load_config
    from hf_speed.engine import Engine

    device = torch.device("cuda", 0)
    if cap_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
    with torch.device("meta"):
        model = build_model(shape)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tree = {
        "zero": {"stage": 2},
        "offload": offload,
        "precision": {"accumulate_dtype": "same"},
    }
    engine = Engine.attach(model, load_config(tree), compute_dtype=torch.bfloat16, device=device)
    engine.load_parameters(lambda _, __, numel: torch.randn(numel).mul_(0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine.bind_optimizer(optimizer)
    ids = make_batch(shape, 0, "cuda")

    def step() -> None:
        engine.backward(model(input_ids=ids, labels=ids).loss)
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP_STEPS):
        step()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    held = {store.tier: store.peak_bytes for store in engine.parts.tiers.stores}
    return {
        "seconds": statistics.median(seconds),
        "device_bytes": torch.cuda.max_memory_allocated(device),
        "host_bytes": held.get("host", 0) + engine.parts.tiers.staging_bytes,
    }


def _run(shape: Shape, offload: dict[str, Any], cap_bytes: int | None) -> dict[str, float] | None:
    """Train in a process of its own; None where it did not fit."""
    order = json.dumps({"shape": shape, "offload": offload, "cap": cap_bytes})
    command = [sys.executable, __file__, "--child", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    refusals = ("OutOfMemoryError", "No plan fits", "host tier is full", "Killed")
    if done.returncode < 0 or any(each in done.stderr for each in refusals):
        return None
    raise RuntimeError(f"a training failed, and not for want of memory:\n{done.stderr[-3000:]}")


def _capped(sizes: dict[str, Shape]) -> list[Row]:
    name = "13B" if "13B" in sizes else max(sizes)
    shape = sizes[name]
    progress(f"{name} under a cap of 32 GiB\n")
    found = _run(shape, HOST, CAP_BYTES)
    count = num_parameters(shape)
    per_parameter = found["host_bytes"] / count if found else float("inf")
    return [
        make_row(
            f"host bytes a parameter, {name} trained under {CAP_BYTES // GIB} GiB of GPU memory",
            f"Llama {count / 1e9:.1f}B bf16",
            ours=per_parameter,
            peer="limit",
            theirs=10.0,
            unit="bytes/param",
            ratios=[per_parameter / 10.0],
            bar="<=1.0",
        )
    ]


def _largest(sizes: dict[str, Shape]) -> list[Row]:
    best = 0
    for name, shape in sizes.items():
        progress(f"{name} on the whole card\n")
        if _run(shape, HOST, None) is None and _run(shape, HOST_ALL, None) is None:
            break
        best = num_parameters(shape)
    return [
        make_row(
            "largest model that trains on the whole card",
            "bf16, 8-bit moments",
            ours=best / 1e9,
            peer="ZeRO-Offload's 13B",
            theirs=13.0,
            unit="1e9 parameters",
            ratios=[best / 13e9],
            bar=None,
        )
    ]


def _fraction(sizes: dict[str, Shape]) -> list[Row]:
    for name in ("7B", "3B", "1B"):
        shape = sizes.get(name)
        inside = _run(shape, {"update": "fused", "moments": "int8"}, None) if shape else None
        if shape is None or inside is None:
            continue
        outside = _run(shape, HOST, None)
        tokens = shape.tokens
        theirs = tokens / inside["seconds"]
        ours = tokens / outside["seconds"] if outside else 0.0
        return [
            make_row(
                "optimizer state on the host, beside everything in the GPU",
                f"Llama {name} bf16, {tokens} tokens a step",
                ours=ours,
                peer="ours, all in the GPU",
                theirs=theirs,
                unit="tokens/s",
                ratios=[ours / theirs],
                bar=">=0.9",
            )
        ]
    raise RuntimeError("no model of the list fits this GPU without offload.")


def _update(args: argparse.Namespace) -> list[Row]:
    from hf_speed.optim.rules import Chunk, Span, rule_of

    numel = 20_000_000 if args.quick else 200_000_000
    make = {"device": "cuda", "dtype": torch.float32}
    parameter = torch.nn.Parameter(torch.randn(numel, **make))
    gradient = parameter.grad = torch.randn(numel, **make)
    optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, fused=True)
    found_rule = rule_of(optimizer)
    if found_rule is None:
        raise RuntimeError("there is no rule for AdamW.")
    rule = found_rule
    states = {spec.name: torch.zeros(numel, **make) for spec in rule.states(torch.float32)}
    master = parameter.detach().clone()
    settings = optimizer.param_groups[0]

    def ours() -> float:
        span = Span(numel, settings, 1)
        chunk = Chunk(master, gradient, states, None, [span], 1.0, 0, 0)
        return _seconds(lambda: rule.apply(chunk))

    found = interleave(
        {"ours": ours, "torch": lambda: _seconds(optimizer.step)}, rounds=9, say=progress
    )
    num_bytes = 28 * numel
    mine, theirs = (statistics.median(found[name]) for name in ("ours", "torch"))
    return [
        make_row(
            "one pass of AdamW, fp32",
            f"{numel // 1_000_000}M",
            ours=num_bytes / mine / 1e9,
            peer="torch fused",
            theirs=num_bytes / theirs / 1e9,
            unit="GB/s",
            ratios=[b / a for a, b in zip(found["ours"], found["torch"], strict=True)],
            bar=">=1.0",
        )
    ]


def _seconds(work: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Run the claims and report."""
    made = parser(__doc__ or "", out="offload_gpu")
    made.add_argument("--child", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.child:
        order = json.loads(args.child)
        print(json.dumps(_train(Shape(*order["shape"]), order["offload"], order["cap"])))
        return 0
    if not torch.cuda.is_available():
        print("offload_gpu: needs a GPU, and there is none: nothing was measured.")
        return 1
    sizes = QUICK if args.quick else SIZES
    rows = [*_update(args), *_fraction(sizes), *_capped(sizes), *_largest(sizes)]
    return finish(rows, args, device="cuda", complete=not args.only)


if __name__ == "__main__":
    raise SystemExit(main())
