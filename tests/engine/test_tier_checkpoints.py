"""Narrow moments survive a checkpoint; single tensors can be reached on every tier."""

import tempfile
from typing import Any

import pytest
import torch
from torch import nn

from hf_speed.engine import Engine
from tests.engine.toys import (
    global_batch,
    share,
    speed,
    toy_model,
)
from tests.support import run_ranks

KINDS = ("optimizer", "gradients", "parameters")


def _attached(
    stage: int, offload: dict[str, Any], dtype: torch.dtype | None
) -> tuple[nn.Module, Engine]:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(stage, offload=offload), compute_dtype=dtype)
    engine.bind_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    return model, engine


def _steps(engine: Engine, model: nn.Module, steps: range) -> None:
    for step in steps:
        loss = model(**share(global_batch("llama", step))).loss
        engine.backward(loss)
        engine.clip_grad_norm_(0.5)
        engine.optimizer.step()
        engine.optimizer.zero_grad()


def _offload(tier: str, scratch: str) -> dict[str, Any]:
    paths = {"paths": [scratch]} if tier == "disk" else {}
    return {"update": "fused", **dict.fromkeys(KINDS, tier), **paths}


def _moment_sizes(moments: str) -> tuple[float, float]:
    """Largest error of a first moment after a save and a load, and its largest value."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as saved:
        offload = {**_offload("disk", scratch), "moments": moments}
        model, engine = _attached(2, offload, None)
        _steps(engine, model, range(2))
        engine.save(saved)
        before = engine.get_full_optimizer_state("lm_head.weight", "exp_avg")
        _steps(engine, model, range(2, 3))
        engine.load(saved)
        after = engine.get_full_optimizer_state("lm_head.weight", "exp_avg")
        engine.detach()
    return float((after - before).abs().max()), float(before.abs().max())


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_narrow_moments_survive_a_checkpoint_bitwise(moments: str) -> None:
    ((error, largest),) = run_ranks(_moment_sizes, 1, moments)
    assert largest > 0.0
    assert error == 0.0


def _read_and_write(stage: int, tier: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, engine = _attached(stage, _offload(tier, scratch), torch.bfloat16)
        _steps(engine, model, range(1))
        name = "model.layers.0.mlp.up_proj.weight"
        new = torch.randn(engine.get_full_parameter(name).shape)
        engine.set_full_parameter(name, new)
        assert torch.equal(engine.get_full_parameter(name), new)
        with engine.gathered([name], modify=True):
            working = model.get_parameter(name)
            assert torch.equal(working, new.bfloat16())
            with torch.no_grad():
                working.mul_(2)
        assert torch.equal(engine.get_full_parameter(name).bfloat16(), (2 * new.bfloat16()))
        engine.set_full_optimizer_state(name, "exp_avg", new)
        assert torch.equal(engine.get_full_optimizer_state(name, "exp_avg"), new)
        engine.backward(model(**share(global_batch("llama", 1))).loss)
        norm = engine.clip_grad_norm_(1e-3)
        gradients = [engine.get_full_grad(each) for each in engine.parameter_names]
        clipped = torch.stack([each.norm() for each in gradients if each is not None]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0.0)
        assert norm > 1e-3
        engine.set_full_grad(name, new)
        assert torch.equal(engine.get_full_grad(name), new)
        engine.clip_grad_value_(1e-4)
        assert float(engine.get_full_grad(name).abs().max()) <= 1e-4
        engine.detach()


def _read_and_write_everywhere() -> None:
    for stage in (0, 2, 3):
        for tier in ("host", "disk"):
            _read_and_write(stage, tier)


def test_single_tensors_can_be_read_and_written_on_every_tier() -> None:
    run_ranks(_read_and_write_everywhere, 2)
