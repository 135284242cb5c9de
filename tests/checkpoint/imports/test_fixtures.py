"""Checkpoints that DeepSpeed and torch have written, imported and trained on.

Each fixture has, beside the files of the framework, what that framework said of them: sums of
whole masters and moments, and the losses of its own next steps. See
scripts/dev/make_foreign_checkpoints.py.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.checkpoint import StateReader
from tests.checkpoint.imports.toys import FIXTURES, expected

NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
FP32 = [name for name in NAMES if expected(name)["dtype"] == "float32"]
LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture, imported; `expected.json` is not part of a checkpoint."""
    root = tmp_path_factory.mktemp("imported")
    for name in NAMES:
        hf_speed.import_checkpoint(FIXTURES / name, root / name)
    return {name: root / name for name in NAMES}


def _sum(value: Tensor) -> str:
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def test_there_is_a_fixture_of_each_kind() -> None:
    kinds = {name.split("_")[0] for name in NAMES}
    assert {"zero1", "zero2", "zero3", "universal", "fsdp1", "fsdp2"} <= kinds


@pytest.mark.parametrize("name", NAMES)
def test_masters_and_moments_are_bitwise_those_of_the_framework(
    imported: dict[str, Path], name: str
) -> None:
    said = expected(name)
    files = load_file(imported[name] / "model.safetensors")
    with StateReader(imported[name]) as reader:
        assert set(said["tensors"]) == set(reader.meta["parameters"])
        for parameter, sums in said["tensors"].items():
            shape = reader.meta["parameters"][parameter]
            numel = torch.Size(shape).numel()
            master = reader.read(parameter, "master", 0, numel)
            if master is None:
                master = files[parameter]
                assert master.dtype == torch.float32
            found = {"fp32": _sum(master)} | {
                kind: _sum(reader.read(parameter, kind, 0, numel))
                for kind in ("exp_avg", "exp_avg_sq")
            }
            if sums:
                assert found == sums, parameter
            assert reader.scalars[parameter] == {"step": float(said["step"])}
        assert reader.meta["optimizer"] == "AdamW"
        decays = [group["weight_decay"] for group in reader.meta["param_groups"]]
        assert decays == [0.1, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_hub_model_in_the_dtype_that_computed(
    imported: dict[str, Path], name: str
) -> None:
    said = expected(name)
    dtype = getattr(torch, said["dtype"])
    model = AutoModelForCausalLM.from_pretrained(imported[name])
    assert model.dtype == dtype
    with StateReader(imported[name]) as reader:
        master = reader.read("transformer.h.0.ln_1.weight", "master", 0, 16)
    if master is not None:
        assert torch.equal(model.transformer.h[0].ln_1.weight, master.to(dtype))
    for parameter in said["frozen"]:
        assert parameter not in said["tensors"]
        assert model.get_parameter(parameter).abs().sum() > 0 or parameter.endswith("bias")


def _prepared(name: str, source: Path, **config: Any) -> tuple[Any, Any, Any, Any]:
    """(accelerator, model, optimizer, scheduler) that go on from an imported checkpoint."""
    said = expected(name)
    precision = {"bfloat16": "bf16", "float32": "no"}[said["dtype"]]
    AcceleratorState._reset_state(reset_partial_state=True)  # It keeps the precision of the last.
    accelerator = hf_speed.Accelerator(
        cpu=True, mixed_precision=precision, hf_speed={"zero": {"stage": 2}} | config
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter not in said["frozen"])
    trained = [value for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in trained if value.dim() > 1], "weight_decay": 0.0},
        {"params": [value for value in trained if value.dim() <= 1], "weight_decay": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(source))
    state = torch.load(source / "scheduler.pt", weights_only=True)
    assert state["last_epoch"] == said["step"]
    scheduler.load_state_dict(state)
    return accelerator, model, optimizer, scheduler


def _losses(name: str, parts: tuple[Any, Any, Any, Any]) -> Iterator[float]:
    """Of each of the next steps, the ranks' batches as one."""
    accelerator, model, optimizer, scheduler = parts
    for batch in expected(name)["batches"]:
        ids = torch.tensor(batch).flatten(0, 1)
        loss = model(input_ids=ids, labels=ids).loss
        yield loss.item()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.free_memory()


@pytest.mark.parametrize("name", FP32)
def test_training_goes_on_with_the_losses_of_the_framework(
    imported: dict[str, Path], name: str
) -> None:
    losses = list(_losses(name, _prepared(name, imported[name])))
    wanted = expected(name)["losses"]
    assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
    # Keys' biases have no gradient but rounding, of which Adam makes steps of the full size.
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FP32])
def test_sixteen_bit_training_goes_on_likewise(imported: dict[str, Path], name: str) -> None:
    parts = _prepared(name, imported[name])
    first = torch.tensor(expected(name)["batches"][0])
    with torch.no_grad():
        # By rank: 16-bit products of other batch sizes are rounded otherwise.
        by_rank = [parts[1](input_ids=ids, labels=ids).loss.item() for ids in first]
    wanted = expected(name)["losses"]
    assert sum(by_rank) / len(by_rank) == pytest.approx(wanted[0], rel=1e-6)
    # Then gradients differ: DeepSpeed averages them over its ranks in 16 bits, of 8 digits.
    assert list(_losses(name, parts)) == pytest.approx(wanted, rel=5e-3)


def test_a_single_save_finds_the_config_above_it(tmp_path: Path) -> None:
    hf_speed.import_checkpoint(FIXTURES / "zero2_fp32" / "global_step3", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_masters_of_all_bits_go_into_the_files_on_request(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "zero1_bf16", source)
    hf_speed.import_checkpoint(source, tmp_path / "out", dtype="float32", max_shard_size="8KB")
    said = expected("zero1_bf16")["tensors"]
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    values = {name: value for path in shards for name, value in load_file(path).items()}
    assert all(_sum(values[name]) == sums["fp32"] for name, sums in said.items())
    with StateReader(tmp_path / "out") as reader:
        assert "master" not in reader.kinds("transformer.wte.weight")
