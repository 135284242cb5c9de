"""From a checkpoint of training to a model for the Hub: hf_speed against zero_to_fp32 and DCP.

One model, trained by each system on 2 ranks at ZeRO-3 in fp32, saved by each. Then each system's
own command makes a model of fp32 safetensors from its checkpoint, every time in a process of its
own, all in turns:

    hf_speed    hf-speed export CHECKPOINT OUT --max_shard_size 5GB (so that it rewrites; a
                checkpoint of ours is such a model already, and without options it is copied)
    DeepSpeed   python zero_to_fp32.py CHECKPOINT OUT --safe_serialization, the script that it
                leaves in each checkpoint
    DCP         consolidate_safetensors_files on the shards of HuggingFaceStorageWriter

Claim: the peak resident memory of ours, interpreter and libraries included, is at most 0.3 times
that of zero_to_fp32. Seconds are without a bar: of the whole command, until its files are on disk.
Before each run its input leaves the page cache. Each result is checked for names, shapes and dtype.
Resident memory counts pages of mapped files, which the kernel can take back: zero_to_fp32 maps its
input, ours reads it. `ratio` is ours over theirs.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoint_systems import MIB, SYSTEMS, evict, files_of, force
from common import Row, finish, interleave, make_row, parser, progress
from pipe_world import Task, worlds
from safetensors import safe_open
from workload import Shape, build_model, describe

RANKS = 2
LLAMA_286M = Shape(16384, 1024, 2752, 20, 16, 1, 16)
LLAMA_13M = Shape(4096, 512, 1376, 3, 8, 1, 16)

_MEASURED = """
import atexit, re, runpy, sys
status = "/proc/self/status"
def tell():
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open(status).read())[1], file=sys.stderr)
atexit.register(tell)
sys.argv = sys.argv[1:]
"""
_SCRIPT = f"{_MEASURED}runpy.run_path(sys.argv[0], run_name='__main__')"
_OURS = f"{_MEASURED}from hf_speed.cli import main; sys.exit(main())"
_CONSOLIDATE = f"""{_MEASURED}
from torch.distributed.checkpoint import _consolidate_hf_safetensors as hf
names = dict.fromkeys(open(sys.argv[3]).read().split(), 1)
hf.consolidate_safetensors_files(sys.argv[1], sys.argv[2], names)
"""


class Ran(NamedTuple):
    """One export."""

    seconds: float
    peak_bytes: int


class Exporter(NamedTuple):
    """One system's way from its checkpoint to a model."""

    label: str
    system: str
    command: Callable[[Path, Path], list[str]]
    """(checkpoint, out) -> arguments of the interpreter."""


def _ours(checkpoint: Path, out: Path) -> list[str]:
    options = ["--max_shard_size", "5GB"]
    return ["-c", _OURS, "hf-speed", "export", str(checkpoint), str(out), *options]


def _ours_copied(checkpoint: Path, out: Path) -> list[str]:
    return ["-c", _OURS, "hf-speed", "export", str(checkpoint), str(out)]


def _deepspeed(checkpoint: Path, out: Path) -> list[str]:
    script = str(checkpoint / "zero_to_fp32.py")
    return ["-c", _SCRIPT, script, str(checkpoint), str(out), "--safe_serialization"]


def _dcp(checkpoint: Path, out: Path) -> list[str]:
    out.mkdir()
    names = checkpoint / "names.txt"
    return ["-c", _CONSOLIDATE, "dcp", str(checkpoint / "model"), str(out), str(names)]


EXPORTERS = (
    Exporter("hf_speed", "hf_speed", _ours),
    Exporter("hf_speed, copied", "hf_speed", _ours_copied),
    Exporter("DeepSpeed zero_to_fp32", "DeepSpeed", _deepspeed),
    Exporter("DCP consolidation", "DCP", _dcp),
)
OURS, COPIED, JUDGED = EXPORTERS[0], EXPORTERS[1], EXPORTERS[2]


def make_checkpoints(model: Shape, home: Path, wanted: list[str]) -> None:
    """Train a step under each system and save into a directory of its name."""
    for name in wanted:
        progress(f"training under {name}")
        build = functools.partial(SYSTEMS[name], model, "float32")
        with worlds([Task(name, RANKS, build)]) as started:
            (home / name).mkdir()
            started[name].ask("save", str(home / name))
    if "DCP" in wanted:
        names = "\n".join(name for name, _ in shapes(model))
        (home / "DCP" / "names.txt").write_text(names)


def shapes(model: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's tensors."""
    with torch.device("meta"):
        return [(name, tuple(value.shape)) for name, value in build_model(model).named_parameters()]


def run(exporter: Exporter, home: Path) -> Ran:
    """Export once, in a process of its own, into a directory that is gone afterwards.

    Raises:
        RuntimeError: the command failed; the message ends with its output.
    """
    checkpoint = home / exporter.system
    out = home / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, *exporter.command(checkpoint, out)]
    evict(str(checkpoint))
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_dir():
        raise RuntimeError(f"{exporter.label}: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    force(files_of(str(out)))
    seconds = time.perf_counter() - begin
    peak = next(line for line in reversed(done.stderr.splitlines()) if line.startswith("peak "))
    return Ran(seconds, int(peak.split()[1]) * 1024)


def check_model(out: Path, model: Shape) -> None:
    """Check that an export has every tensor of the model, in fp32.

    Raises:
        RuntimeError: it has not.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                if tensor.get_dtype() != "F32":
                    raise RuntimeError(f"{path} has {name} in {tensor.get_dtype()}")
                found[name] = tuple(tensor.get_shape())
    if found != dict(shapes(model)):
        raise RuntimeError(f"{out} is not the model that was trained")


def rows_of(found: Mapping[str, list[Ran]], shape: str, *, bar: str | None) -> list[Row]:
    """Ours against each peer; memory with a bar against zero_to_fp32."""
    rows = []
    for label, runs in found.items():
        if label in (OURS.label, COPIED.label):
            continue
        for mine in (OURS.label, COPIED.label):
            for claim, unit, ours, theirs in (
                ("peak memory", "MiB", [each.peak_bytes / MIB for each in found[mine]],
                 [each.peak_bytes / MIB for each in runs]),
                ("time", "s", [each.seconds for each in found[mine]],
                 [each.seconds for each in runs]),
            ):  # fmt: skip
                judged = claim == "peak memory" and label == JUDGED.label
                rows.append(
                    make_row(
                        f"{claim} of an export, {mine} vs {label}",
                        shape,
                        ours=statistics.median(ours),
                        peer=label,
                        theirs=statistics.median(theirs),
                        unit=unit,
                        ratios=[a / b for a, b in zip(ours, theirs, strict=True)],
                        bar=bar if judged else None,
                    )
                )
    return rows


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="checkpoint_export")
    made.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                      help="directory on the disk to be measured")  # fmt: skip
    args = made.parse_args()
    model = LLAMA_13M if args.quick else LLAMA_286M
    wanted = args.only.split(",") if args.only else list(SYSTEMS)
    exporters = [each for each in EXPORTERS if each.system in wanted]
    found: dict[str, list[Ran]] = {each.label: [] for each in exporters}
    with tempfile.TemporaryDirectory(prefix="checkpoint_export-", dir=args.dir) as scratch:
        home = Path(scratch)
        make_checkpoints(model, home, wanted)

        def runner(exporter: Exporter) -> Callable[[], float]:
            def once() -> float:
                found[exporter.label].append(run(exporter, home))
                check_model(home / "out", model)
                return found[exporter.label][-1].seconds

            return once

        interleave(
            {each.label: runner(each) for each in exporters},
            rounds=2 if args.quick else 4,
            say=lambda text: progress(f"export, {text}"),
        )
    shape = f"{describe(model, 'float32', RANKS)}, one file"
    for label, runs in found.items():
        progress(f"{label}: {[(round(r.seconds, 2), r.peak_bytes // MIB) for r in runs]}\n")
    complete = not args.only
    # Of a small model the libraries are most of what is resident.
    bar = None if args.quick else "<=0.3"
    return finish(rows_of(found, shape, bar=bar) if complete else [], args, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
