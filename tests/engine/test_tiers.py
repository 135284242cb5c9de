"""A buffer's tier changes where it lives, and no number."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_speed.engine import Engine
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    share,
    speed,
    toy_model,
    train_engine,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
KINDS = ("optimizer", "gradients", "parameters")
NUM_STEPS = 4
MIB = 1 << 20


class Outcome(NamedTuple):
    """What is compared between tiers."""

    losses: Tensor
    parameters: dict[str, Tensor]
    norms: Tensor


def _train(
    stage: int, offload: dict[str, Any], *, dtype: torch.dtype | None = None, num_micro: int = 1
) -> Outcome:
    """Some clipped steps of a toy Llama."""
    with tempfile.TemporaryDirectory() as directory:
        if "disk" in offload.values():
            offload = {"paths": [directory], **offload}
        config = speed(stage, offload={"staging_bytes": 16 * MIB, **offload})
        model = toy_model("llama")
        engine = Engine.attach(model, config, compute_dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(optimizer)
        losses, norms = [], []
        for step in range(NUM_STEPS):
            for micro in range(num_micro):
                engine.sync_gradients = micro == num_micro - 1
                loss = model(**share(global_batch("llama", step * num_micro + micro))).loss
                engine.backward(loss)
                losses.append(loss.detach().float())
            norms.append(engine.clip_grad_norm_(0.5))
            optimizer.step()
            optimizer.zero_grad()
        outcome = Outcome(torch.stack(losses), whole_parameters(engine), torch.stack(norms))
        engine.detach()
        assert list(Path(directory).iterdir()) == []
    return outcome


def _assert_equal(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert torch.equal(ours.norms, theirs.norms)
    assert_same_values(ours.parameters, theirs.parameters)


def _compare_tiers(stage: int) -> None:
    for update in ("torch", "fused"):
        for dtype in (None, torch.bfloat16):
            base = _train(stage, {"update": update}, dtype=dtype)
            for tier in ("host", "disk"):
                for kinds in (*((kind,) for kind in KINDS), KINDS):
                    offload = {"update": update, **dict.fromkeys(kinds, tier)}
                    _assert_equal(_train(stage, offload, dtype=dtype), base)


@pytest.mark.parametrize("stage", STAGES)
def test_every_tier_of_every_kind_trains_bitwise_as_the_device_does(stage: int) -> None:
    run_ranks(_compare_tiers, 2, stage)


def _compare_with_plain_steps(stage: int) -> None:
    batches = [global_batch("llama", step) for step in range(NUM_STEPS)]
    plain = train_engine(toy_model("llama"), batches, speed(stage))
    with tempfile.TemporaryDirectory() as directory:
        everything = {**dict.fromkeys(KINDS, "disk"), "paths": [directory], "update": "torch"}
        chunked = train_engine(toy_model("llama"), batches, speed(stage, offload=everything))
    assert torch.equal(plain.losses, chunked.losses)
    assert_same_values(plain.parameters, chunked.parameters)


def _compare_with_plain_steps_at_every_stage() -> None:
    for stage in STAGES:
        _compare_with_plain_steps(stage)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_users_optimizer_on_disk_is_bitwise_that_in_memory(world_size: int) -> None:
    run_ranks(_compare_with_plain_steps_at_every_stage, world_size)
