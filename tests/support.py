"""Running one test function on several ranks.

    def _scaled_rank(scale: float) -> float: ...     # module-level: it is pickled by name
    assert run_ranks(_scaled_rank, 2, 10.0) == [0.0, 10.0]

Ranks are forked from a server process that has imported torch and transformers once
(multiprocessing's `forkserver`), so a world costs tens of milliseconds rather than seconds. They
meet through a FileStore: no port, no clash between test runs. Still, put several cases in one world
where that reads well.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

GRACE_S = 20.0
"""Seconds that the other ranks get to report after one has failed."""


class RankError(AssertionError):
    """At least one rank failed; the message holds the report of every rank that did."""

    def __init__(self, reports: Mapping[int, str]) -> None:
        """Join `reports`, rank to traceback."""
        self.reports = dict(reports)
        super().__init__(
            "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(self.reports.items()))
        )


class _World(NamedTuple):
    """What a child needs to know besides the function."""

    directory: str
    world_size: int
    backend: str | None
    timeout_s: float
    environment: dict[str, str]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout_s: float = 120.0,
    backend: str | None = "gloo",
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run `fn(*args)` on `world_size` ranks and return their results in rank order.

    The function finds its place with `torch.distributed.get_rank()`, or in RANK, WORLD_SIZE and
    LOCAL_RANK.

    Args:
        fn: a module-level function; its result goes through `torch.save`.
        world_size: number of processes, at least 1.
        *args: passed to `fn`; pickled.
        timeout_s: wall-clock limit; then the stack of every rank still running is reported.
        backend: of the default process group; None: `fn` makes its own, or has none.
        env: variables set in every rank before `fn` runs.

    Raises:
        RankError: a rank raised, died, or was still running at the limit.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        world = _World(directory, world_size, backend, timeout_s, {**os.environ, **(env or {})})
        processes = [
            _context().Process(target=_child, args=(fn, rank, world, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, deadline=time.monotonic() + timeout_s)
        _stop(processes)
        reports = {
            rank: _report(Path(directory), rank, process.exitcode)
            for rank, process in enumerate(processes)
        }
        failures = {rank: text for rank, text in reports.items() if text}
        if failures:
            raise RankError(failures)
        # The files were written by this test's own ranks a moment ago.
        return [
            torch.load(Path(directory) / f"result-{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _wait(processes: list[ForkServerProcess], *, deadline: float) -> None:
    """Return when all have ended, at the deadline, or a grace after the first failure."""
    while running := [process for process in processes if process.is_alive()]:
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            return
        running[0].join(timeout=0.02)


def _stop(processes: list[ForkServerProcess]) -> None:
    """Have the ranks still running write their stacks, then end them."""
    running = [process for process in processes if process.is_alive()]
    for process in running:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    if running:
        time.sleep(0.5)
    for process in running:
        process.kill()
    for process in processes:
        process.join()


def _report(directory: Path, rank: int, exit_code: int | None) -> str:
    """What went wrong on `rank`; empty if nothing did."""
    error = directory / f"error-{rank}"
    if error.exists():
        return error.read_text()
    if exit_code == 0:
        return ""
    stack = directory / f"stack-{rank}"
    text = stack.read_text() if stack.exists() else ""
    return f"still running, stopped here:\n{text}" if text else f"died with exit code {exit_code}"


def _child(fn: Callable[..., Any], rank: int, world: _World, args: tuple[Any, ...]) -> None:
    directory = Path(world.directory)
    stack = (directory / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    _set_environment(rank, world)
    torch.set_num_threads(1)
    # As in pytest's own process: what hf_speed causes to warn fails the test.
    warnings.filterwarnings("error", module=r"hf_speed\.")
    try:
        if world.backend is not None:
            store = dist.FileStore(str(directory / "store"), world.world_size)
            timeout = timedelta(seconds=world.timeout_s)
            dist.init_process_group(
                world.backend, store=store, rank=rank, world_size=world.world_size, timeout=timeout
            )
            # A rank that fails at once must not end while another still connects to it.
            dist.barrier()
        torch.save(fn(*args), directory / f"result-{rank}")
    except BaseException:  # noqa: BLE001  SystemExit included: what ended the rank is its report.
        (directory / f"error-{rank}").write_text(traceback.format_exc())
        # Not sys.exit: destroying the group could wait for ranks that never come.
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_environment(rank: int, world: _World) -> None:
    # The server keeps the environment of its first use; a test may have set its own since.
    os.environ.clear()
    os.environ.update(world.environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_WORLD_SIZE=str(world.world_size),
    )
    if world.backend == "gloo":
        os.environ["ACCELERATE_USE_CPU"] = "1"


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory, mounted where `directory` is made; skips without mount.

    Args:
        directory: does not exist yet.
        size: as mount takes it: bytes, "8m".
    """
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk needs the mount command")
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs a mount of tmpfs: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
