"""Groups of worker processes, one group per system, which wait idle until they are told to train.

A group is N processes with their own process group (gloo over a file store on CPU; no TCP store, so
that nothing but training crosses the network). The parent speaks to them over pipes, so its
commands are not network traffic either. Groups are forked from a parent that has imported the
libraries but started no thread.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import census
import peers
import torch
from workload import Shape, make_batch

REPLY_S = 600.0


class Job(NamedTuple):
    """What one group trains."""

    system: str
    shape: Shape
    dtype: str
    ranks: int
    device: str = "cpu"


class WorkerError(RuntimeError):
    """A worker process died or raised; the message has its traceback and the end of its output."""


class _Worker:
    """The child's side: builds the system, then obeys commands until `stop`."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job = job
        self.ids = make_batch(job.shape, rank, job.device)
        self.before = census.live_bytes()
        self.system = peers.build(job.system, job.shape, job.dtype, job.device)

    def steps(self, count: int) -> tuple[float, float, float]:
        """Train `count` steps; give (seconds, CPU seconds of this process, last loss)."""
        self._sync()
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            loss = self.system.backward(self.ids)
            self.system.update()
        self._sync()
        return time.perf_counter() - start, time.process_time() - busy, float(loss)

    def memory(self) -> int:
        """Train a step; give the live bytes at the end of its backward."""
        self.system.backward(self.ids)
        alive = census.live_bytes(self.system.model) - self.before
        self.system.update()
        return alive

    def _sync(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()


def _environment(job: Job, rank: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.ranks),
        LOCAL_WORLD_SIZE=str(job.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        GLOO_SOCKET_IFNAME="lo",
    )
    if job.device == "cpu":
        # Before deepspeed is imported: it picks its accelerator at import time.
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")


def _child(job: Job, rank: int, store: str, log: str, pipe: Connection) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        _environment(job, rank)
        threads = 1 if job.device == "cpu" else (os.cpu_count() or 1)
        torch.set_num_threads(threads)
        if job.ranks > 1 or job.system.startswith("deepspeed"):
            torch.distributed.init_process_group(
                "nccl" if job.device == "cuda" else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=job.ranks,
            )
        else:
            # One process: the size-1 path, with no process group at all.
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name)
        worker = _Worker(job, rank)
        pipe.send(("ok", None))
        while (command := pipe.recv())[0] != "stop":
            pipe.send(("ok", getattr(worker, command[0])(*command[1:])))
    except BaseException:  # noqa: BLE001  # whatever it was, the parent must hear of it
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
    # No orderly shutdown: the last barrier of a process group would need every rank alive.
    os._exit(0)


class Group:
    """The parent's side of one job: starts its ranks, sends commands, collects their answers."""

    def __init__(self, job: Job, scratch: Path) -> None:
        self.job = job
        stem = f"{job.system.partition(':')[0]}-{job.dtype}-{job.ranks}-{time.monotonic_ns()}"
        self._logs = [scratch / f"{stem}.{rank}.log" for rank in range(job.ranks)]
        start = "spawn" if job.device == "cuda" else "fork"
        context: Any = mp.get_context(start)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(job.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_child,
                args=(job, rank, str(scratch / f"{stem}.store"), str(self._logs[rank]), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def ready(self) -> None:
        """Wait until every rank has built its system."""
        self._collect()

    def call(self, name: str, *args: int) -> list[Any]:
        """Run a command on every rank at once; give their answers in rank order."""
        for pipe in self._pipes:
            pipe.send((name, *args))
        return self._collect()

    def seconds_per_step(self, count: int) -> float:
        """Train `count` steps and give the slowest rank's seconds per step."""
        return max(answer[0] for answer in self.call("steps", count)) / count

    def cpu_seconds_per_step(self, count: int) -> float:
        """Train `count` steps and give the busiest rank's CPU seconds per step."""
        return max(answer[1] for answer in self.call("steps", count)) / count

    def stop(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("stop",))
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()

    def _collect(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(REPLY_S):
                    raise WorkerError(self._story(rank, f"no answer within {REPLY_S:.0f} s"))
                status, value = pipe.recv()
            except EOFError as error:
                raise WorkerError(self._story(rank, "the process died")) from error
            if status == "error":
                raise WorkerError(self._story(rank, value))
            answers.append(value)
        return answers

    def _story(self, rank: int, what: str) -> str:
        log = self._logs[rank]
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        who = f"{self.job.system}, rank {rank} of {self.job.ranks}"
        return f"{who}: {what}\n--- its output ---\n{tail}"


@contextlib.contextmanager
def groups(jobs: list[Job]) -> Iterator[dict[str, Group]]:
    """Start one group per job, wait until all are built, and end them on the way out."""
    with tempfile.TemporaryDirectory() as scratch:
        started: dict[str, Group] = {}
        try:
            for job in jobs:
                started[job.system] = Group(job, Path(scratch))
                # One at a time: building is the memory peak, and two cores gain nothing from more.
                started[job.system].ready()
            yield started
        finally:
            for group in started.values():
                group.stop()
