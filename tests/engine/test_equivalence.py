"""Every stage trains as one plain process does."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError
from tests.engine.toys import (
    KINDS,
    Run,
    assert_same_values,
    global_batch,
    speed,
    toy_model,
    train_engine,
    train_plain,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NUM_STEPS = 20


def _runs_at_every_stage(kind: str) -> tuple[Run, list[Run]]:
    batches = [global_batch(kind, step) for step in range(NUM_STEPS)]
    plain = train_plain(toy_model(kind), batches)
    return plain, [train_engine(toy_model(kind), batches, speed(stage)) for stage in STAGES]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_20_steps_at_every_stage_are_those_of_one_process(kind: str) -> None:
    for plain, runs in run_ranks(_runs_at_every_stage, 2, kind):
        for run in runs:
            torch.testing.assert_close(run.losses, plain.losses, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_stages_agree_bitwise_on_two_ranks(kind: str) -> None:
    for _, runs in run_ranks(_runs_at_every_stage, 2, kind):
        for run in runs[1:]:
            assert torch.equal(run.losses, runs[0].losses)
            assert_same_values(run.parameters, runs[0].parameters)


def test_one_process_at_every_stage_is_plain_pytorch_bitwise() -> None:
    for world in (run_ranks(_runs_at_every_stage, 1, "llama", backend=None), run_ranks(_runs_at_every_stage, 1, "llama")):
        ((plain, runs),) = world
        for run in runs:
            assert torch.equal(run.losses, plain.losses)
            assert_same_values(run.parameters, plain.parameters)
