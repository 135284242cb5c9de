"""The manifest: there and back unchanged, and refused for whatever is wrong in it."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_speed.checkpoint.digest import FileRecord, digest_of
from hf_speed.checkpoint.manifest import Entry, Manifest, Piece, merge_entries
from hf_speed.errors import CheckpointError

FILE = "hf_speed/state-001-rank00000-00000.safetensors"


def manifest() -> Manifest:
    pieces = (
        Piece(FILE, "a", (0, 0), (1, 3), digest_of(b"a")),
        Piece(FILE, "b", (1, 0), (1, 3), digest_of(b"b")),
    )
    entry = Entry("layer.weight", "exp_avg", (2, 3), torch.float32, pieces)
    return Manifest(
        world_size=2,
        meta={"stage": 3, "param_groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]},
        scalars={"layer.weight": {"step": 7.0}},
        files={
            FILE: FileRecord(1000, digest_of(b"c")),
            "model.safetensors": FileRecord(5, digest_of(b"d"), {"lm_head": digest_of(b"e")}),
        },
        entries=(entry,),
        local={0: FILE},
        package_version="0.1.0",
    )


def edited(edit: Callable[[dict[str, Any]], None]) -> str:
    body = json.loads(manifest().to_json())
    edit(body)
    return signed(body)


def signed(body: dict[str, Any]) -> str:
    """With the checksum that the edited manifest should have."""
    unsigned = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(unsigned).removesuffix("}")
    return f'{text}, "digest": "{digest_of(text.encode())}"}}'


def test_json_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json(), where="m") == manifest()


def _set(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return edit


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


PIECES = ["entries", 0, "pieces"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 3, "format_version 3; this hf_speed reads 1 and 2"),
        (["format_version"], 2.0, "format_version 2.0"),
        (["format_version"], 1, "the size is dict where int is expected"),
        (["checksums"], "crc32", "checksums of the kind 'crc32'; known is 'xxh3_128'"),
        (["world_size"], "2", "world_size is str where int is expected"),
        (["world_size"], True, "world_size is True where a count is expected"),
        (["world_size"], 1 << 63, "world_size is 9223372036854775808 where a count"),
        (["world_size"], 1 << 64, "damaged: the number 18446744073709551616... has more than 64"),
        (["meta"], [0], "meta is list where dict"),
        (["meta", "deep"], nested(80), "nested more than 64 deep"),
        (["entries"], {}, "entries is dict where list is expected"),
        (["entries", 0], 3, "the entry is int where dict"),
        (["entries", 0, "dtype"], "F99", "dtype 'F99' is unknown"),
        (["entries", 0, "shape"], [2, -3], "shape is -3 where a count"),
        (["entries", 0, "shape"], [2, 4], "2 of 8 elements are missing"),
        (["entries", 0, "shape"], [2], "does not fit in shape"),
        ([*PIECES, 0], [FILE, "a"], "a piece has 2 fields"),
        ([*PIECES, 0, 1], "b", "two pieces are said to be 'b' in"),
        ([*PIECES, 0, 1], "\ud800", "a piece's key is .* which is no text"),
        ([*PIECES, 0, 4], None, "a piece's checksum is None, not 32 hexadecimal digits"),
        ([*PIECES, 0, 4], "0" * 31, "a piece's checksum is '0{31}', not 32"),
        ([*PIECES, 0, 0], "../evil", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "/etc/passwd", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "a/./b", "leaves the checkpoint's directory"),
        ([*PIECES, 0, 0], "..\\evil", "is not a file name"),
        ([*PIECES, 0, 0], 7, "7 is not a file name"),
        ([*PIECES, 0, 0], "other", "puts 12 bytes in other, whose listed size is absent"),
        ([*PIECES, 1, 2], [0, 0], "overlap"),
        (["files", FILE, "bytes"], 23, "puts 24 bytes in .*, whose listed size is 23"),
        (["files", FILE, "bytes"], -1, "the size is -1 where a count"),
        (["files", FILE], 1000, "the record is int where dict"),
        (["files", FILE, "digest"], "F" * 32, "the checksum is 'F{32}', not 32"),
        (["files", FILE, "tensors"], {"x": 7}, "that of 'x' is 7, not 32 hexadecimal digits"),
        (["files", "../x"], 1, "leaves the checkpoint's directory"),
        (["local", "one"], FILE, "local has the rank 'one'"),
        (["local", "01"], FILE, "local has the rank '01'"),
        (["local", "9" * 5000], FILE, "local has the rank '9+"),
        (["local", "1"], "absent", "whose listed size is absent"),
        (["scalars", "layer.weight", "step"], [1], "step of layer.weight is not a number"),
    ],
)
def test_bad_field_is_refused_by_name(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(edited(_set(path, value)), where="dir/manifest.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged: Expecting value"),
        ("[", "is damaged: Expecting value"),
        ("[" * 100_000, "is damaged: .*recursion"),
        ("3", "the manifest is int where dict"),
        ('{"format_version": NaN}', "NaN is not JSON"),
        ('{"format_version": -Infinity}', "-Infinity is not JSON"),
        ('{"format_version": 1e999}', "the number 1e999 is not finite"),
        ('{"format_version": ' + "9" * 100_000 + "}", "has more than 64 bits"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is there twice"),
        ("{}", "format_version None"),
    ],
)
def test_damaged_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)dir/manifest\.json.*{message}"):
        Manifest.from_json(text, where="dir/manifest.json")


def test_change_of_any_byte_is_refused_unless_it_changes_nothing() -> None:
    text = manifest().to_json()
    for index, letter in enumerate(text):
        for other in "0 x}" if letter != "\n" else " x":
            mutated = text[:index] + other + text[index + 1 :]
            with suppress(CheckpointError):
                assert Manifest.from_json(mutated, where="m") == manifest()
                assert mutated.rstrip() == text.rstrip()


def test_manifest_that_was_changed_by_hand_says_so() -> None:
    text = manifest().to_json().replace("0.001", "0.002")
    with pytest.raises(CheckpointError, match="was changed after it was written, or is damaged"):
        Manifest.from_json(text, where="m")
    with pytest.raises(CheckpointError, match="does not end with its checksum"):
        Manifest.from_json(json.dumps(json.loads(text), indent=2), where="m")


def test_manifest_without_checksums_is_still_read() -> None:
    body = json.loads(manifest().to_json())
    body["format_version"] = 1
    body["files"] = {path: record["bytes"] for path, record in body["files"].items()}
    for entry in body["entries"]:
        entry["pieces"] = [piece[:4] for piece in entry["pieces"]]
    del body["digest"], body["checksums"]
    found = Manifest.from_json(json.dumps(body), where="m")
    assert not found.has_checksums
    assert manifest().has_checksums
    assert found.files[FILE] == FileRecord(1000)
    assert [piece.box for piece in found.entries[0].pieces] == [
        piece.box for piece in manifest().entries[0].pieces
    ]


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
        Manifest.from_json(signed(body), where="m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(1), {1, 2}])
def test_values_that_json_cannot_hold_are_refused_at_the_save(value: Any) -> None:
    with pytest.raises(CheckpointError, match="meta data cannot be stored as JSON"):
        manifest()._replace(meta={"lr": value}).to_json()


def test_ranks_that_disagree_on_a_tensor_are_refused() -> None:
    entry = manifest().entries[0]
    with pytest.raises(CheckpointError, match=r"ranks disagree on the exp_avg of layer.weight"):
        merge_entries([entry, entry._replace(shape=(3, 2))], where="m")
