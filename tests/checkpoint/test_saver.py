"""Saves that run behind the training: order, back-pressure, and failures told at one step."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_speed.checkpoint import LocalState, ModelPlan, PlannedFile, TensorGroup, TensorSpec
from hf_speed.checkpoint.saver import Saver
from hf_speed.checkpoint.snapshot import copy_parameters, copy_states
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import RankError, run_ranks


def test_jobs_run_in_order_and_the_next_save_waits_for_them() -> None:
    saver = Saver(IDENTITY, is_behind=True)
    gate, done = threading.Event(), []
    save = saver.begin("Saving a")
    save.submit(lambda: (gate.wait(10), done.append(1)))
    save.submit(lambda: done.append(2))
    saver.check()
    assert done == []
    threading.Timer(0.05, gate.set).start()
    saver.begin("Saving b").submit(lambda: done.append(3))
    assert done[:2] == [1, 2]
    saver.wait()
    assert done == [1, 2, 3]


def test_a_failed_save_runs_no_further_job_and_is_told_once() -> None:
    saver = Saver(IDENTITY, is_behind=True)
    gate, done = threading.Event(), []

    def fail() -> None:
        gate.wait(10)
        raise OSError(28, "No space left on device")

    save = saver.begin("Saving out/checkpoint-10")
    save.submit(fail)
    save.submit(lambda: done.append(1))
    gate.set()
    with pytest.raises(
        CheckpointError, match=r"out/checkpoint-10 failed on rank 0: .*No space"
    ) as e:
        _check_until_told(saver)
    assert "behind the training" in str(e.value)
    save.submit(lambda: done.append(2))
    saver.wait()
    saver.check()
    assert done == []
    saver.begin("Saving again").submit(lambda: done.append(3))
    saver.wait()
    assert done == [3]


def _check_until_told(saver: Saver) -> None:
    while True:
        saver.check()


@pytest.mark.parametrize("call", ["wait", "begin"])
def test_a_failure_is_told_by_whatever_waits_first(call: str) -> None:
    saver = Saver(IDENTITY, is_behind=True)
    saver.begin("Saving").submit(_raise)
    with pytest.raises(CheckpointError, match="boom"):
        saver.wait() if call == "wait" else saver.begin("Saving again")


def _raise() -> None:
    raise ValueError("boom")


def test_at_once_a_job_runs_here_and_raises_here() -> None:
    save = Saver(IDENTITY, is_behind=False).begin("Saving")
    threads: list[threading.Thread] = []
    save.submit(lambda: threads.append(threading.current_thread()))
    assert threads == [threading.main_thread()]
    with pytest.raises(ValueError, match="boom"):
        save.submit(_raise)


def _world() -> AxisGroup:
    return AxisGroup(dist.get_world_size(), dist.get_rank(), dist.new_group(), "saves")


def _failing_rank(num_trials: int) -> list[tuple[int, bool]]:
    """In each trial: the check that raised, of a training whose ranks drift apart."""
    saver = Saver(_world(), is_behind=True)
    rank, found = dist.get_rank(), []
    for trial in range(num_trials):
        chance = random.Random(1000 * trial + rank)
        culprit = trial % dist.get_world_size()

        def job(trial: int = trial, culprit: int = culprit, chance: random.Random = chance) -> None:
            time.sleep(chance.random() * 0.01)
            if rank == culprit:
                raise OSError(f"trial {trial}")

        save = saver.begin(f"Saving {trial}")
        save.submit(lambda chance=chance: time.sleep(chance.random() * 0.005))
        save.submit(job)
        step = 0
        try:
            while True:
                saver.check()
                # As an optimizer's step; one that a rank alone skips would hang the others.
                if step % 3 == 0:
                    dist.all_reduce(torch.zeros(1))
                time.sleep(chance.random() * 0.003)
                step += 1
        except CheckpointError as error:
            found.append((step, f"rank {culprit}: OSError: trial {trial}" in str(error)))
        dist.barrier()
    return found


def test_a_failure_on_one_rank_is_raised_at_the_same_step_on_all() -> None:
    one, two, three = run_ranks(_failing_rank, 3, 12, timeout_s=60)
    assert one == two == three
    assert all(told for _, told in one)
    assert len({step for step, _ in one}) > 1


def _killed_rank() -> None:
    saver = Saver(_world(), is_behind=True)

    def job() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    saver.begin("Saving to out").submit(job)
    while True:
        saver.check()
        time.sleep(0.001)


def test_a_rank_that_is_killed_while_saving_fails_the_step_of_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_killed_rank, 2, timeout_s=60)
    assert "exit code -9" in caught.value.reports[1]
    assert "Saving to out did not finish: a rank is gone" in caught.value.reports[0]


def _end_at_once(path: str) -> None:
    def job() -> None:
        time.sleep(0.3)
        Path(path).write_text("whole")

    Saver(IDENTITY, is_behind=True).begin("Saving").submit(job)


def test_a_process_that_ends_ends_after_its_save(tmp_path: Path) -> None:
    run_ranks(_end_at_once, 1, str(tmp_path / "file"), backend=None)
    assert (tmp_path / "file").read_text() == "whole"


def test_a_copy_is_of_what_this_rank_writes_and_keeps_its_values() -> None:
    specs = [TensorSpec(name, (3,), torch.bfloat16) for name in "abc"]
    files = (PlannedFile("1", (specs[0],)), PlannedFile("2", (specs[1],)), PlannedFile("3", ()))
    groups = (
        TensorGroup(("a",), ("a",), is_rename=True),
        TensorGroup(("b0", "b1"), ("b",), is_rename=False),
    )
    plan = ModelPlan(files, groups, dict, {"a2": "a"}, 9)
    values = {name: torch.full((3,), 1.25) for name in ("a2", "b0", "b1")}
    copied = {
        rank: copy_parameters(values.items(), plan, world=AxisGroup(2, rank, None))
        for rank in (0, 1)
    }
    for value in values.values():
        value.fill_(7.0)
    first, second = dict(copied[0]), dict(copied[1])
    assert list(first) == list(second) == ["a2", "b0", "b1"]
    # One tensor to one: in the dtype of the file. What is converted first stays as it is.
    assert torch.equal(first["a2"], torch.full((3,), 1.25, dtype=torch.bfloat16))
    assert second["a2"].is_meta
    assert first["b0"].is_meta
    assert torch.equal(second["b1"], torch.full((3,), 1.25))
    assert list(copied[0]) == []


def test_a_copy_of_states_keeps_their_values() -> None:
    value = torch.arange(4.0)
    copied = copy_states([LocalState("w", "exp_avg", (4,), 0, 4, value)])
    value.zero_()
    (state,) = copied
    assert torch.equal(state.value, torch.arange(4.0))
