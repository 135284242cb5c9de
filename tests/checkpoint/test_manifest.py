"""The manifest: there and back unchanged, and refused for whatever is wrong in it."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_speed.checkpoint.manifest import Entry, Manifest, Piece, merge_entries
from hf_speed.errors import CheckpointError

FILE = "hf_speed/state-001-rank00000-00000.safetensors"


def manifest() -> Manifest:
    pieces = (Piece(FILE, "a", (0, 0), (1, 3)), Piece(FILE, "b", (1, 0), (1, 3)))
    entry = Entry("layer.weight", "exp_avg", (2, 3), torch.float32, pieces)
    return Manifest(
        world_size=2,
        meta={"stage": 3, "param_groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]},
        scalars={"layer.weight": {"step": 7.0}},
        files={FILE: 1000, "model.safetensors": 5},
        entries=(entry,),
        local={0: FILE},
        package_version="0.1.0",
    )


def edited(edit: Callable[[dict[str, Any]], None]) -> str:
    body = json.loads(manifest().to_json())
    edit(body)
    return json.dumps(body)


def test_json_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json(), where="m") == manifest()


def _set(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return edit


PIECES = ["entries", 0, "pieces"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 2, "format_version 2; this hf_speed reads 1"),
        (["world_size"], "2", "world_size is str where int is expected"),
        (["world_size"], True, "world_size is True where a count is expected"),
        (["entries"], {}, "entries is dict where list is expected"),
        (["entries", 0], 3, "the entry is int where dict"),
        (["entries", 0, "dtype"], "F99", "dtype 'F99' is unknown"),
        (["entries", 0, "shape"], [2, -3], "shape is -3 where a count"),
        (["entries", 0, "shape"], [2, 4], "2 of 8 elements are missing"),
        (["entries", 0, "shape"], [2], "does not fit in shape"),
        ([*PIECES, 0], [FILE, "a"], "a piece has 2 fields"),
        ([*PIECES, 0, 0], "../evil", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "/etc/passwd", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "a/./b", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "..\\evil", "is not a file name"),
        ([*PIECES, 0, 0], 7, "7 is not a file name"),
        ([*PIECES, 0, 0], "other", "puts 12 bytes in other, whose listed size is absent"),
        ([*PIECES, 1, 2], [0, 0], "overlap"),
        (["files", FILE], 23, "puts 24 bytes in .*, whose listed size is 23"),
        (["files", "../x"], 1, "leaves the checkpoint's directory"),
        (["local", "one"], FILE, "local has the rank 'one'"),
        (["local", "1"], "absent", "whose listed size is absent"),
        (["scalars", "layer.weight", "step"], [1], "step of layer.weight is not a number"),
    ],
)
def test_bad_field_is_refused_by_name(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(edited(_set(path, value)), where="dir/manifest.json")


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "3", '{"format_version": NaN}', "{}"])
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"dir/manifest\.json"):
        Manifest.from_json(text, where="dir/manifest.json")


def test_entry_listed_twice_is_refused() -> None:
    text = edited(lambda body: body["entries"].append(body["entries"][0]))
    with pytest.raises(CheckpointError, match=r"exp_avg of layer\.weight twice"):
        Manifest.from_json(text, where="m")


@given(st.data())
def test_no_edit_crashes_the_reader(data: st.DataObject) -> None:
    body = json.loads(manifest().to_json())
    keys = st.sampled_from(sorted(body))
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    body[data.draw(keys)] = data.draw(junk)
    with suppress(CheckpointError):
        Manifest.from_json(json.dumps(body), where="m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(1), {1, 2}])
def test_values_that_json_cannot_hold_are_refused_at_the_save(value: Any) -> None:
    with pytest.raises(CheckpointError, match="meta data cannot be stored as JSON"):
        manifest()._replace(meta={"lr": value}).to_json()


def test_ranks_that_disagree_on_a_tensor_are_refused() -> None:
    entry = manifest().entries[0]
    with pytest.raises(CheckpointError, match=r"ranks disagree on the exp_avg of layer.weight"):
        merge_entries([entry, entry._replace(shape=(3, 2))], where="m")
