"""Every form in which a config may come, and every way in which it may be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_speed.config import SpeedConfig, ZeroConfig, known_paths, load_config
from hf_speed.config.owned import DEEPSPEED_NAMES, OWNED_KEYS
from hf_speed.errors import ConfigError

STAGE_3 = SpeedConfig(zero=ZeroConfig(stage=3))


def test_every_form_gives_the_same_config(tmp_path: Path) -> None:
    yaml_file, json_file = tmp_path / "zero3.yaml", tmp_path / "zero3.json"
    yaml_file.write_text("zero:\n  stage: 3\n")
    json_file.write_text('{"zero": {"stage": 3}}')
    forms: list[Any] = [
        STAGE_3,
        {"zero": {"stage": 3}},
        {"zero": ZeroConfig(stage=3)},
        ' {"zero": {"stage": 3}}',
        str(yaml_file),
        yaml_file,
        json_file,
    ]
    for form in forms:
        assert load_config(form) == STAGE_3, form


def test_nothing_and_an_empty_file_leave_every_choice_open(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config(None) == load_config({}) == load_config(empty) == SpeedConfig()


def test_auto_is_the_same_as_leaving_out() -> None:
    tree = {
        "zero": {"stage": "auto", "units": "auto"},
        "mesh": {"dp_shard": "auto"},
        "precision": {"reduce_dtype": "auto"},
        "offload": {"optimizer": "auto", "host_bytes": "auto", "update": "auto"},
    }
    assert load_config(tree) == SpeedConfig()
    with pytest.raises(ConfigError, match=r"mesh\.dp_replicate='auto' is of type str"):
        load_config({"mesh": {"dp_replicate": "auto"}})


@given(
    stage=st.none() | st.integers(0, 3),
    units=st.just("auto") | st.lists(st.text(min_size=1), min_size=1, unique=True),
    timeout_s=st.floats(1, 86400),
    paths=st.lists(st.text(min_size=1), unique=True),
)
def test_to_dict_round_trips_through_json(
    stage: int | None, units: str | list[str], timeout_s: float, paths: list[str]
) -> None:
    tree = {
        "zero": {"stage": stage, "units": units},
        "debug": {"timeout_s": timeout_s},
        "offload": {"paths": paths, "optimizer": "disk", "cpu_share": 0.5},
    }
    config = load_config(tree)
    assert load_config(json.dumps(config.to_dict())) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"zero": {"stgae": 3}},
            r"Unknown config key 'zero\.stgae'\. Did you mean 'zero\.stage'\?",
        ),
        ({"zreo": {"stage": 3}}, r"Unknown config key 'zreo'\. Did you mean 'zero'\?"),
        ({"stage": 3}, r"'stage'\. Did you mean 'zero\.stage'\?"),
        ({"zero": {"reduce_dtype": "float32"}}, r"Did you mean 'precision\.reduce_dtype'\?"),
        ({"precision": {"loss_scale": {"windw": 3}}}, r"'precision\.loss_scale\.window'\?"),
        ({"Zero": {"stage": 3}}, r"'Zero'\. Did you mean 'zero'\?"),
        ({3: 1}, r"Unknown config key '3'"),
    ],
)
def test_unknown_key_names_the_nearest(tree: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tree)


@pytest.mark.parametrize("path", [path for path in known_paths() if "." in path])
def test_one_lost_letter_is_found_again(path: str) -> None:
    section, _, key = path.rpartition(".")
    tree: dict[str, Any] = {key[:-1]: 1}
    for name in reversed(section.split(".")):
        tree = {name: tree}
    with pytest.raises(ConfigError, match=f"Did you mean '{path}'"):
        load_config(tree)


@pytest.mark.parametrize("key", sorted(OWNED_KEYS))
def test_key_that_training_arguments_own_names_its_owner(key: str) -> None:
    for tree in ({key: 1}, {"zero": {key: 1}}):
        with pytest.raises(ConfigError, match="does not belong in the hf_speed config") as caught:
            load_config(tree)
        assert OWNED_KEYS[key] in str(caught.value)


def test_owners_exist_in_training_arguments() -> None:
    import re
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {entry.name for entry in fields(TrainingArguments)}
    for owner in OWNED_KEYS.values():
        named = re.search(r"TrainingArguments\(([^)]*)\)", owner)
        if named:
            assert set(re.findall(r"(\w+)=", named[1])) <= known, owner


@pytest.mark.parametrize("key", sorted(DEEPSPEED_NAMES))
def test_deepspeed_name_says_what_to_do(key: str) -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed's name. (Write|Remove)") as caught:
        load_config({key: 1})
    for word in str(caught.value).split():
        path = word.strip(".,:").partition("=")[0]
        if path.count(".") and path.split(".")[0] in set(known_paths()):
            assert path in set(known_paths()), word


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "zero: [", r"a\.yaml is not valid YAML"),
        ("a.json", "{'zero': 3}", r"a\.json is not valid JSON"),
        ("a.yaml", "zero:\n  stage: 1\n  stage: 2\n", "The key 'stage' is given twice"),
        ("a.json", '{"zero": {}, "zero": {"stage": 1}}', "The key 'zero' is given twice"),
        ("a.yaml", "- zero\n", r"The config=\['zero'\] is of type list: it must be a section"),
        ("a.yaml", "zero: 3\n", "zero=3 is of type int: it must be a section with keys stage, "),
        ("a.toml", "zero = 3", r"does not end in \.yaml, \.yml or \.json"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file_and_wrong_type_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml' cannot be read"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="the given JSON text is not valid JSON"):
        load_config("{zero: 3}")
    with pytest.raises(ConfigError, match="A config of type int cannot be read"):
        load_config(3)  # pyrefly: ignore
