"""Elements per second of one AdamW step on the CPU, against torch, DeepSpeed and memory itself.

Bars, at 50M and 200M parameters with one thread and with two: fp32 at least 1.0x torch's
AdamW(fused=True) and DeepSpeedCPUAdam; mixed (fp32 master and moments, bf16 gradient in, bf16
parameter out) at least 2.0x both; bf16 moments at least 2.5x both; fp32 and mixed, which move 28
bytes an element like it, at least 0.9x a loop that reads four arrays and writes three (stream.cpp).
Results equal torch's to 1e-6.

`ratio` is theirs over ours in time, the median of the ratios within each round: all systems work on
the same memory, in turns. The row of equality has the largest error as `ours`, in units of 1e-6 of
an element's size, and no peer that could be faster.

In mixed precision a peer first widens the gradient and afterwards narrows the parameter. `kept`
means into and out of buffers that it keeps, as DeepSpeed's engine does; `fresh` means that a step
makes a new fp32 gradient, `master.grad = grad.float()`, as a training loop in plain torch does.
A peer with kept buffers moves 46 bytes an element. Where memory alone decides, mixed can therefore
be at most 1.64x such a peer, and bf16 moments 2.3x: those bars then are beyond any code.
8-bit moments are reported without a bar.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import REPO, Row, finish, interleave, make_row, parser, progress

SETTLE_S = 0.02
LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
BARS: tuple[tuple[str, str, str | None], ...] = (
    ("fp32", "torch fp32", ">=1.0"),
    ("fp32", "deepspeed fp32", ">=1.0"),
    ("fp32", "stream", ">=0.9"),
    ("mixed", "stream", ">=0.9"),
    ("mixed", "torch mixed, kept", ">=2.0"),
    ("mixed", "torch mixed, fresh", ">=2.0"),
    ("mixed", "deepspeed mixed, kept", ">=2.0"),
    ("bf16 moments", "torch mixed, kept", ">=2.5"),
    ("bf16 moments", "torch mixed, fresh", ">=2.5"),
    ("bf16 moments", "deepspeed mixed, kept", ">=2.5"),
    ("8-bit moments", "torch mixed, kept", None),
)


# ---------------------------------------------------------------- one process, one memory


def make_runners(numel: int, stream: Path) -> dict[str, Callable[[], None]]:
    """Every system as a function that does one step, all on the same tensors."""
    import torch

    from hf_speed.optim import Chunk, Span

    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel))
    grad, grad16 = torch.randn(numel), torch.randn(numel, dtype=torch.bfloat16)
    out = torch.empty(numel, dtype=torch.bfloat16)
    first, second = torch.zeros(numel), torch.zeros(numel)
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    torch_adam = torch.optim.AdamW([param], fused=True, **settings)
    moments = {"exp_avg": first, "exp_avg_sq": second}
    torch_adam.state[param] = {"step": torch.tensor(10.0), **moments}
    master = param.detach()

    def with_torch(gradient: torch.Tensor) -> None:
        param.grad = gradient
        torch_adam.step()

    def kept(step: Callable[[torch.Tensor], None]) -> None:
        grad.copy_(grad16)
        step(grad)
        out.copy_(master)

    def fresh() -> None:
        with_torch(grad16.float())
        param.grad = None
        out.copy_(master)

    runners: dict[str, Callable[[], None]] = {
        "stream": stream_step(stream, (master, grad, first, second)),
        "torch fp32": lambda: with_torch(grad),
        "torch mixed, kept": lambda: kept(with_torch),
        "torch mixed, fresh": fresh,
    }
    if importlib.util.find_spec("deepspeed"):
        with_deepspeed = deepspeed_step(param, settings, moments)
        runners["deepspeed fp32"] = lambda: with_deepspeed(grad)
        runners["deepspeed mixed, kept"] = lambda: kept(with_deepspeed)

    rule = rule_for(torch_adam)
    spans = [Span(numel, torch_adam.param_groups[0], 10)]

    def ours(gradient: torch.Tensor, dtype: torch.dtype, *, writes: bool) -> Callable[[], None]:
        states = moments if dtype == torch.float32 else {
            spec.name: torch.zeros(-(-numel // spec.block), dtype=spec.dtype)
            for spec in rule.states(dtype)
        }  # fmt: skip
        chunk = Chunk(master, gradient, states, out if writes else None, spans, 1.0, 1, 0)
        return lambda: rule.apply(chunk)

    runners["fp32"] = ours(grad, torch.float32, writes=False)
    runners["mixed"] = ours(grad16, torch.float32, writes=True)
    runners["bf16 moments"] = ours(grad16, torch.bfloat16, writes=True)
    runners["8-bit moments"] = ours(grad16, torch.uint8, writes=True)
    return runners


def stream_step(built: Path, arrays: Sequence[Any]) -> Callable[[], None]:
    """The yardstick on master, gradient and two moments."""
    import torch

    library = ctypes.CDLL(str(built))
    addresses = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
    numel, threads = ctypes.c_int64(len(arrays[0])), torch.get_num_threads()
    return lambda: library.stream(*addresses, numel, threads)


def rule_for(optimizer: Any) -> Any:
    """The update rule that is measured."""
    from hf_speed.optim import rule_of

    rule = rule_of(optimizer)
    if rule is None:
        raise RuntimeError(f"there is no update rule for {type(optimizer)}: nothing to measure.")
    return rule


def deepspeed_step(param: Any, settings: Mapping, moments: Mapping) -> Callable:
    """DeepSpeedCPUAdam on the same parameter and moments."""
    import logging

    logging.disable(logging.INFO)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam([param], adamw_mode=True, **settings)
    optimizer.state[param] = {"step": 10, **moments}

    def step(gradient: object) -> None:
        param.grad = gradient
        optimizer.step()

    return step


def largest_error(numel: int = 1 << 20, steps: int = 10) -> float:
    """How far fp32 results are from torch's, in 1e-6 of an element's size and of its way."""
    import torch

    from hf_speed.optim import Chunk, Span

    torch.manual_seed(1)
    param = torch.nn.Parameter(torch.randn(numel))
    optimizer = torch.optim.AdamW(
        [param], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    rule, master, way = rule_for(optimizer), param.detach().clone(), param.detach().abs()
    states = {spec.name: torch.zeros(numel) for spec in rule.states(torch.float32)}
    for step in range(1, steps + 1):
        before = param.detach().clone()
        param.grad = torch.randn(numel)
        spans = [Span(numel, optimizer.param_groups[0], step)]
        rule.apply(Chunk(master, param.grad, states, None, spans, 1.0, 0, 0))
        optimizer.step()
        way += (param.detach() - before).abs()
    return float(((master - param.detach()).abs() / way).max()) / 1e-6


def work(args: argparse.Namespace) -> None:
    """Measure in this process, whose number of threads is set, and print seconds as JSON."""
    runners = make_runners(args.numel, args.stream)
    wanted = [name for name in runners if not args.only or name in args.only.split(",")]

    def timed(step: Callable[[], None]) -> float:
        # OpenMP's threads spin for some milliseconds after their work, on the next one's core.
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for name in wanted:
        runners[name]()
    label = f"{args.numel // 10**6}M x{os.environ['OMP_NUM_THREADS']}"
    seconds = interleave(
        {name: lambda step=runners[name]: timed(step) for name in wanted},
        rounds=args.rounds,
        say=lambda text: progress(f"{label} {text}"),
    )
    print(json.dumps({"seconds": seconds, "error": largest_error()}))


# ---------------------------------------------------------------- the bench


def build_stream(folder: Path) -> Path:
    """Compile the yardstick."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("cpu_adam: needs g++ to build stream.cpp, the loop to compare with.")
    built = folder / "stream.so"
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    source = Path(__file__).with_name("stream.cpp")
    subprocess.run([compiler, *flags, "-o", str(built), str(source)], check=True)
    return built


def measure(args: argparse.Namespace, stream: Path, numel: int, threads: int) -> dict:
    """Measure every system with `threads` threads, in a process of its own."""
    # DeepSpeed builds its extension with ninja, found beside the interpreter.
    tools = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    path = f"{REPO}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [
            sys.executable, __file__, "--work", "--numel", str(numel), "--stream", str(stream),
            "--rounds", str(5 if args.quick else 11), "--only", args.only,
        ],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PATH": tools, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(found: dict, numel: int, threads: int) -> list[Row]:
    """Judge one measurement."""
    shape = f"{numel // 10**6}M parameters, {threads} thread{'s' if threads > 1 else ''}"
    seconds = found["seconds"]
    rows = []
    for ours, peer, bar in BARS:
        if ours not in seconds or peer not in seconds:
            continue
        mine, theirs = seconds[ours], seconds[peer]
        rows.append(
            make_row(
                f"{ours} vs {peer}",
                shape,
                ours=numel / statistics.median(mine) / 1e9,
                peer=peer,
                theirs=numel / statistics.median(theirs) / 1e9,
                unit="G elements/s",
                ratios=[b / a for a, b in zip(mine, theirs, strict=True)],
                bar=bar,
            )
        )
    error = found["error"]
    rows.append(
        make_row(
            "fp32 equals torch",
            f"1M parameters, {threads} thread{'s' if threads > 1 else ''}, 10 steps",
            ours=error,
            peer="torch fp32",
            theirs=1.0,
            unit="1e-6",
            ratios=[error],
            bar="<=1.0",
        )
    )
    return rows


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="cpu_adam")
    made.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--numel", type=int, default=0, help="parameters, in place of 50M and 200M")
    made.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.work:
        work(args)
        return 0
    sizes = (
        [args.numel] if args.numel else [20_000_000] if args.quick else [50 * 10**6, 200 * 10**6]
    )
    cores = len(os.sched_getaffinity(0))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        stream = build_stream(Path(folder))
        for numel in sizes:
            for threads in (1, 2)[:cores]:
                rows += rows_of(measure(args, stream, numel, threads), numel, threads)
    for name in {peer for _, peer, _ in BARS} - {row.peer for row in rows}:
        print(f"not measured: {name} (is deepspeed installed, the extra `bench`?)")
    complete = len(rows) == len(sizes) * min(cores, 2) * (len(BARS) + 1) and not args.numel
    return finish(rows, args, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
