"""Updates during the backward are plain steps, unless they are asked to be late."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_speed.engine import Engine
from tests.engine.toys import (
    Tower,
    assert_same_values,
    global_batch,
    share,
    speed,
    tower_rows,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NUM_STEPS = 4


class Outcome(NamedTuple):
    """What a run leaves: (steps,) losses, final values, updates accepted and refused."""

    losses: Tensor
    parameters: dict[str, Tensor]
    accepted: int
    refused: int


def _train(
    stage: int,
    offload: dict[str, Any],
    *,
    max_norm: float | None = None,
    decay: float = 1.0,
    dtype: torch.dtype | None = None,
    num_backwards: int = 1,
) -> Outcome:
    """A toy Llama; gradients of `num_backwards` batches add up in each step."""
    with tempfile.TemporaryDirectory() as directory:
        if "disk" in offload.values():
            offload = {"paths": [directory], **offload}
        model = toy_model("llama")
        engine = Engine.attach(model, speed(stage, offload=offload), compute_dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(optimizer)
        losses = []
        for step in range(NUM_STEPS):
            for number in range(num_backwards):
                loss = model(**share(global_batch("llama", step + 10 * number))).loss
                engine.backward(loss)
                losses.append(loss.detach().float())
            if max_norm is not None:
                engine.clip_grad_norm_(max_norm)
            for group in optimizer.param_groups:
                group["lr"] *= decay
            optimizer.step()
            optimizer.zero_grad()
        values = whole_parameters(engine)
        updates = engine.parts.stepper.updates
        background = None if updates is None else updates.background
        counts = (0, 0) if background is None else (background.num_accepted, background.num_refused)
        engine.detach()
    return Outcome(torch.stack(losses), values, *counts)


def _assert_equal(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert_same_values(ours.parameters, theirs.parameters)


def _tiers(tier: str, *kinds: str) -> dict[str, Any]:
    return {"update": "fused", **dict.fromkeys(kinds, tier)}


def _speculate_on_every_tier(stage: int) -> None:
    for tiers in (
        _tiers("host", "optimizer"),
        _tiers("disk", "optimizer", "gradients", "parameters"),
    ):
        for dtype in (None, torch.bfloat16):
            plain = _train(stage, tiers, dtype=dtype)
            ours = _train(stage, {**tiers, "step": "speculative"}, dtype=dtype)
            _assert_equal(ours, plain)
            assert ours.accepted > 0
            assert ours.refused == 0


@pytest.mark.parametrize("stage", STAGES)
def test_updates_started_in_the_backward_are_those_of_the_step_bitwise(stage: int) -> None:
    run_ranks(_speculate_on_every_tier, 2, stage)


def _refuse(stage: int) -> None:
    tiers = _tiers("host", "optimizer", "gradients")
    ahead = {**tiers, "step": "speculative"}
    for case in ({"max_norm": 0.1}, {"decay": 0.5}, {"num_backwards": 2}):
        ours, plain = _train(stage, ahead, **case), _train(stage, tiers, **case)
        _assert_equal(ours, plain)
        assert ours.refused > 0
    assert _train(stage, ahead, max_norm=0.1).accepted == 0
    assert _train(stage, ahead, max_norm=1e6).refused == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_clipping_a_new_rate_or_a_second_backward_roll_them_back_bitwise(stage: int) -> None:
    run_ranks(_refuse, 2, stage)


def _skip_blocks(step_when: str) -> dict[str, Tensor]:
    model = Tower()
    config = speed(2, offload={**_tiers("host", "optimizer"), "step": step_when})
    engine = Engine.attach(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    engine.bind_optimizer(optimizer)
    for step in range(NUM_STEPS):
        model(tower_rows(step), skip=[step % 3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    values = whole_parameters(engine)
    engine.detach()
    return values


def _compare_skipping() -> None:
    assert_same_values(_skip_blocks("speculative"), _skip_blocks("after"))


def test_a_parameter_without_a_gradient_is_left_alone_by_a_speculative_update() -> None:
    run_ranks(_compare_skipping, 2)


def _delay(stage: int) -> None:
    tiers = _tiers("disk", "optimizer", "gradients")
    plain = _train(stage, tiers)
    late = _train(stage, {**tiers, "step": "delayed"})
    # The first update counts after the second step; all are made in the end.
    assert torch.equal(late.losses[:2], plain.losses[:1].expand(2)) or not torch.equal(
        late.losses, plain.losses
    )
    assert late.accepted > 0
    assert not any(torch.equal(late.parameters[n], toy) for n, toy in _untrained().items())


def _untrained() -> dict[str, Tensor]:
    return {n: p.detach() for n, p in toy_model("llama").named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_delayed_update_counts_one_step_later(stage: int) -> None:
    run_ranks(_delay, 2, stage)


def _reference_delayed() -> tuple[Tensor, Tensor]:
    """Plain PyTorch with gradients one step old, and the engine: losses of each."""
    make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
    model = toy_model("llama")
    optimizer = make(model.parameters())
    held: list[Tensor] | None = None
    losses = []
    for step in range(NUM_STEPS):
        loss = model(**global_batch("llama", step)).loss
        loss.backward()
        losses.append(loss.detach())
        new = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if held is not None:
            for parameter, gradient in zip(model.parameters(), held, strict=True):
                parameter.grad = gradient
            optimizer.step()
        held = new
        optimizer.zero_grad()
    delayed = {**_tiers("host", "optimizer"), "step": "delayed"}
    return torch.stack(losses), _train(0, delayed).losses


def test_a_delayed_run_is_plain_pytorch_with_gradients_one_step_old() -> None:
    ((plain, ours),) = run_ranks(_reference_delayed, 1)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0.0)
