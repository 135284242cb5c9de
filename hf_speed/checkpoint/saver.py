"""When the work of a save runs, and when its failure is told.

    save = saver.begin("Saving out/checkpoint-10")    every rank; waits for the save before
    save.submit(job)                                  runs here; or behind, after those before
    saver.check()                                     every rank, at each optimizer step
    saver.wait()                                      every rank, until nothing is in flight

The jobs are the same in both modes. Behind, they run on a thread and agree over a process group of
their own, so that their collectives never mix with those of the training.

A failure behind is agreed on by the threads, but the training of one rank may be a step ahead of
another's. So the threads also exchange how many checks their ranks have begun, while `check` of a
rank that would begin another waits: the largest number plus one is a check that is still to come on
every rank, and there all of them raise. No rank is left waiting in a collective of the training.

The thread is no daemon: the interpreter ends after it. It lives for the jobs at hand only.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.held import Held
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.written import FullWeights, WrittenFiles
from hf_speed.errors import CheckpointError, HfSpeedError
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import highest

_log = get_logger(__name__)


class _Job(NamedTuple):
    run: Callable[[], object]
    save: "Save"


class Save:
    """One save. Its jobs run in the order of submission; after one that fails none does."""

    def __init__(self, saver: "Saver", what: str) -> None:
        """Made by `Saver.begin`."""
        self.what = what
        """Names the work and its directory in errors."""
        self.has_failed = False
        self.written = WrittenFiles()
        """Checksums of the model's files, from the job that writes them to that of the manifest."""
        self.full_weights: dict[Path, FullWeights] = {}
        """Directory -> what need not be stored there again, as the writer of the model says."""
        self._saver = saver

    @property
    def is_behind(self) -> bool:
        """Whether jobs run later, so that they must own what they write."""
        return self._saver.is_behind

    @property
    def group(self) -> AxisGroup:
        """The ranks, as jobs must talk to them."""
        return self._saver.group

    def hold(self, value: Tensor, name: str, owners: Sequence[Tensor] = ()) -> Held:
        """A tensor that a job of this save will read; `Saver.secure` keeps it from changing."""
        held = Held(value, name, owners)
        if self.is_behind:
            self._saver.held.append(held)
        return held

    @contextmanager
    def together(self) -> Iterator[None]:
        """Jobs queued inside start on leaving: what the caller writes itself comes before them.

        On a disk that is almost full that decides who fails.
        """
        self._saver.is_paused = True
        try:
            yield
        finally:
            self._saver.start()

    def submit(self, run: Callable[[], object]) -> None:
        """Run a job now, or queue it.

        Args:
            run: collective over `group`; every rank submits the same jobs in the same order. It
                frees what it holds as it goes along, and owns it where `is_behind`.

        Raises:
            CheckpointError: on every rank, where it runs now and fails.
        """
        self._saver.submit(_Job(run, self))


class Saver:
    """Runs the saves of a run, one at a time.

    Args:
        group: all ranks that save. Behind: a gloo group that nothing else uses.
        is_behind: run jobs on a thread.
    """

    def __init__(self, group: AxisGroup, *, is_behind: bool) -> None:
        self.group = group
        self.is_behind = is_behind
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._num_checks = 0
        self._is_settling = False
        self._failure: BaseException | None = None
        self._raise_at = 0
        self.is_paused = False
        """Whether jobs wait in the queue for `start`."""
        self.held: list[Held] = []
        """What is still to be read of the save in flight, for all that `secure` knows."""

    def secure(self) -> None:
        """From now on the training may change what the save in flight has still to read."""
        held, self.held = self.held, []
        for each in held:
            each.secure()

    def begin(self, what: str) -> Save:
        """Start a save; blocks while another is in flight. Every rank calls it.

        Raises:
            CheckpointError: on every rank, if that one failed.
        """
        self.wait()
        self.held.clear()
        return Save(self, what)

    def submit(self, job: _Job) -> None:
        """See `Save.submit`."""
        if not self.is_behind:
            job.run()
            return
        with self._changed:
            if job.save.has_failed:
                return
            self._jobs.append(job)
        if not self.is_paused:
            self.start()

    def start(self) -> None:
        """Have the jobs run that are queued; pauses no more."""
        with self._changed:
            self.is_paused = False
            if self._jobs and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hf_speed-saver")
                self._thread.start()

    def check(self) -> None:
        """Raise the failure of a save, at the same call on every rank.

        Call it equally often on every rank, at points where raising is safe: before a step.
        It waits only while the threads exchange a failure.

        Raises:
            CheckpointError: a save has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_settling)
            self._num_checks += 1
            if self._failure is None or self._num_checks < self._raise_at:
                return
        self._raise()

    def wait(self) -> None:
        """Block until nothing is in flight. Every rank calls it.

        Raises:
            CheckpointError: on every rank, if a save has failed.
        """
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
            if self._failure is None:
                return
        self._raise()

    def _raise(self) -> None:
        with self._changed:
            failure, self._failure = self._failure, None
        raise CheckpointError(f"{failure} It was written behind the training.") from failure

    def _work(self) -> None:
        # Grad mode belongs to a thread.
        with torch.no_grad():
            while (job := self._next()) is not None:
                try:
                    with agreed(self.group, job.save.what):
                        job.run()
                except BaseException as error:  # noqa: BLE001 - raised by check() or wait()
                    self._settle(error, job.save)
                # What it held is freed before the next one is waited for.
                del job

    def _next(self) -> _Job | None:
        with self._changed:
            if self._jobs:
                return self._jobs.popleft()
            self._thread = None
            self._changed.notify_all()
            return None

    def _settle(self, failure: BaseException, save: Save) -> None:
        """Find the check at which all ranks raise."""
        with self._changed:
            self._is_settling = True
            self._jobs.clear()
            save.has_failed = True
            begun = self._num_checks
        # Logged too: a process that ends now makes no more checks.
        _log.error("%s failed behind the training: %s", save.what, failure)
        try:
            raise_at = highest(begun, group=self.group) + 1
        except HfSpeedError:
            raise_at = 0  # A rank is gone: there is nobody to raise together with.
        with self._changed:
            self._failure, self._raise_at = failure, raise_at
            self._is_settling = False
            self._changed.notify_all()
