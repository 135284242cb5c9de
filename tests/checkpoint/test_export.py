"""Exports: plain files of a Hub model, recast and cut anew on request, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_speed
from hf_speed.checkpoint import LocalState, ModelPlan, TensorGroup, TensorSpec
from hf_speed.checkpoint.export import Exported, export
from hf_speed.checkpoint.model_writer import write_model
from hf_speed.checkpoint.plan import split_files
from hf_speed.checkpoint.writer import write_states
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.mesh.axes import IDENTITY

WEIGHTS = {f"layer.{index}.weight": torch.randn(10, 10) for index in range(5)} | {
    "position": torch.arange(4)
}


def checkpoint(directory: Path, *, max_shard_bytes: int = 1000) -> Path:
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in WEIGHTS.items()]
    groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in WEIGHTS)
    plan = ModelPlan(split_files(specs, max_shard_bytes), groups, dict, {}, 500)
    write_model(directory, plan, WEIGHTS.items(), world=IDENTITY)
    state = LocalState("position", "master", (4,), 0, 4, torch.zeros(4))
    write_states(directory, [state], {}, world=IDENTITY)
    (directory / "config.json").write_text('{"model_type": "toy", "dtype": "float32"}')
    (directory / "tokenizer.json").write_text("{}")
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (directory / name).write_text("")
    (directory / "chat_templates").mkdir()
    (directory / "chat_templates" / "tool.jinja").write_text("x")
    return directory


def load(exported: Exported) -> dict[str, torch.Tensor]:
    names = [name for name in exported.files if name.endswith(".safetensors")]
    return {k: v for name in names for k, v in load_file(exported.directory / name).items()}


def test_export_copies_the_model_and_says_what_it_leaves(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-3")
    exported = hf_speed.export(source, tmp_path / "model")
    assert exported.left_out == (
        "hf_speed",
        "optimizer.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
    )
    assert {"config.json", "tokenizer.json", "chat_templates/tool.jinja"} < set(exported.files)
    loaded = load(exported)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], value) for name, value in WEIGHTS.items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("size", [None, 700, "1KB", "1 MiB"])
def test_export_recasts_and_cuts_anew(size: int | str | None, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-3")
    exported = export(source, tmp_path / "model", dtype="bfloat16", max_shard_size=size)
    loaded = load(exported)
    for name, value in WEIGHTS.items():
        wanted = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(loaded[name], wanted)
        assert loaded[name].dtype == wanted.dtype
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    index = tmp_path / "model" / "model.safetensors.index.json"
    if size in (None, "1 MiB"):
        assert not index.exists()
        assert "model.safetensors" in exported.files
    else:
        body = json.loads(index.read_text())
        assert body["weight_map"].keys() == WEIGHTS.keys()
        assert body["metadata"] == {"total_parameters": 500, "total_size": 5 * 200 + 32}


def test_unfinished_or_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-3")
    (source / "hf_speed" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="was not saved to the end"):
        export(source, tmp_path / "model")
    source = checkpoint(tmp_path / "checkpoint-4")
    path = source / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors has \d+ bytes"):
        export(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x"}}, "names the file '../x', which leaves"),
        ({"weight_map": {"a": "b.safetensors"}}, r"b.safetensors is missing or damaged"),
        ({}, "has no weight_map"),
    ],
)
def test_bad_index_is_refused(index: dict[str, object], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        export(source, tmp_path / "model")


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model to export"):
        export(tmp_path, tmp_path / "model")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-3")
    with pytest.raises(ConfigError, match="is not empty; export to a new directory"):
        export(source, source)
    with pytest.raises(ConfigError, match="dtype='int8' is no floating-point dtype"):
        export(source, tmp_path / "model", dtype="int8")
    with pytest.raises(ConfigError, match="max_shard_size='5 apples' is no size"):
        export(source, tmp_path / "model", max_shard_size="5 apples")
