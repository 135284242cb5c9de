"""Ranks that fail, die or go their own way: an error on every rank, in time; no hang."""

import os
import signal
import time

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from hf_speed.errors import DivergenceError, MeshError
from tests.engine.toys import (
    Tower,
    assert_same_values,
    mean_over_ranks,
    plain_parameters,
    rank_here,
    speed,
    tower_rows,
    whole_parameters,
)
from tests.support import RankError, run_ranks

STAGES = (0, 1, 2, 3)
TIMEOUT_S = 3.0


class Bomb(nn.Module):
    """Passes its input on, until it is armed; then raises in the forward or the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.armed: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or an exception."""
        if self.armed == "forward":
            raise ValueError("the bomb went off")
        if self.armed == "backward" and x.requires_grad:
            x = x * 1.0
            x.register_hook(self._explode)
        return x

    def _explode(self, gradient: Tensor) -> None:  # noqa: ARG002 - a hook's signature
        raise ValueError("the bomb went off")


def _tower_with_bomb() -> tuple[Tower, Bomb]:
    model = Tower(num_blocks=5)
    bomb = Bomb()
    model.blocks[2].append(bomb)
    return model, bomb


def _good_step_after_exceptions() -> None:
    plain, _ = _tower_with_bomb()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        plain(tower_rows(step)).backward()
        for parameter in plain.parameters():
            mean_over_ranks(parameter.grad)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for stage in STAGES:
        for when in ("forward", "backward"):
            model, bomb = _tower_with_bomb()
            engine = Engine.attach(model, speed(stage))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine.bind_optimizer(optimizer)
            for step in range(2):
                bomb.armed = when
                with pytest.raises(ValueError, match="went off"):
                    engine.backward(model(tower_rows(7)))
                bomb.armed = None
                optimizer.zero_grad()
                engine.backward(model(tower_rows(step)))
                optimizer.step()
                optimizer.zero_grad()
            assert_same_values(
                whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7
            )


def test_a_step_after_an_exception_on_all_ranks_is_a_good_step() -> None:
    run_ranks(_good_step_after_exceptions, 2)


def _train_until_one_fails(stage: int, how: str) -> float:
    model, bomb = _tower_with_bomb()
    engine = Engine.attach(model, speed(stage, debug={"timeout_s": TIMEOUT_S}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.bind_optimizer(optimizer)
    for step in range(4):
        if step == 2 and rank_here() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            bomb.armed = how
        started = time.monotonic()
        try:
            engine.backward(model(tower_rows(step)))
            optimizer.step()
        except MeshError as error:
            raise MeshError(f"after {time.monotonic() - started:.1f} s: {error}") from None
        optimizer.zero_grad()
    raise AssertionError("nobody failed")


@pytest.mark.parametrize(
    ("stage", "how"), [(0, "killed"), (2, "backward"), (3, "forward"), (3, "killed")]
)
def test_the_others_raise_mesh_error_in_time_when_a_rank_fails(stage: int, how: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_train_until_one_fails, 2, stage, how, timeout_s=60.0)
    assert time.monotonic() - started < 40.0
    reports = caught.value.reports
    assert "MeshError: after" in reports[0]
    waited = float(reports[0].split("MeshError: after ")[1].split(" s")[0])
    assert waited < TIMEOUT_S + 5.0
    assert ("exit code -9" if how == "killed" else "the bomb went off") in reports[1]


def _leave_the_order(how: str) -> str:
    model = Tower()
    engine = Engine.attach(model, speed(3, debug={"timeout_s": TIMEOUT_S, "journal": True}))
    model(tower_rows(0)).backward()
    mine = "outlet.weight" if rank_here() or how == "absent" else "blocks.1.0.weight"
    try:
        if how == "other" or rank_here() == 0:
            engine.get_full_parameter(mine)
        else:
            time.sleep(2 * TIMEOUT_S)
    except DivergenceError as error:
        return str(error)
    return ""


def test_journal_names_ranks_operations_and_callers_that_differ() -> None:
    for message in run_ranks(_leave_the_order, 2, "other"):
        assert "rank 0: all_gather" in message
        assert "rank 1: all_gather" in message
        assert "test_faults.py" in message
        assert "in _leave_the_order" in message


def test_journal_names_the_rank_that_did_not_come() -> None:
    message = run_ranks(_leave_the_order, 2, "absent")[0]
    assert "[1] did not come to all_gather" in message
    assert "within 3 s" in message
    assert "in _leave_the_order" in message
