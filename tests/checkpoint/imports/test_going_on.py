"""What was imported goes on: on other meshes, in the Trainer, and from bare weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

import hf_speed
from hf_speed.cli import main
from hf_speed.errors import CheckpointError
from tests.checkpoint.imports.toys import FIXTURES, expected
from tests.support import run_ranks

MESHES: list[dict[str, Any]] = [
    {"zero": {"stage": 3}},
    {"zero": {"stage": 1}, "mesh": {"tp": 2}},
    {"zero": {"stage": 0}, "mesh": {"pp": 2}, "pipe": {"microbatches": 2}},
]
SOURCES = ["zero2_fp32", "universal_zero2", "torch"]
LEARNING_RATE = 1e-2


def _of_torch(directory: Path) -> dict[str, Any]:
    """Save a run of plain torch, of two layers for two stages; what it says of its next steps."""
    torch.manual_seed(0)
    said = expected("zero2_fp32") | {"frozen": []}
    config = AutoConfig.from_pretrained(FIXTURES / "zero2_fp32", n_layer=2)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    def step(batch: list[Any]) -> float:
        ids = torch.tensor(batch).flatten(0, 1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    step(said["batches"][1])
    weights, states = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That there is one process.
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=str(directory))
    config.save_pretrained(directory)
    return said | {"losses": [step(batch) for batch in said["batches"]]}


def _groups(model: Any) -> list[dict[str, Any]]:
    trained = [value for value in model.parameters() if value.requires_grad]
    return [
        {"params": [value for value in trained if value.dim() > 1], "weight_decay": 0.1},
        {"params": [value for value in trained if value.dim() <= 1], "weight_decay": 0.0},
    ]


def _go_on(source: str, config: dict[str, Any], said: dict[str, Any]) -> list[float]:
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=config)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    for name, value in model.named_parameters():
        value.requires_grad_(name not in said["frozen"])
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(source)
    scheduler.load_state_dict(torch.load(Path(source) / "scheduler.pt", weights_only=True))
    losses = []
    shares = "mesh" in config
    for batch in said["batches"]:
        ids = torch.tensor(batch)
        ids = ids.flatten(0, 1) if shares else ids[dist.get_rank()]
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        value = loss.detach().double()
        if not shares:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        losses.append(value.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.free_memory()
    return losses


def _meshes_rank(root: str, said: dict[str, dict[str, Any]]) -> list[list[float]]:
    return [
        _go_on(f"{root}/{name}", config, said[name])
        for name, config in zip(SOURCES, MESHES, strict=True)
    ]


def test_other_meshes_go_on_with_the_losses_of_the_framework(tmp_path: Path) -> None:
    said = {name: expected(name) for name in SOURCES[:2]}
    said["torch"] = _of_torch(tmp_path / "source")
    hf_speed.import_checkpoint(tmp_path / "source", tmp_path / "torch")
    for name in SOURCES[:2]:
        hf_speed.import_checkpoint(FIXTURES / name, tmp_path / name)
    for losses in run_ranks(_meshes_rank, 2, str(tmp_path), said):
        for name, found in zip(SOURCES, losses, strict=True):
            wanted = said[name]["losses"]
            assert found[0] == pytest.approx(wanted[0], rel=1e-6), name
            # Keys' biases have no gradient but rounding, of which Adam makes steps of full size.
            assert found == pytest.approx(wanted, rel=1e-4), name


def _trainer(directory: Path, source: Path, **options: Any) -> Any:
    said = expected("zero2_fp32")
    rows = [
        # The Trainer counts labels, of which the first is never predicted.
        {"input_ids": torch.tensor(row), "labels": torch.tensor([-100, *row[1:]])}
        for batch in [*said["batches"], *said["batches"]]
        for rank in batch
        for row in rank
    ]
    args = hf_speed.TrainingArguments(
        str(directory), hf_speed={"zero": {"stage": 2}}, per_device_train_batch_size=4,
        max_steps=6, logging_steps=1, learning_rate=LEARNING_RATE, weight_decay=0.1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return hf_speed.Trainer(model=model, args=args, train_dataset=rows)


def test_the_trainer_goes_on_from_an_import(tmp_path: Path) -> None:
    """Of DeepSpeed's own engine: it had no Trainer's state, which the import made."""
    source = tmp_path / "imported"
    hf_speed.import_checkpoint(FIXTURES / "zero2_fp32", source)
    trainer = _trainer(tmp_path / "out", source)
    trainer.train(resume_from_checkpoint=str(source))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [4, 5, 6]
    # The first step's loss is of the weights alone; then rates differ, for here they are constant.
    assert lines[0]["loss"] == pytest.approx(expected("zero2_fp32")["losses"][0], abs=1e-4)
    assert trainer.state.global_step == 6


def test_a_hub_model_is_a_beginning(tmp_path: Path) -> None:
    """Of safetensors files, and of the older ones of torch.save: the same weights, step 0."""
    model = AutoModelForCausalLM.from_pretrained(
        hf_speed.import_checkpoint(FIXTURES / "zero2_fp32", tmp_path / "once").directory
    )
    model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    model.config.save_pretrained(tmp_path / "old")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    for name in ("new", "old"):
        result = hf_speed.import_checkpoint(tmp_path / name, tmp_path / f"{name}_out")
        assert (result.step, result.num_states) == (None, 0)
        assert any("no optimizer state" in note for note in result.notes)
        assert json.loads((result.directory / "trainer_state.json").read_text())["global_step"] == 0
        files = load_file(result.directory / "model.safetensors")
        assert all(torch.equal(files[name], weights[name]) for name in files)
    trainer = _trainer(tmp_path / "out", tmp_path / "new_out")
    trainer.train(resume_from_checkpoint=str(tmp_path / "new_out"))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] == pytest.approx(expected("zero2_fp32")["losses"][0], abs=1e-4)


def test_a_damaged_hub_model_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing, which"):
        hf_speed.import_checkpoint(tmp_path, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not beside it"):
        hf_speed.import_checkpoint(tmp_path, tmp_path / "out")
    index.unlink()
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights"):
        hf_speed.import_checkpoint(tmp_path, tmp_path / "out")
    torch.save({"a": [1]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a is no tensor"):
        hf_speed.import_checkpoint(tmp_path, tmp_path / "out")


def test_the_command_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["import", str(FIXTURES / "fsdp2"), str(out), "--kind", "dcp"]) == 0
    said = capsys.readouterr().out
    assert f"2 rank(s) -> {out}" in said
    assert "step 3" in said
    assert main(["import", str(FIXTURES / "fsdp2"), str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
