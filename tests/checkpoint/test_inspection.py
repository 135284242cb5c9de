"""`hf-speed inspect`: every bad file is named, whatever is wrong with it; what is whole, is."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_speed.checkpoint import StateReader, read_manifest
from hf_speed.checkpoint.digest import digest_file
from hf_speed.checkpoint.export import export
from hf_speed.checkpoint.inspection import Inspection, inspect_checkpoint
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.plan import INDEX_NAME
from hf_speed.checkpoint.tensorfile import write_tensors
from hf_speed.cli import main
from hf_speed.errors import CheckpointError
from tests.checkpoint.toys import (
    LOCAL_FILE,
    SHARDS,
    STATE_FILE,
    edit_manifest,
    flip,
    make_checkpoint,
)

BLOCK = 8 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    make_checkpoint(path)
    return path


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint-5")


def named(found: Inspection) -> dict[str, str]:
    return {problem.file: problem.text for problem in found.problems}


def test_whole_checkpoint_is_whole_and_said_to_be(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(home)]) == 0
    out = capsys.readouterr().out
    for text in (
        "whole; 6 files, ",
        "checksums compared",
        "written by 1 rank(s)",
        "after 5 steps of the optimizer",
        'mesh: {"dp_shard": 1}',
        "stage: 2",
        'optimizer: "AdamW"',
        "exp_avg: 2 tensors, 128 bytes",
    ):
        assert text in out
    assert main(["inspect", str(home), "--fast"]) == 0
    assert "sizes compared, not contents" in capsys.readouterr().out


def test_every_flipped_byte_of_every_file_is_found_and_its_file_named(home: Path) -> None:
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        data = path.read_bytes()
        for at in {*range(0, len(data), 11), len(data) - 1}:
            mutated = bytearray(data)
            mutated[at] ^= 1 << (at % 8)
            path.write_bytes(mutated)
            found = named(inspect_checkpoint(home))
            if path.name == "manifest.json" and mutated.rstrip() == data.rstrip():
                continue  # The line's end says nothing.
            assert set(found) == {str(path.relative_to(home))}, at
        path.write_bytes(data)
    assert inspect_checkpoint(home).is_whole


def test_every_bad_file_is_named_and_the_tensor_too(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(home / SHARDS[1], -1)
    flip(home / STATE_FILE, -1)
    flip(home / LOCAL_FILE, -1)
    (home / SHARDS[0]).unlink()
    (home / INDEX_NAME).write_text("{}")
    assert main(["inspect", str(home), "--json"]) == 1
    (body,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert body["whole"] is False
    problems = {problem["file"]: problem["text"] for problem in body["problems"]}
    assert set(problems) == {SHARDS[0], SHARDS[1], STATE_FILE, LOCAL_FILE, INDEX_NAME}
    assert problems[SHARDS[0]] == "is missing; it holds weights of the model."
    assert problems[SHARDS[1]].startswith("'head' is damaged (bytes ")
    assert problems[STATE_FILE].startswith("the exp_avg of head ('exp_avg/head@0') is damaged")
    # What can be seen without reading.
    assert main(["inspect", str(home), "--fast", "--json"]) == 1
    (body,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert {problem["file"] for problem in body["problems"]} == {SHARDS[0], INDEX_NAME}
    assert main(["inspect", str(home)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED, 5 bad files" in out
    assert f"!! {SHARDS[0]}: is missing" in out


def _retold(name: str, home: Path) -> Callable[[dict[str, Any]], object]:
    """Have the manifest say that a file should be as it is."""
    record = digest_file(home / name)

    def edit(body: dict[str, Any]) -> None:
        listed = body["files"][name]
        listed |= {"bytes": record.nbytes, "digest": record.digest}
        if "tensors" in listed:
            listed["tensors"] = dict(record.tensors)

    return edit


def test_weights_that_do_not_fit_the_index_are_named(home: Path) -> None:
    write_tensors(home / SHARDS[0], {"other": torch.zeros(3)})
    edit_manifest(home, _retold(SHARDS[0], home))
    texts = [(problem.file, problem.text) for problem in inspect_checkpoint(home).problems]
    assert texts == [
        (SHARDS[0], "it lacks 'embed', which the index puts there."),
        (SHARDS[0], "it has 'other', which the index does not put there."),
    ]
    index = json.loads((home / INDEX_NAME).read_text())
    for weight_map, file, text in (
        ({"head": SHARDS[1]}, SHARDS[0], "the index puts no weight there."),
        ({"head": "absent.safetensors"}, "absent.safetensors", "it is missing; the index names it"),
        ({"head": "../x"}, INDEX_NAME, "names the file '../x', which is not beside it"),
        ({}, INDEX_NAME, "it has no weight_map"),
    ):
        (home / INDEX_NAME).write_text(json.dumps({**index, "weight_map": weight_map}))
        edit_manifest(home, _retold(INDEX_NAME, home))
        problems = inspect_checkpoint(home).problems
        assert any(each.file == file and text in each.text for each in problems), text
    (home / INDEX_NAME).unlink()
    edit_manifest(home, lambda body: body["files"].pop(INDEX_NAME))
    assert named(inspect_checkpoint(home)) == {
        INDEX_NAME: "it is missing; 2 files of weights need it."
    }


def test_states_that_do_not_fit_the_manifest_are_named(home: Path) -> None:
    write_tensors(home / STATE_FILE, {"exp_avg/embed@0": torch.zeros(6, 4), "x": torch.zeros(16)})
    edit_manifest(home, _retold(STATE_FILE, home))
    texts = [problem.text for problem in inspect_checkpoint(home, fast=True).problems]
    assert texts == [
        "it lacks the exp_avg of head ('exp_avg/head@0').",
        "it lacks the master of head ('master/head@0').",
        "it has 'x', which the manifest does not know.",
    ]
    write_tensors(
        home / STATE_FILE,
        {
            "exp_avg/embed@0": torch.zeros(4, 6),
            "exp_avg/head@0": torch.zeros(2, 4, dtype=torch.int32),
            "master/head@0": torch.zeros(2, 4),
        },
    )
    edit_manifest(home, _retold(STATE_FILE, home))
    texts = [problem.text for problem in inspect_checkpoint(home, fast=True).problems]
    assert texts == [
        f"it has the exp_avg of {name} ('exp_avg/{name}@0') as {there}; the manifest says {here}."
        for name, there, here in (
            ("embed", "(4, 6) F32", "(6, 4) F32"),
            ("head", "(2, 4) I32", "(2, 4) F32"),
        )
    ]


def test_checkpoint_without_a_readable_manifest_is_damaged_not_absent(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(home / MANIFEST_PATH, 300)
    flip(home / SHARDS[0], 3)
    found = named(inspect_checkpoint(home))
    assert "was changed after it was written" in found[MANIFEST_PATH]
    assert set(found) == {MANIFEST_PATH, SHARDS[0]}
    (home / MANIFEST_PATH).unlink()
    assert main(["inspect", str(home)]) == 1
    assert "was not saved to the end" in capsys.readouterr().out


def test_all_checkpoints_of_a_run_are_inspected(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(home.parent / "checkpoint-10", knows=False)
    flip(home.parent / "checkpoint-10" / STATE_FILE, -1)
    (home / "hf_speed" / "state-000-rank00000-00000.safetensors").write_bytes(b"")
    assert main(["inspect", str(home.parent)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert lines[0].startswith(f"{home}: whole")
    assert lines[2].startswith(f"{home.parent / 'checkpoint-10'}: DAMAGED, 1 bad files")
    (note,) = inspect_checkpoint(home).notes
    assert "state-000-rank00000-00000.safetensors does not belong to it: left by a save" in note
    assert main(["inspect", str(home / "hf_speed")]) == 2
    assert "holds no hf_speed training state" in capsys.readouterr().err


def test_reading_is_told_block_by_block(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, {"a": torch.zeros(BLOCK + 5, dtype=torch.uint8)})
    told: list[int] = []
    assert digest_file(path, told.append) == written
    assert told == [BLOCK, 5]


def test_a_config_that_was_edited_is_named_and_does_not_stop_a_run(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = home / "config.json"
    config.write_text('{"hidden_size": 4, "note": "edited", "limit": Infinity}')
    with StateReader(home) as reader:
        assert reader.read("embed", "exp_avg", 0, 24) is not None
    assert re.search(r"config\.json has 55 bytes instead of 18.* The training goes on", caplog.text)
    assert main(["inspect", str(home)]) == 1
    assert "config.json" in named(inspect_checkpoint(home))
    with pytest.raises(CheckpointError, match=r"config\.json has 55 bytes instead of 18"):
        export(home, tmp_path / "out")
    for text in ("[4]", '{"hidden_size": '):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json has .* is not whole"):
            read_manifest(home)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_manifest(home)
