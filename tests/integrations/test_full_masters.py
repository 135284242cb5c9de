"""Masters are stored once: where the Hub files hold them bit for bit, and nowhere else."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import hf_speed
from hf_speed.checkpoint import read_manifest
from tests.integrations.toys import VOCABULARY, examples, llama, stage
from tests.support import run_ranks


def mixtral() -> MixtralForCausalLM:
    """Its experts are stored in another layout than they are computed in."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    return MixtralForCausalLM(config)


def prepared(model: nn.Module, mixed_precision: str) -> tuple[Any, Any, Any]:
    accelerator = hf_speed.Accelerator(cpu=True, mixed_precision=mixed_precision, hf_speed=stage(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator: Any, model: Any, optimizer: Any, row: int) -> float:
    batch = {key: value[None] for key, value in examples()[row].items()}
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def masters(model: Any) -> dict[str, Tensor]:
    engine = hf_speed.engine_of(model)
    return {key: value.clone() for key, value in engine.full_parameters(master=True)}


def _user_saves(_models: Any, weights: list[Any], _directory: str) -> None:
    weights.clear()


def _cases() -> Iterator[tuple[str, nn.Module, str, bool]]:
    """Name; model; mixed_precision; whether a hook of the user's saves the model."""
    yield "fp32", llama(), "bf16", False
    yield "mixtral", mixtral(), "bf16", False
    yield "hooked", llama(), "bf16", True
    yield "bf16", llama().bfloat16(), "bf16", False


def _save_and_go_on(root: str) -> None:
    for name, made, precision, hooked in _cases():
        home = f"{root}/{name}"
        accelerator, model, optimizer = prepared(made, precision)
        if hooked:
            accelerator.register_save_state_pre_hook(_user_saves)
        step(accelerator, model, optimizer, 0)
        accelerator.save_state(home)
        expected = masters(model)
        losses = [step(accelerator, model, optimizer, row) for row in (1, 2)]
        after = masters(model)
        assert any(not torch.equal(expected[key], after[key]) for key in expected)
        if not hooked:
            accelerator.load_state(home)
            assert_same(masters(model), expected)
            assert [step(accelerator, model, optimizer, row) for row in (1, 2)] == losses
        accelerator.free_memory()
        if not hooked and name != "bf16":
            # Another run, whose model comes in 16 bits: the files are read in all theirs.
            again = (mixtral() if name == "mixtral" else llama(1)).bfloat16()
            accelerator, model, optimizer = prepared(again, precision)
            step(accelerator, model, optimizer, 3)
            accelerator.load_state(home)
            assert_same(masters(model), expected)
            accelerator.free_memory()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_masters_are_stored_once_and_lose_no_bit(tmp_path: Path) -> None:
    run_ranks(_save_and_go_on, 2, str(tmp_path))
    for name, in_files in (("fp32", "float32"), ("mixtral", "float32"), ("bf16", None)):
        manifest = read_manifest(tmp_path / name)
        assert manifest.meta["masters_in_files"] == in_files
        kinds = {entry.kind for entry in manifest.entries}
        assert kinds == {"exp_avg", "exp_avg_sq", *(["master"] if in_files is None else [])}
    hooked = read_manifest(tmp_path / "hooked")
    assert hooked.meta["masters_in_files"] is None
    assert "master" in {entry.kind for entry in hooked.entries}
    assert not any(path.endswith("model.safetensors") for path in hooked.files)
    num_parameters = sum(parameter.numel() for parameter in llama().parameters())
    for name, expected in (("fp32", 8), ("bf16", 12), ("hooked", 12)):
        entries = read_manifest(tmp_path / name).entries
        num_bytes = sum(prod(entry.shape) * entry.dtype.itemsize for entry in entries)
        assert num_bytes == expected * num_parameters
