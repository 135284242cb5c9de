"""The writing thread: order, its limit on memory, and errors that reach the caller."""

import threading

import pytest

from hf_speed.checkpoint.background import BackgroundWriter


def test_jobs_run_in_order_and_are_waited_for() -> None:
    done: list[int] = []
    with BackgroundWriter(limit_bytes=10) as writer:
        for index in range(20):
            writer.submit(lambda index=index: done.append(index), nbytes=4)
    assert done == list(range(20))


def test_submit_waits_while_the_limit_is_reached() -> None:
    gate = threading.Event()
    entered = threading.Event()
    with BackgroundWriter(limit_bytes=10) as writer:
        writer.submit(gate.wait, nbytes=8)

        def second() -> None:
            writer.submit(lambda: None, nbytes=8)
            entered.set()

        caller = threading.Thread(target=second)
        caller.start()
        assert not entered.wait(0.1)
        gate.set()
        assert entered.wait(10)
        caller.join()


def test_one_job_larger_than_the_limit_runs() -> None:
    done: list[int] = []
    with BackgroundWriter(limit_bytes=1) as writer:
        writer.submit(lambda: done.append(1), nbytes=100)
    assert done == [1]


def _fail() -> None:
    raise OSError("no space")


def test_error_of_a_job_is_raised_on_exit_and_drops_later_jobs() -> None:
    gate = threading.Event()
    done: list[int] = []

    def fail_late() -> None:
        gate.wait()
        _fail()

    def write() -> None:
        with BackgroundWriter(limit_bytes=10) as writer:
            writer.submit(fail_late, nbytes=1)
            writer.submit(lambda: done.append(1), nbytes=1)
            gate.set()

    with pytest.raises(OSError, match="no space"):
        write()
    assert done == []


def test_error_of_a_job_frees_a_waiting_submit() -> None:
    gate = threading.Event()

    def fail_late() -> None:
        gate.wait()
        _fail()

    def write() -> None:
        with BackgroundWriter(limit_bytes=10) as writer:
            writer.submit(fail_late, nbytes=8)
            threading.Timer(0.05, gate.set).start()
            writer.submit(lambda: None, nbytes=8)

    with pytest.raises(OSError, match="no space"):
        write()
