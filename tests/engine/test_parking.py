"""An engine can be parked between phases, and comes back as it was."""

import copy
from typing import Any

import pytest
import torch

import hf_speed
from hf_speed.engine import Engine
from hf_speed.errors import EngineError, ShardedParameterError
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    share,
    speed,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)


def _train(
    stage: int, offload: dict[str, Any], *, parks: bool, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(stage, offload=offload), compute_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    for step in range(4):
        if parks and step:
            held = _device_bytes(engine, states=not offload)
            parked = hf_speed.offload_states(model)
            assert parked >= held * 0.99
            assert _device_bytes(engine, states=not offload) == 0
            with pytest.raises(ShardedParameterError, match=r"lm_head|embed"):
                model.get_output_embeddings().weight.sum()
            with pytest.raises(EngineError, match=r"parked by hf_speed\.offload_states"):
                model(**share(global_batch("llama", step)))
            with pytest.raises(EngineError, match="parked"):
                optimizer.step()
            with pytest.raises(EngineError, match="parked"):
                hf_speed.offload_states(model)
            hf_speed.reload_states(model)
        engine.backward(model(**share(global_batch("llama", step))).loss)
        optimizer.step()
        optimizer.zero_grad()
    values = whole_parameters(engine)
    engine.detach()
    return values


def _device_bytes(engine: Engine, *, states: bool) -> int:
    """Bytes alive of parameters and masters, and of the optimizer's states where they are here."""
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for group in engine.parts.groups
        for each in group.device_buffers()
        if each.untyped_storage().nbytes()
    }
    for state in engine.optimizer.state.values() if engine.optimizer and states else ():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim() and value.stride()[-1]:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def _compare(stage: int) -> None:
    for offload in ({}, {"optimizer": "host", "update": "torch"}):
        for dtype in (None, torch.bfloat16):
            plain = _train(stage, offload, parks=False, dtype=dtype)
            assert_same_values(_train(stage, offload, parks=True, dtype=dtype), plain)


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_bitwise_after_every_parking(stage: int) -> None:
    run_ranks(_compare, 2, stage)


def _refuse() -> None:
    model = toy_model("llama")
    with pytest.raises(EngineError, match="has no engine"):
        hf_speed.offload_states(copy.deepcopy(model))
    engine = Engine.attach(model, speed(3))
    with pytest.raises(EngineError, match="Nothing is parked"):
        hf_speed.reload_states(model)
    with engine.gathered(), pytest.raises(EngineError, match="inside gathered"):
        hf_speed.offload_states(model)
    engine.detach()


def test_parking_refuses_what_it_cannot_do() -> None:
    run_ranks(_refuse, 1)
