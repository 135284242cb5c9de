"""Worlds of processes for the pipeline benches: each rank builds what it is told and obeys.

As `workers`, but what a rank builds is a function of its rank, and a world may have any number of
threads a process. Everything runs on CPU over gloo.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workers
from workload import Shape

NO_SHAPE = Shape(0, 0, 0, 0, 0, 0, 0)
"""For worlds that train no Llama."""


class Task(NamedTuple):
    """What one world does."""

    name: str
    ranks: int
    build: Callable[[int], Any]
    """rank -> an object whose methods are the commands that the rank obeys."""
    threads: int = 1
    """Compute threads of each process."""
    urgent: bool = False
    """Whether ranks run before everything else on the machine; needs the right to."""


def _environment(ranks: int, rank: int) -> None:
    # DS_ACCELERATOR: deepspeed picks its accelerator when it is imported.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )


def _child(task: Task, rank: int, store: str, log: str, pipe: Connection) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        torch.set_num_threads(task.threads)
        if task.urgent:
            # Threads that are started later inherit it.
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        if task.ranks > 1:
            _environment(task.ranks, rank)
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=task.ranks
            )
        built = task.build(rank)
        pipe.send(("ok", None))
        while (command := pipe.recv())[0] != "stop":
            pipe.send(("ok", getattr(built, command[0])(*command[1:])))
    except BaseException:  # noqa: BLE001  # whatever it was, the parent must hear of it
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
    # No orderly shutdown: the last barrier of a process group would need every rank alive.
    os._exit(0)


class World(workers.Group):
    """The parent's side of one task."""

    def __init__(self, task: Task, scratch: Path) -> None:
        # For the group's messages; not super().__init__, which starts ranks of another kind.
        self.job = workers.Job(task.name, NO_SHAPE, "float32", task.ranks)
        stem = f"{task.name.replace(' ', '_')}-{time.monotonic_ns()}"
        self._logs = [scratch / f"{stem}.{rank}.log" for rank in range(task.ranks)]
        context: Any = mp.get_context("fork")
        self._pipes = []
        self._processes = []
        for rank in range(task.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_child,
                args=(task, rank, str(scratch / f"{stem}.store"), str(self._logs[rank]), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def ask(self, command: str, *args: Any) -> list[Any]:
        """Run a command on every rank at once; give their answers in rank order."""
        for pipe in self._pipes:
            pipe.send((command, *args))
        return self._collect()


@contextlib.contextmanager
def worlds(tasks: list[Task]) -> Iterator[dict[str, World]]:
    """Start one world per task, wait until all are built, and end them on the way out."""
    with tempfile.TemporaryDirectory() as scratch:
        started: dict[str, World] = {}
        try:
            for task in tasks:
                started[task.name] = World(task, Path(scratch))
                # One at a time: building is the memory peak, and two cores gain nothing from more.
                started[task.name].ready()
            yield started
        finally:
            for world in started.values():
                world.stop()


def _spin() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in range(1_000_000):
            pass


@contextlib.contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core from going to sleep, by processes that run only where nothing else would.

    Stages that sleep leave cores idle; a core that idles takes a while to wake, in a virtual
    machine a part of a millisecond, which stages that compute would never meet.
    """
    context: Any = mp.get_context("fork")
    spinners = [context.Process(target=_spin, daemon=True) for _ in os.sched_getaffinity(0)]
    for each in spinners:
        each.start()
    try:
        yield
    finally:
        for each in spinners:
            os.kill(each.pid, signal.SIGKILL)
            each.join()
