"""Exports: plain files of a Hub model, recast and cut anew on request, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
    (source / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(ConfigError, match=r"has a quantization_config: dtype=torch.float16 would"):
        export(source, tmp_path / "model", dtype="float16")
    (source / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json is damaged: it holds no table"):
        export(source, tmp_path / "model", dtype="float16")


def halved(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in bfloat16 whose masters, in two pieces each, have more bits."""
    masters = {f"layer.{index}.weight": torch.randn(10, 10) for index in range(5)}
    halves = {name: value.bfloat16() for name, value in masters.items()}
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in halves.items()]
    groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in halves)
    plan = ModelPlan(split_files(specs, 500), groups, dict, {}, 500)
    write_model(directory, plan, halves.items(), world=IDENTITY)
    states = [
        LocalState(name, "master", (10, 10), start, 50, value.reshape(-1)[start : start + 50])
        for name, value in masters.items()
        for start in (0, 50)
    ]
    write_states(directory, states, {}, world=IDENTITY)
    text_config = {"dtype": "bfloat16", "hidden_size": 4}
    config = {"dtype": "bfloat16", "text_config": text_config, "limit": float("inf")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, masters


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_made_of_the_masters(dtype: str, tmp_path: Path) -> None:
    source, masters = halved(tmp_path / "checkpoint-3")
    exported = export(source, tmp_path / "model", dtype=dtype)
    for name, value in load(exported).items():
        assert torch.equal(value, masters[name].to(getattr(torch, dtype))), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == (dtype, dtype)
    same = load(export(source, tmp_path / "same", dtype="bfloat16"))
    assert all(torch.equal(same[name], value.bfloat16()) for name, value in masters.items())


def test_masters_of_another_layout_are_converted_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mixtral's experts: one tensor in memory, several on the Hub."""
    master = torch.randn(2, 4, 6)

    def convert(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"expert.{index}": each for index, each in enumerate(values["experts"])}

    hub = {f"expert.{index}": master[index].bfloat16() for index in range(2)}
    specs = [TensorSpec(name, (4, 6), torch.bfloat16) for name in hub]
    group = TensorGroup(("experts",), tuple(hub), is_rename=False)
    plan = ModelPlan(split_files(specs, 1000), (group,), convert, {"tied": "experts"}, 48)
    source = tmp_path / "checkpoint-1"
    write_model(source, plan, [("experts", master.bfloat16())], world=IDENTITY)
    # Under the other name of a tied weight.
    state = LocalState("tied", "master", (2, 4, 6), 0, 48, master.reshape(-1))
    write_states(source, [state], {}, world=IDENTITY)
    loaded = load(export(source, tmp_path / "exact", dtype="float32", layout=lambda _: plan))
    assert all(torch.equal(loaded[f"expert.{index}"], master[index]) for index in range(2))
    assert not caplog.records
    loaded = load(export(source, tmp_path / "short", dtype="float32"))
    assert all(torch.equal(loaded[name], value.float()) for name, value in hub.items())
    assert "keeps 1 masters, first tied, whose names its Hub files do not have" in caplog.text


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "hf_speed"])
def test_a_flipped_bit_is_not_published(dtype: str | None, file: str, tmp_path: Path) -> None:
    source, _ = halved(tmp_path / "checkpoint-3")
    if file == "hf_speed":
        file = next(path.name for path in (source / file).glob("state-*"))
        flip(source / "hf_speed" / file, -1)
        if dtype is None:
            export(source, tmp_path / "model")  # Masters are not part of it.
            return
    else:
        flip(source / file, -1)
    if file.startswith("model") and dtype is not None:
        # Nothing is read from the files where all is made of masters.
        dtype = "bfloat16"
    with pytest.raises(CheckpointError, match=f"{file} is damaged: .*another checksum"):
        export(source, tmp_path / "model", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_link_out_of_the_checkpoint_is_not_published(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    source = checkpoint(tmp_path / "checkpoint-3")
    (source / "vocab.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link to .*secret, outside of"):
        export(source, tmp_path / "model")
    (source / "vocab.txt").unlink()
    (source / "chat_templates" / "x").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"x is a link to .*secret, outside of"):
        export(source, tmp_path / "model")
    (source / "chat_templates" / "x").unlink()
    (source / "vocab.txt").symlink_to("tokenizer.json")
    assert "vocab.txt" in export(source, tmp_path / "model").files


def test_files_without_a_format_get_one(tmp_path: Path) -> None:
    """Without it transformers refuses to load them."""
    source = tmp_path / "model"
    source.mkdir()
    save_file(WEIGHTS, source / "model.safetensors")
    exported = export(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(torch.equal(load(exported)[name], value) for name, value in WEIGHTS.items())


def test_an_adapter_is_exported(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    save_file(WEIGHTS, source / "adapter_model.safetensors", {"format": "pt"})
    (source / "adapter_config.json").write_text("{}")
    exported = export(source, tmp_path / "out", dtype="bfloat16")
    assert exported.files == ("adapter_config.json", "adapter_model.safetensors")
    assert load(exported)["layer.0.weight"].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="holds an adapter, which is one file"):
        export(source, tmp_path / "other", max_shard_size=700)


def test_pickles_are_left_out_and_extras_are_added_before_the_rename(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-3")
    (source / "pytorch_model.bin").write_text("of another export")

    def finish(staging: Path) -> None:
        assert not (tmp_path / "model").exists()
        (staging / "README.md").write_text("x")

    exported = export(source, tmp_path / "model", finish=finish)
    assert "README.md" in exported.files
    assert "pytorch_model.bin" in exported.left_out


def test_memory_is_that_of_a_tensor_whatever_the_model(tmp_path: Path) -> None:
    """128 MiB of weights and as many of masters pass; 8 MiB a tensor."""
    mib = 1 << 20
    source = tmp_path / "checkpoint-3"
    names = [f"layer.{index}" for index in range(16)]
    specs = [TensorSpec(name, (2, 1024, 1024), torch.float32) for name in names]
    groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in names)
    plan = ModelPlan(split_files(specs, 1 << 30), groups, dict, {}, 1)
    value = torch.zeros(2, 1024, 1024)
    write_model(source, plan, ((name, value) for name in names), world=IDENTITY)
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
    before = peak_bytes()
    export(source, tmp_path / "copy")
    export(source, tmp_path / "model", dtype="bfloat16", max_shard_size="32MiB")
    assert peak_bytes() - before < 32 * mib
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) == 2
    states = (
        LocalState(name, "master", (2, 1024, 1024), 0, 2 * mib, value.reshape(-1)) for name in names
    )
    write_states(tmp_path / "model", states, {}, world=IDENTITY, max_shard_bytes=1 << 30)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    export(tmp_path / "model", tmp_path / "wide", dtype="float32", max_shard_size="32MiB")
    assert peak_bytes() - before < 32 * mib


def peak_bytes() -> int:
    """VmHWM: the most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
