"""Sequential file I/O against fio and against DeepSpeed's async_io handle.

Claims: on one and the same file, direct, 16 blocks of 1 MiB in flight, hf_speed.ops.aio writes and
reads at least 90% of what the best fio does, over io_uring and over threads, and at least as much
as DeepSpeed's handle. `ratio` is ours over theirs.

Each peer at its best, found by a first round with the number of blocks in flight given: fio's
engine (io_uring, libaio), block size, and memory of ordinary or of huge pages (through glibc's
tunable); DeepSpeed's number of threads. fio moves everything through 16 MiB of memory, which stay
in the processor's cache, so beside it ours does too; DeepSpeed waits at the end of each request, so
it gets requests of 128 MiB, and so does ours beside it. DeepSpeed's memory is what it locks itself.

The file has no name: the peers open it through /proc. It is written once in full before anything is
timed, since reading space that was only reserved costs nothing. Rows without a bar: memory that is
not aligned, hence copied.

Use --dir to name a directory on the disk to be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from common import Row, finish, interleave, make_row, parser, progress
from torch import Tensor

from hf_speed.ops.aio import AioFile, AioQueue, aligned_empty

MIB = 1 << 20
DEPTH = 16
BLOCK_BYTES = MIB
LARGE_BYTES = 128 * MIB
BARS = {"fio": ">=0.9", "DeepSpeed": ">=1.0"}
VERBS = ("write", "read")
FIO_ENGINES = ("io_uring", "libaio")
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
READ_KIB_S, WRITE_KIB_S = 6, 47
"""Fields of fio's terse output, version 3."""


OURS: tuple[tuple[Literal["io_uring", "threads"], str, bool], ...] = (
    ("io_uring", "fio", False),
    ("threads", "fio", False),
    ("io_uring", "fio", True),
    ("io_uring", "DeepSpeed", False),
    ("threads", "DeepSpeed", False),
)
"""Backend, whom it is compared with, and whether its memory is unaligned."""


class Target(NamedTuple):
    """What is read and written: a file, its name under /proc, its bytes."""

    file: AioFile
    path: str
    nbytes: int


class Fio(NamedTuple):
    """One way to run fio."""

    engine: str
    block_bytes: int
    huge: bool

    def __str__(self) -> str:
        """As rows name it."""
        pages = "huge pages" if self.huge else "4 KiB pages"
        return f"fio ({self.engine}, {self.block_bytes >> 10} KiB, {pages})"


def ours(target: Target, queue: AioQueue, verb: str, buffer: Tensor) -> float:
    """Move `target.nbytes` through `buffer`, request by request; give bytes per second."""
    start = getattr(queue, verb)
    begin = time.perf_counter()
    offsets = range(0, target.nbytes, buffer.nbytes)
    for ticket in [start(target.file, buffer, offset) for offset in offsets]:
        ticket.wait()
    return target.nbytes / (time.perf_counter() - begin)


def run_fio(target: Target, how: Fio, verb: str) -> float:
    """Let fio move `target.nbytes`; give bytes per second.

    Raises:
        RuntimeError: fio failed; the message is its own.
    """
    command = [
        "fio", "--name=bench", f"--filename={target.path}", f"--size={target.nbytes}", "--direct=1",
        "--overwrite=1", "--allow_file_create=0", "--fallocate=none", "--thread", f"--rw={verb}",
        f"--ioengine={how.engine}", f"--bs={how.block_bytes}", f"--iodepth={DEPTH}",
        "--output-format=terse", "--terse-version=3",
    ]  # fmt: skip
    env = {**os.environ, **(HUGE_PAGES if how.huge else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{how} failed: {done.stdout} {done.stderr}")
    fields = done.stdout.splitlines()[-1].split(";")
    return float(fields[WRITE_KIB_S if verb == "write" else READ_KIB_S]) * 1024


def best_fio(target: Target, verb: str, *, quick: bool) -> Fio:
    """Try every way to run fio, twice each, and give the fastest."""
    sizes = (BLOCK_BYTES,) if quick else (BLOCK_BYTES // 4, BLOCK_BYTES, 4 * BLOCK_BYTES)
    ways = [Fio(*each) for each in itertools.product(FIO_ENGINES, sizes, (False, True))]
    found: dict[Fio, list[float]] = {}
    for way in ways * 2:
        with contextlib.suppress(RuntimeError):  # an engine that this fio was built without
            found.setdefault(way, []).append(run_fio(target, way, verb))
        progress(f"{verb}: tried {way}")
    if not found:
        run_fio(target, ways[0], verb)
    return max(found, key=lambda way: statistics.mean(found[way]))


def load_deepspeed(*, quick: bool) -> tuple[Any | None, str]:
    """DeepSpeed's native module and "", or None and the reason; in full runs it may be built."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError:
        return None, "deepspeed is not installed"
    from torch.utils import cpp_extension

    built = any(Path(cpp_extension.get_default_build_root()).rglob("async_io.so"))
    if quick and not built:
        return None, "its async_io is not built yet; a full run builds it (4 minutes)"
    try:
        return AsyncIOBuilder().load(verbose=False), ""
    except Exception as error:  # noqa: BLE001 - whatever the build says is the reason
        return None, f"its async_io does not build: {type(error).__name__}"


def deepspeed_runner(native: Any, target: Target, verb: str, threads: int) -> Callable[[], float]:
    """A runner over DeepSpeed's handle, in memory that it locks itself."""
    single_submit, overlap_events = False, True
    depth = DEPTH // threads
    handle = native.aio_handle(BLOCK_BYTES, depth, single_submit, overlap_events, threads)
    buffer = handle.new_cpu_locked_tensor(LARGE_BYTES, torch.empty(0, dtype=torch.uint8))
    buffer.random_()
    start = handle.async_pwrite if verb == "write" else handle.async_pread

    def run() -> float:
        begin = time.perf_counter()
        offsets = range(0, target.nbytes, buffer.nbytes)
        for offset in offsets:
            start(buffer, target.path, offset)
        if handle.wait() != len(offsets):
            raise RuntimeError("DeepSpeed's handle did not finish what it was given")
        return target.nbytes / (time.perf_counter() - begin)

    return run


def best_deepspeed(native: Any, target: Target, verb: str) -> tuple[str, Callable[[], float]]:
    """Try its handle with one, two and four threads, and give the fastest."""
    found: dict[str, Callable[[], float]] = {}
    for threads in (1, 2, 4):
        found[f"DeepSpeed async_io ({threads} threads)"] = deepspeed_runner(
            native, target, verb, threads
        )
    tried = interleave(found, rounds=2, say=lambda text: progress(f"{verb}: {text}"))
    name = max(tried, key=lambda each: statistics.mean(tried[each]))
    return name, found[name]


def not_run(claim: str, shape: str, peer: str) -> Row:
    """A row for a peer that could not take part."""
    return Row(
        claim, shape, ours=0.0, peer=f"{peer}: not run", theirs=0.0, unit="GB/s", ratio=0.0,
        bar=None, holds=True, runs=0, spread=0.0,
    )  # fmt: skip


def peers_of(
    target: Target, verb: str, shape: str, *, quick: bool
) -> tuple[dict[str, tuple[str, Callable[[], float]]], list[Row]]:
    """The peers that can take part, each at its best, and a row for each that cannot."""
    peers: dict[str, tuple[str, Callable[[], float]]] = {}
    rows: list[Row] = []
    if shutil.which("fio"):
        way = best_fio(target, verb, quick=quick)
        peers["fio"] = str(way), lambda: run_fio(target, way, verb)
    else:
        rows.append(not_run(f"{verb} vs fio", shape, "fio (it is not installed)"))
    native, reason = load_deepspeed(quick=quick)
    if native is not None:
        peers["DeepSpeed"] = best_deepspeed(native, target, verb)
    else:
        rows.append(not_run(f"{verb} vs DeepSpeed", shape, f"DeepSpeed ({reason})"))
    return peers, rows


def measure(target: Target, verb: str, args: argparse.Namespace, shape: str) -> list[Row]:
    """Measure one direction; a peer that is absent gives a row that says why."""
    peers, rows = peers_of(target, verb, shape, quick=args.quick)
    runners = dict(peers.values())
    pairs: list[tuple[str, str, str]] = []
    with contextlib.ExitStack() as stack:
        for backend, peer, unaligned in OURS:
            if peer not in peers:
                continue
            name = f"{backend}{', unaligned' if unaligned else ''}, vs {peer}"
            skip = 64 if unaligned else 0
            nbytes = DEPTH * BLOCK_BYTES if peer == "fio" else LARGE_BYTES
            buffer = aligned_empty(nbytes + skip, torch.uint8).random_()[skip:]
            try:
                queue = AioQueue(depth=DEPTH, backend=backend, block_bytes=BLOCK_BYTES)
            except OSError as error:
                rows.append(not_run(f"{verb}, {name}", shape, f"{backend} ({error.strerror})"))
                continue
            stack.enter_context(contextlib.closing(queue))
            runners[name] = lambda q=queue, b=buffer: ours(target, q, verb, b)
            pairs.append((name, peer, "-" if unaligned else BARS[peer]))
        found = interleave(
            runners, rounds=4 if args.quick else 15, say=lambda text: progress(f"{verb}: {text}")
        )
    for name, peer, bar in pairs:
        label = peers[peer][0]
        claim = f"{verb}, {name}"
        rows.append(
            compare(claim, shape, found[name], label, found[label], bar if bar != "-" else None)
        )
    return rows


def compare(
    claim: str, shape: str, mine: list[float], peer: str, theirs: list[float], bar: str | None
) -> Row:
    """A row of medians, its ratio taken round by round."""
    return make_row(
        claim, shape, ours=statistics.median(mine) / 1e9, peer=peer,
        theirs=statistics.median(theirs) / 1e9, unit="GB/s",
        ratios=[a / b for a, b in zip(mine, theirs, strict=True)], bar=bar,
    )  # fmt: skip


@contextlib.contextmanager
def scratch(directory: Path, nbytes: int) -> Iterator[Target]:
    """A file of `nbytes` without a name, written once."""
    file = AioFile([directory / f"disk_io-{os.getpid()}"], nbytes=nbytes)
    target = Target(file, f"/proc/{os.getpid()}/fd/{file._fds[0]}", nbytes)
    try:
        with contextlib.closing(AioQueue(depth=DEPTH)) as queue:
            ours(target, queue, "write", aligned_empty(LARGE_BYTES, torch.uint8).random_())
        yield target
    finally:
        file.close()


def main() -> int:
    """Run the bench; see the module docstring."""
    made = parser(__doc__ or "", out="disk_io")
    made.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                      help="directory on the disk to be measured")  # fmt: skip
    args = made.parse_args()
    wanted = args.only.split(",") if args.only else list(VERBS)
    rows: list[Row] = []
    with scratch(args.dir, (512 if args.quick else 2048) * MIB) as target:
        kind = subprocess.run(
            ["df", "--output=fstype", str(args.dir)], capture_output=True, text=True, check=False
        ).stdout.split()[-1]
        access = "direct" if target.file.direct else "buffered"
        shape = f"{target.nbytes // MIB} MiB, {DEPTH} x 1 MiB, {access}, {kind}"
        for verb in VERBS:
            if verb in wanted:
                rows += measure(target, verb, args, shape)
    complete = set(wanted) == set(VERBS) and target.file.direct and all(row.runs for row in rows)
    return finish(rows, args, complete=complete)


if __name__ == "__main__":
    raise SystemExit(main())
