"""doctor, plan, inspect and export print what they find; a mistake of the user's ends with 2."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_speed.cli import main, plan
from hf_speed.errors import ConfigError

GIB = 1 << 30


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_doctor_finds_no_fault_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch            {torch.__version__}" in out
    assert "no problem found" in out


def test_doctor_names_a_wrong_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SPEED_CONFIG", '{"zreo": {}}')
    assert main(["doctor"]) == 1
    assert "!!  HF_SPEED_CONFIG  Unknown config key 'zreo'" in capsys.readouterr().out


def test_plan_counts_the_model(model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(model_directory / "config.json"), "-n", "4", "--memory", "80GiB"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "in 4 units" in out
    assert "-> stage 0" in out
    assert "mesh.dp_shard" in out
    assert "checkpoint.asynchronous (off): a save copies up to 0.00" in out


def test_plan_takes_the_stage_of_the_config(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "zero.yaml"
    path.write_text("zero: {stage: 3, units: [LlamaMLP]}")
    assert main(["plan", str(model_directory), "--config", str(path), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "-> stage 3" in out
    assert "on the device, which is the host" in out


def test_plan_says_where_the_bytes_are_and_what_would_fit(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(model_directory), "--memory", "150KiB", "--host", "1GiB"]
    assert main([*words, "--disk", "1GiB"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("offload.optimizer"))
    assert row.split()[1] == "host"
    assert row.endswith("moments and masters; auto, with the stage")
    chosen = next(line.split() for line in out.splitlines() if line.startswith("->"))
    *_, staging, device, host, disk = chosen
    assert float(host) >= float(staging) == 0.25
    assert float(device) < 1e-3
    assert float(disk) == 0
    assert "of the largest model with blocks like these" in out
    fits = out.splitlines()[-9:]
    assert [line.split()[0] for line in fits] == ["device", *["host"] * 3, *["disk"] * 5]


def test_plan_compares_stages_on_the_tiers_of_the_config(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.yaml"
    path.write_text(
        "zero: {stage: 2}\noffload: {optimizer: disk, gradients: host, parameters: device,\n"
        f"  paths: [{tmp_path}], staging_bytes: 16777216}}"
    )
    words = ["plan", str(model_directory), "--config", str(path), "-n", "2"]
    assert main([*words, "--memory", "1GiB", "--host", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "-> stage 2" in out
    assert f"offload.paths               {tmp_path}" in out
    assert " on the host, " in out
    assert "The disk" not in out


def test_plan_shows_every_plan_where_none_fits(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model_directory), "--memory", "16KiB", "--host", "1MiB"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-speed: No plan fits this model.")
    assert len([line for line in captured.err.splitlines() if line[2:3].isdigit()]) == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "no/such/model"], "No model config can be read from 'no/such/model'"),
        (["plan", "MODEL", "--memory", "lots"], "--memory 'lots' is not a size"),
        (["plan", "MODEL", "--disk", "lots"], "--disk 'lots' is not a size"),
        (["plan", "MODEL", "--host", "1GiB"], "--host is the memory beside a GPU, but here the"),
        (["inspect", "MODEL"], "holds no hf_speed training state"),
        (["export", "MODEL", "OUT"], "there is no model to export"),
    ],
)
def test_mistake_ends_with_its_message(
    words: list[str], message: str, model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(model_directory), "OUT": str(model_directory.parent / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-speed: ")
    assert message in captured.err


def test_export_writes_a_model_that_transformers_loads(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_directory))
    model.save_pretrained(model_directory)
    assert main(["export", str(model_directory), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("512", 512),
        ("2KB", 2048),
        ("1TiB", 1024 * GIB),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert plan.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "GiB", "1PiB"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: write it as 80GiB"):
        plan.parse_bytes(text)
