"""What a checkpoint keeps of a run, and that not a bit of it is read as another.

Masters are stored once: where the Hub files hold them bit for bit, not beside them too. A flipped
bit in any file is refused by every rank, with the file's name, and none hangs.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import hf_speed
from hf_speed.checkpoint import read_manifest
from hf_speed.checkpoint.verify import verify_weights
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from tests.checkpoint.toys import flip
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


def prepared(model: nn.Module) -> tuple[Any, Any, Any]:
    accelerator = hf_speed.Accelerator(cpu=True, mixed_precision="bf16", hf_speed=stage(3))
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


def _cases() -> Iterator[tuple[str, nn.Module, bool]]:
    """Name; model; whether a hook of the user's saves it."""
    yield "fp32", llama(), False
    yield "mixtral", mixtral(), False
    yield "hooked", llama(), True
    yield "bf16", llama().bfloat16(), False


def _save_and_go_on(root: str) -> None:
    for name, made, hooked in _cases():
        home = f"{root}/{name}"
        accelerator, model, optimizer = prepared(made)
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
            accelerator, model, optimizer = prepared(again)
            step(accelerator, model, optimizer, 3)
            accelerator.load_state(home)
            assert_same(masters(model), expected)
            accelerator.free_memory()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def _damaged(root: str) -> dict[str, str]:
    """File -> with which message it was refused, if it was."""
    accelerator, model, optimizer = prepared(llama())
    step(accelerator, model, optimizer, dist.get_rank())
    home = Path(root)
    accelerator.save_state(root)
    texts = {}
    files = sorted(path for path in home.rglob("*.safetensors"))
    for path in (*files, home / "hf_speed" / "manifest.json", home / "config.json"):
        # A config that is JSON still may have been edited, which is no damage.
        at = 0 if path.name == "config.json" else path.stat().st_size - 40
        for again in (False, True):
            dist.barrier()
            if dist.get_rank() == 0:
                flip(path, at)
            dist.barrier()
            if not again:
                with pytest.raises(CheckpointError) as caught:
                    accelerator.load_state(root)
                texts[str(path.relative_to(home))] = str(caught.value)
    accelerator.load_state(root)
    world = AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")
    verify_weights(root, world=world)
    return texts


def _all(root: str) -> dict[str, str]:
    _save_and_go_on(root)
    return _damaged(f"{root}/damaged")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    root = tmp_path_factory.mktemp("runs")
    return root, run_ranks(_all, 2, str(root))


def test_masters_are_stored_once_and_lose_no_bit(found: tuple[Path, list[dict[str, str]]]) -> None:
    root, _ = found
    for name, in_files in (("fp32", "float32"), ("mixtral", "float32"), ("bf16", None)):
        manifest = read_manifest(root / name)
        assert manifest.meta["masters_in_files"] == in_files
        kinds = {entry.kind for entry in manifest.entries}
        assert kinds == {"exp_avg", "exp_avg_sq", *(["master"] if in_files is None else [])}
    hooked = read_manifest(root / "hooked")
    assert hooked.meta["masters_in_files"] is None
    assert "master" in {entry.kind for entry in hooked.entries}
    assert not any(path.endswith("model.safetensors") for path in hooked.files)
    num_parameters = sum(parameter.numel() for parameter in llama().parameters())
    for name, expected in (("fp32", 8), ("bf16", 12), ("hooked", 12)):
        entries = read_manifest(root / name).entries
        num_bytes = sum(prod(entry.shape) * entry.dtype.itemsize for entry in entries)
        assert num_bytes == expected * num_parameters


def test_one_flipped_bit_is_refused_by_all_ranks_with_its_file(
    found: tuple[Path, list[dict[str, str]]],
) -> None:
    first, second = found[1]
    assert first.keys() == second.keys()
    assert len(first) == 7
    for texts in (first, second):
        for file, text in texts.items():
            assert file in text
        # The tensor, too, and where.
        assert re.search(r"is damaged: in '[a-z_.0-9]+' \(bytes", texts["model.safetensors"])
        for rank in (0, 1):
            text = texts[f"hf_speed/state-001-rank0000{rank}-00000.safetensors"]
            assert f"failed on rank {rank}" in text
            assert "is damaged in the exp_avg" in text
