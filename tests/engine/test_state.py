"""What is of another model is refused; weights come in slices; figures of a step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from hf_speed.errors import CheckpointError
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    plain_parameters,
    share,
    speed,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)


def _attached(stage: int, **attach: object) -> tuple[nn.Module, Engine, torch.optim.Optimizer]:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(stage), **attach)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine.bind_optimizer(optimizer)
    return model, engine, optimizer


def _save(directory: str) -> None:
    model, engine, _ = _attached(1)
    engine.backward(model(**share(global_batch("llama", 0))).loss)
    engine.optimizer.step()
    engine.save(directory)


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
    run_ranks(_save, 2, str(tmp_path))
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
