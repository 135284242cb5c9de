"""One thread that writes while the caller gathers the next tensor, with a limit on what waits."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self


class _Job(NamedTuple):
    run: Callable[[], None]
    nbytes: int


class BackgroundWriter:
    """Runs jobs in order on one thread; `submit` blocks while more than `limit_bytes` wait.

    A job that fails ends the thread's work: later jobs are dropped, and the error is raised by the
    next `submit` or on leaving the `with` block, which waits for all jobs.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        """Start nothing yet; `with` starts the thread."""
        self._limit_bytes = limit_bytes
        self._waiting_bytes = 0
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="hf_speed-writer", daemon=True)

    def submit(self, run: Callable[[], None], *, nbytes: int) -> None:
        """Queue a job that holds `nbytes` of memory until it is done.

        Raises:
            Exception: what an earlier job raised.
        """
        with self._changed:
            # One job always fits, however large.
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or self._waiting_bytes == 0
                    or self._waiting_bytes + nbytes <= self._limit_bytes
                )
            )
            if self._error is not None:
                raise self._error
            self._waiting_bytes += nbytes
            self._jobs.append(_Job(run, nbytes))
            self._changed.notify_all()

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the jobs (drop them where the block failed), end the thread, raise its error."""
        with self._changed:
            if error is not None:
                self._jobs.clear()
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            # Freed before the bytes are: the caller may fill them at once.
            nbytes = job.nbytes
            del job
            with self._changed:
                self._waiting_bytes -= nbytes
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._closing)
            return self._jobs.popleft() if self._jobs else None
