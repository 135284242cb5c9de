"""Runs go on with an optimizer to which the learning rates of a checkpoint mean nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_speed
from hf_speed.optim import Lion
from tests.integrations.toys import arguments, curve, examples, llama, stage
from tests.support import run_ranks

OURS = 1e-3
THEIRS = 1e-2


def _rates(directory: str, checkpoint: str | None, optimizer: type[Any], rate: float) -> Any:
    """Learning rates of each update, through the Trainer with its linear schedule over 4 steps."""
    model = llama()
    made = hf_speed.Trainer(
        model=model,
        args=arguments(
            directory,
            stage(2),
            save_strategy="no" if checkpoint else "steps",
            save_steps=2,
            gradient_accumulation_steps=1,
        ),
        train_dataset=examples(),
        optimizers=(optimizer(model.parameters(), lr=rate), None),
    )
    made.train(resume_from_checkpoint=checkpoint)
    rates = [line["learning_rate"] for line in made.state.log_history if "loss" in line]
    kinds = {kind for state in made.speed_engine.optimizer.state.values() for kind in state}
    assert all(math.isfinite(loss) for loss, _ in curve(made))
    return rates, kinds


def _looped(directory: str, optimizer: type[Any], rate: float, *, resumed: bool) -> list[float]:
    """Learning rates of a loop whose schedule halves them at each step."""
    accelerator = hf_speed.Accelerator(hf_speed=stage(2))
    model = llama()
    made = optimizer(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
    model, made, schedule = accelerator.prepare(model, made, schedule)
    if resumed:
        accelerator.load_state(directory)
    found = []
    for _ in range(2):
        ids = torch.arange(3, 9).reshape(1, 6)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        found.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
        made.zero_grad()
    if not resumed:
        accelerator.save_state(directory)
    return found


def _all(root: str) -> dict[str, Any]:
    state = f"{root}/state"
    found = {
        "first": _rates(f"{root}/run", None, torch.optim.AdamW, THEIRS),
        "same": _rates(f"{root}/x", f"{root}/run/checkpoint-2", torch.optim.RAdam, 7.0),
        "other": _rates(f"{root}/x", f"{root}/run/checkpoint-2", Lion, OURS),
        "loop": _looped(state, torch.optim.AdamW, THEIRS, resumed=False),
    }
    dist.barrier()
    return found | {
        "same loop": _looped(state, torch.optim.Adam, 7.0, resumed=True),
        "other loop": _looped(state, Lion, OURS, resumed=True),
    }


def test_rates_of_another_family_are_the_runs_own_at_the_schedules_step(tmp_path: Path) -> None:
    found = run_ranks(_all, 2, str(tmp_path))[0]
    first, _ = found["first"]
    assert first == pytest.approx([THEIRS, THEIRS * 3 / 4, THEIRS / 2, THEIRS / 4])
    assert found["same"][0] == pytest.approx(first)
    rates, kinds = found["other"]
    assert rates[-2:] == pytest.approx([OURS / 2, OURS / 4])
    assert kinds == {"exp_avg", "step"}
    assert found["loop"][0] == THEIRS
    assert found["same loop"][0] / THEIRS == pytest.approx(found["other loop"][0] / OURS)
    assert found["same loop"][1] / THEIRS == pytest.approx(found["other loop"][1] / OURS)
    assert found["other loop"][0] < OURS
