"""The harness: results in rank order, a report of every rank that fails, dies or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support import RankError, run_ranks


def _sum_of_ranks(scale: float) -> torch.Tensor:
    value = torch.tensor([scale * (dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value + dist.get_rank()


def _misbehave(how: str) -> None:
    if dist.get_rank() == 0:
        return
    if how == "raise":
        raise ValueError("from rank 1")
    if how == "die":
        os._exit(7)
    time.sleep(600)


def _variable(name: str) -> str:
    return f"{os.environ[name]} {os.environ['RANK']}"


def test_results_come_back_in_rank_order() -> None:
    assert [float(value) for value in run_ranks(_sum_of_ranks, 2, 10.0)] == [30.0, 31.0]


def test_environment_reaches_every_rank() -> None:
    assert run_ranks(_variable, 2, "COLOUR", backend=None, env={"COLOUR": "red"}) == [
        "red 0",
        "red 1",
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1.*from rank 1"), ("die", "exit code 7"), ("hang", "in _misbehave")],
)
def test_failing_rank_is_reported(how: str, message: str) -> None:
    with pytest.raises(RankError, match=f"(?s){message}"):
        run_ranks(_misbehave, 2, how, timeout_s=5.0)
