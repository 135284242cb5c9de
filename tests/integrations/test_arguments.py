"""The `hf_speed` field survives everything that TrainingArguments go through."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

import hf_speed
from hf_speed.config.tree import SpeedConfig, ZeroConfig
from hf_speed.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIG = {"zero": {"stage": 2}}
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True}


def _classes() -> list[type]:
    return [hf_speed.TrainingArguments, hf_speed.integrate_args(trl.SFTConfig)]


def _make(kind: type, directory: Path, config: Any, **options: Any) -> Any:
    # trl turns bf16 on by itself, which no CPU of ours has.
    return kind(output_dir=str(directory), hf_speed=config, bf16=False, **QUIET, **options)


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_the_field_survives_copies_and_json(kind: type, tmp_path: Path) -> None:
    args = _make(kind, tmp_path, CONFIG)
    assert args.hf_speed == CONFIG
    assert args.hf_speed_config == SpeedConfig(zero=ZeroConfig(stage=2))
    assert args.to_dict()["hf_speed"] == CONFIG
    assert json.loads(args.to_json_string())["hf_speed"] == CONFIG
    assert args.to_sanitized_dict()["hf_speed"] == str(CONFIG)
    again = pickle.loads(pickle.dumps(args))
    assert type(again).__name__ == kind.__name__
    assert again.hf_speed_config == args.hf_speed_config
    assert again.to_dict() == args.to_dict()
    other = dataclasses.replace(args, hf_speed={"zero": {"stage": 1}})
    assert other.hf_speed_config.zero.stage == 1
    assert args.hf_speed_config.zero.stage == 2
    assert "per_device_train_batch_size" in repr(args)


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_the_command_line_takes_a_path_or_json(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "zero3.yaml"
    path.write_text("zero: {stage: 3}\n")
    parser = transformers.HfArgumentParser(kind)
    line = [
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "False",
        "--report_to",
        "none",
        "--use_cpu",
        "True",
    ]
    (args,) = parser.parse_args_into_dataclasses([*line, "--hf_speed", str(path)])
    assert (args.hf_speed, args.hf_speed_config.zero.stage) == (str(path), 3)
    (args,) = parser.parse_args_into_dataclasses([*line, "--hf_speed", '{"zero": {"stage": 1}}'])
    assert (args.hf_speed, args.hf_speed_config.zero.stage) == ({"zero": {"stage": 1}}, 1)
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.hf_speed, args.hf_speed_config) == (None, None)


def test_every_form_of_a_config_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    forms = [CONFIG, str(path), path, json.dumps(CONFIG), SpeedConfig(zero=ZeroConfig(stage=2))]
    made = [_make(hf_speed.TrainingArguments, tmp_path, form) for form in forms]
    assert {each.hf_speed_config for each in made} == {SpeedConfig(zero=ZeroConfig(stage=2))}
    for each in made:
        json.loads(each.to_json_string())


def test_without_a_config_nothing_changes(tmp_path: Path) -> None:
    plain = transformers.TrainingArguments(output_dir=str(tmp_path), **QUIET)
    ours = _make(hf_speed.TrainingArguments, tmp_path, None)
    assert ours.hf_speed_config is None
    assert ours.place_model_on_device == plain.place_model_on_device
    assert {**plain.to_dict(), "hf_speed": None} == ours.to_dict()


def test_the_launcher_carries_a_config_and_the_argument_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SPEED_CONFIG", '{"zero": {"stage": 1}}')
    assert _make(hf_speed.TrainingArguments, tmp_path, None).hf_speed_config.zero.stage == 1
    assert _make(hf_speed.TrainingArguments, tmp_path, CONFIG).hf_speed_config.zero.stage == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deepspeed": {"train_batch_size": "auto"}}, "hf_speed and deepspeed="),
        ({"fsdp": "full_shard"}, "hf_speed and fsdp="),
        ({"auto_find_batch_size": True}, "Set per_device_train_batch_size yourself"),
        (
            {"parallelism_config": object()},
            "set mesh.pp, mesh.tp, mesh.dp_replicate and mesh.dp_shard",
        ),
    ],
)
def test_a_second_backend_is_an_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(hf_speed.TrainingArguments, tmp_path, CONFIG, **options)


def test_wrong_keys_are_errors_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero\.stage"):
        _make(hf_speed.TrainingArguments, tmp_path, {"zero": {"stgae": 3}})
    with pytest.raises(ConfigError, match="owns it"):
        _make(hf_speed.TrainingArguments, tmp_path, {"train_batch_size": 8})


def test_only_argument_classes_can_be_integrated() -> None:
    with pytest.raises(ConfigError, match="integrate_args needs"):
        hf_speed.integrate_args(dict)
    with pytest.raises(ConfigError, match="integrate_trainer needs"):
        hf_speed.integrate_trainer(dict)
    assert hf_speed.integrate_args(hf_speed.TrainingArguments) is hf_speed.TrainingArguments
    assert hf_speed.integrate_trainer(hf_speed.Trainer) is hf_speed.Trainer
