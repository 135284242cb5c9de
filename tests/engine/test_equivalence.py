"""Every stage trains as one plain process does."""

import pytest
import torch

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

Runs = tuple[Run, list[Run]]


def _train_at_every_stage(kind: str) -> Runs:
    batches = [global_batch(kind, step) for step in range(NUM_STEPS)]
    plain = train_plain(toy_model(kind), batches)
    return plain, [train_engine(toy_model(kind), batches, speed(stage)) for stage in STAGES]


@pytest.fixture(scope="module", params=KINDS)
def two_ranks(request: pytest.FixtureRequest) -> list[Runs]:
    return run_ranks(_train_at_every_stage, 2, request.param)


def test_losses_of_20_steps_at_every_stage_are_those_of_one_process(two_ranks: list[Runs]) -> None:
    for plain, runs in two_ranks:
        for run in runs:
            torch.testing.assert_close(run.losses, plain.losses, rtol=1e-6, atol=0.0)


def test_all_stages_agree_bitwise_on_two_ranks(two_ranks: list[Runs]) -> None:
    for _, runs in two_ranks:
        for run in runs[1:]:
            assert torch.equal(run.losses, runs[0].losses)
            assert_same_values(run.parameters, runs[0].parameters)


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_one_process_at_every_stage_is_plain_pytorch_bitwise(backend: str | None) -> None:
    ((plain, runs),) = run_ranks(_train_at_every_stage, 1, "llama", backend=backend)
    for run in runs:
        assert torch.equal(run.losses, plain.losses)
        assert_same_values(run.parameters, plain.parameters)
