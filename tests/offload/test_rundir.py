"""A killed run leaves nothing that a later one keeps or reads; a living one is let be."""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from hf_speed.errors import OffloadError
from hf_speed.offload import DiskStore, rundir
from hf_speed.offload.rundir import LOCK, PREFIX, RunDirectory

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import sys, torch
from hf_speed.offload import DiskStore
store = DiskStore([sys.argv[1]])
store.allocate("row", 1 << 20, torch.float32)
store.commit("row", torch.ones(1 << 20))
print("open", flush=True)
sys.stdin.read()
"""


def _start(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_killed_run_is_cleared_by_the_next_and_a_living_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, living = _start(tmp_path), _start(tmp_path)
    try:
        before = set(tmp_path.iterdir())
        assert len(before) == 2
        assert all([file.name for file in each.iterdir()] == [LOCK] for each in before)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        with caplog.at_level(logging.INFO):
            store = DiskStore([tmp_path])
        removed = before - set(tmp_path.iterdir())
        assert len(removed) == 1
        assert f"removed {removed.pop()}, which a run that has ended left behind" in caplog.text
        store.allocate("row", 1 << 20, torch.float32)
        out = torch.ones(1 << 20)
        store.fetch("row", out).wait()
        assert not out.any()
        store.close()
        assert len(set(tmp_path.iterdir())) == 1
        assert living.poll() is None
    finally:
        _end(killed)
        _end(living)
    RunDirectory(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_share_a_path_and_a_process(tmp_path: Path) -> None:
    first, second = DiskStore([tmp_path]), DiskStore([tmp_path, tmp_path])
    for store, number in ((first, 1.0), (second, 2.0)):
        store.allocate("row", 10_000, torch.float32)
        store.commit("row", torch.full((10_000,), number))
    assert len(list(tmp_path.iterdir())) == 3
    second.close()
    out = torch.empty(10_000)
    first.fetch("row", out).wait()
    assert (out == 1).all()
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    store = DiskStore([tmp_path])
    store.allocate("row", 10_000, torch.float32)
    store.commit("row", torch.ones(10_000))
    del store
    assert list(tmp_path.iterdir()) == []


def _dead(path: Path, name: str) -> Path:
    directory = path / f"{PREFIX}{name}"
    directory.mkdir()
    (directory / LOCK).touch()
    return directory


def test_what_a_run_left_half_made_or_half_removed_goes(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}empty").mkdir()
    (_dead(tmp_path, "early") / "part0").write_text("killed before it was unlinked")
    RunDirectory(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_run_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / f"{PREFIX}notes.txt").write_text("a file")
    unlocked = tmp_path / f"{PREFIX}unlocked"
    unlocked.mkdir()
    (unlocked / "data").write_text("no lock, so not made here")
    nested = _dead(tmp_path, "nested")
    (nested / "folder").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    before = {path.name for path in tmp_path.iterdir()}
    with caplog.at_level(logging.INFO):
        RunDirectory(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (unlocked / "data").exists()
    assert caplog.text.count("as it is: ") == 2
    assert f"left {nested} as it is: " in caplog.text


def test_a_directory_that_a_sweep_takes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other run comes between mkdir and the lock, then between the lock file and the lock.
    real, calls = rundir._open_lock, []

    def swept(directory: Path, flags: int) -> int | None:
        if not flags & os.O_CREAT:
            return real(directory, flags)
        calls.append(directory)
        if len(calls) == 1:
            rundir.remove_dead(tmp_path)
        if len(calls) == 2:
            lock = real(directory, flags)
            assert lock is not None
            rundir._empty(directory)
            return lock
        if len(calls) == 3:
            (directory / LOCK).touch()
            with (directory / LOCK).open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                found = real(directory, flags)
            rundir.remove_dead(tmp_path)
            return found
        return real(directory, flags)

    monkeypatch.setattr(rundir, "_open_lock", swept)
    made = RunDirectory(tmp_path)
    assert len(calls) == 4
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]
    made.close()


def test_many_that_start_at_once_do_not_take_each_others_directories(tmp_path: Path) -> None:
    made: list[RunDirectory] = []
    failures: list[BaseException] = []

    def start() -> None:
        try:
            made.extend(RunDirectory(tmp_path) for _ in range(20))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {path.name for path in tmp_path.iterdir()} == {each.path.name for each in made}
    assert all((each.path / LOCK).exists() for each in made)
    for each in made:
        each.close()
    assert list(tmp_path.iterdir()) == []


def test_a_fork_that_ends_leaves_its_parents_directory(tmp_path: Path) -> None:
    made = RunDirectory(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
        child = os.fork()
    if child == 0:
        made.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert made.path.is_dir()
    made.close()
    assert not made.path.exists()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, flags: int) -> None:
        raise OSError(37, "No locks available", fd, flags)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        OffloadError, match="its file system has no file locks, which keep two runs"
    ):
        RunDirectory(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(directory: Path, flags: int) -> int | None:
        del flags
        directory.rmdir()
        raise FileNotFoundError

    monkeypatch.setattr(rundir, "_open_lock", swept)
    with pytest.raises(OffloadError, match=r"another run removed 16 new directories. Name another"):
        RunDirectory(tmp_path)


def test_a_place_where_nothing_works_says_what_the_system_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, flags: int) -> None:
        del fd, flags
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OffloadError, match=r"cannot use .*: Input/output error. Name another dir"):
        RunDirectory(tmp_path)
