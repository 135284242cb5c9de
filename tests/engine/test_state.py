"""What an engine saves, another one goes on from; weights come in slices; figures of a step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from hf_speed.errors import CheckpointError
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    mean_over_ranks,
    plain_parameters,
    share,
    speed,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")


def _attached(stage: int, **attach: object) -> tuple[nn.Module, Engine, torch.optim.Optimizer]:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(stage), **attach)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine.bind_optimizer(optimizer)
    return model, engine, optimizer


def _steps(engine: Engine, model: nn.Module, steps: range) -> Tensor:
    losses = []
    for step in steps:
        loss = model(**share(global_batch("llama", step))).loss
        engine.backward(loss)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        losses.append(loss.detach())
    return mean_over_ranks(torch.stack(losses))


def _states(engine: Engine) -> dict[str, Tensor]:
    found = {f"{name}/master": value for name, value in whole_parameters(engine).items()}
    for name in engine.parameter_names:
        for key in MOMENTS:
            found[f"{name}/{key}"] = engine.get_full_optimizer_state(name, key)
    return found


def _save(directory: str, stage: int, dtype: torch.dtype | None) -> tuple[dict, dict, Tensor]:
    """Whole states and weights where it was saved, and the losses of going on."""
    model, engine, optimizer = _attached(stage, compute_dtype=dtype)
    _steps(engine, model, range(3))
    optimizer.param_groups[0]["lr"] = 5e-4
    engine.save(directory)
    states, weights = _states(engine), whole_parameters(engine, master=False)
    return states, weights, _steps(engine, model, range(3, 6))


def _load(
    directory: str, stage: int, dtype: torch.dtype | None, weights: dict[str, Tensor]
) -> tuple[dict, Tensor]:
    torch.manual_seed(99)
    model, engine, optimizer = _attached(stage, compute_dtype=dtype)
    _steps(engine, model, range(7, 8))
    engine.load_full_parameters(weights.get)
    engine.load(directory)
    assert optimizer.param_groups[0]["lr"] == 5e-4
    assert next(iter(optimizer.state.values()))["step"] == 3
    return _states(engine), _steps(engine, model, range(3, 6))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_states_move_bitwise_between_stages_and_worlds(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    directory = str(tmp_path)
    states, weights, losses = run_ranks(_save, 2, directory, 2, dtype)[0]
    for world_size, stage in ((2, 2), (2, 3), (1, 0), (4, 1)):
        loaded, again = run_ranks(_load, world_size, directory, stage, dtype, weights)[0]
        assert_same_values(loaded, states)
        if world_size == 2:
            assert torch.equal(again, losses)
        elif dtype is None:
            torch.testing.assert_close(again, losses, rtol=1e-6, atol=0.0)


def _wrong_model(directory: str) -> None:
    model = toy_model("llama", num_layers=3)
    engine = Engine.attach(model, speed(1))
    with pytest.raises(CheckpointError, match=r"of another model: 9 trainable parameters differ"):
        engine.load(directory)
    model, engine, _ = _attached(1)
    engine.bind_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="was saved with AdamW, but this run uses SGD"):
        engine.load(directory)


def test_states_of_another_model_or_optimizer_are_refused(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path), 1, None)
    run_ranks(_wrong_model, 2, str(tmp_path))


def _slices() -> None:
    source = plain_parameters(toy_model("llama", initializer_range=0.3))
    asked = {}
    for stage in STAGES:
        for meta in (False, True):
            model = toy_model("llama")
            objects = list(model.parameters())
            if meta:
                model = model.to("meta")
            numels: list[int] = []

            def read(name: str, start: int, numel: int, numels: list[int] = numels) -> Tensor:
                numels.append(numel)
                return source[name].flatten()[start : start + numel]

            engine = Engine.attach(model, speed(stage), compute_dtype=torch.bfloat16)
            engine.load_parameters(read)
            assert_same_values(whole_parameters(engine), source)
            assert meta or list(model.parameters()) == objects or stage == 3
            asked[stage] = sum(numels)
    everything = sum(value.numel() for value in source.values())
    # At stage 3 a rank reads its own half.
    assert asked[0] == asked[1] == asked[2] == everything
    assert asked[3] < 0.55 * everything


def test_weights_are_read_in_slices_also_into_a_model_without_memory() -> None:
    run_ranks(_slices, 2)


def _figures() -> None:
    model, engine, optimizer = _attached(3)
    assert engine.stats().grad_norm is None
    engine.backward(model(**share(global_batch("llama", 0))).loss)
    norm = engine.clip_grad_norm_(1.0)
    optimizer.step()
    stats = engine.stats()
    assert stats.grad_norm == float(norm)
    assert stats.loss_scale == 1.0
    assert stats.bytes_sent == engine.mesh.journal.total_bytes_sent > 0
    assert stats.peak_bytes["host"] > 1 << 20


def test_stats_are_those_of_the_last_step() -> None:
    run_ranks(_figures, 2)


def _generated(mode: str) -> tuple[list[int], list[int]]:
    """Tokens of a plain model and of the engine's, this rank stopping earlier than the other."""
    rank = torch.distributed.get_rank()
    batch = share(global_batch("llama", 0))["input_ids"]
    options = {"max_new_tokens": 3 + 4 * rank, "do_sample": False, "pad_token_id": 0}
    plain = toy_model("llama").eval().generate(batch, **options)
    model = toy_model("llama").eval()
    Engine.attach(model, speed(3, zero={"generate": mode}, debug={"timeout_s": 20.0}))
    return plain.tolist(), model.generate(batch, **options).tolist()


@pytest.mark.parametrize("mode", ["gathered", "streamed"])
def test_ranks_that_stop_at_different_lengths_generate_as_plain_models(mode: str) -> None:
    for plain, ours in run_ranks(_generated, 2, mode):
        assert ours == plain
