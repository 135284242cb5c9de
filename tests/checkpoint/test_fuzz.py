"""Whatever becomes of a checkpoint's bytes: it is refused, or what is read is what was saved.

Deterministic and short here. For a longer hunt: HF_SPEED_FUZZ=20000 .venv/bin/python -m pytest
tests/checkpoint/test_fuzz.py
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_speed.checkpoint import StateReader
from hf_speed.checkpoint.inspection import inspect_checkpoint
from hf_speed.checkpoint.manifest import MANIFEST_PATH, Manifest
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.checkpoint.verify import verify_weights
from hf_speed.errors import CheckpointError
from hf_speed.mesh.axes import IDENTITY
from tests.checkpoint.toys import (
    LOCAL_FILE,
    META,
    SHARDS,
    STATE_FILE,
    STATES,
    WEIGHTS,
    make_checkpoint,
    resigned,
)

EXAMPLES = int(os.environ.get("HF_SPEED_FUZZ", "300"))

FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="HF_SPEED_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Everything(NamedTuple):
    """All that a checkpoint gives its readers."""

    states: list[list[float] | None]
    local: list[int]
    meta: Any
    scalars: Any


def read_everything(directory: Path) -> Everything:
    verify_weights(directory, world=IDENTITY)
    with StateReader(directory) as reader:
        values = [
            reader.read(name, kind, 0, value.numel()) for (name, kind), value in STATES.items()
        ]
        return Everything(
            [None if value is None else value.tolist() for value in values],
            reader.local(0)["cpu_rng"].tolist(),
            dict(reader.meta),
            {name: dict(kinds) for name, kinds in reader.scalars.items()},
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def original(home: Path) -> Everything:
    found = read_everything(home)
    assert found.states == [value.tolist() for value in STATES.values()]
    assert found.local == list(range(16))
    assert found.meta == META
    assert found.scalars == {name: {"step": 5.0} for name in WEIGHTS}
    return found


def mutate(draw: Callable[[st.SearchStrategy], Any], data: bytes) -> bytes:
    """Bytes flipped, removed, put in, doubled, cut off or taken from elsewhere in the file."""
    size = len(data)
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, size)), draw(st.integers(1, 40))
        other = draw(st.integers(0, size))
        kind = draw(st.sampled_from(["flip", "write", "insert", "remove", "copy", "truncate"]))
        if kind == "flip" and at < len(data):
            bit = 1 << draw(st.integers(0, 7))
            data = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        elif kind == "write":
            text = draw(st.binary(min_size=1, max_size=12))
            data = data[:at] + text + data[at + len(text) :]
        elif kind == "insert":
            text = draw(st.sampled_from([b"0", b"9" * 30, b"[" * 70, b'"', b"\\", b",", b"\xff"]))
            data = data[:at] + text + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + length :]
        elif kind == "copy":
            data = data[:at] + data[other : other + length] + data[at + length :]
        else:
            data = data[:at]
    return data


def check(home: Path, original: Everything) -> tuple[bool, bool]:
    """(refused, or all as it was; whether inspect finds it whole)."""
    inspected = inspect_checkpoint(home).is_whole
    try:
        found = read_everything(home)
    except CheckpointError:
        return True, inspected
    assert found == original
    return False, inspected


@FUZZ
@given(st.data())
def test_no_change_of_bytes_is_read_as_something_else(
    home: Path, original: Everything, data: st.DataObject
) -> None:
    names = [MANIFEST_PATH, STATE_FILE, LOCAL_FILE, *SHARDS, "config.json"]
    name = data.draw(st.sampled_from(names))
    path = home / name
    before = path.read_bytes()
    mutated = mutate(data.draw, before)
    try:
        path.write_bytes(mutated)
        refused, is_whole = check(home, original)
        # Only the end of a manifest's line may differ unseen.
        assert not is_whole or mutated.rstrip() == before.rstrip()
        # A config that is still one was edited, for all that a reader of states knows.
        assert refused or is_whole or name == "config.json"
    finally:
        path.write_bytes(before)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "/etc/passwd", STATE_FILE, SHARDS[0], LOCAL_FILE, 1 << 62, 1 << 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has something within it."""
    found = []
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def at(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


@FUZZ
@given(st.data())
def test_a_manifest_by_someone_who_knows_how_ends_in_no_other_error(
    home: Path, data: st.DataObject
) -> None:
    path = home / MANIFEST_PATH
    before = path.read_text()
    body = json.loads(before)
    del body["digest"]
    for _ in range(data.draw(st.integers(1, 2))):
        known = places(body)
        place = data.draw(st.sampled_from(known))
        other = data.draw(st.sampled_from(known))
        kind = data.draw(st.sampled_from(["junk", "swap", "remove", "double"]))
        target = at(body, place[:-1])
        if kind == "junk":
            target[place[-1]] = data.draw(JUNK)
        elif kind == "swap":
            target[place[-1]] = json.loads(json.dumps(at(body, other)))
        elif kind == "remove":
            del target[place[-1]]
        elif isinstance(target, list):
            target.append(target[place[-1]])
        body = json.loads(json.dumps(body))
    try:
        path.write_text(resigned(body))
        inspect_checkpoint(home)
        try:
            everything = read_everything(home)
        except CheckpointError:
            return
        except KeyError as error:
            assert error.args == ("cpu_rng",)  # noqa: PT017 - a rank that has stored nothing
            return
        # Values that are read have the checksums and the place that the manifest gives them.
        assert len(everything.states) == len(STATES)
    finally:
        path.write_text(before)


@FUZZ
@given(st.data())
def test_no_text_crashes_the_reader_of_manifests(home: Path, data: st.DataObject) -> None:
    text = data.draw(
        st.text(max_size=200)
        | st.from_regex(r'\{"format_version": [12], "(meta|files|x)": .{0,40}\}', fullmatch=True)
        | st.just((home / MANIFEST_PATH).read_text()).flatmap(
            lambda whole: st.integers(0, len(whole)).map(lambda end: whole[:end])
        )
    )
    try:
        found = Manifest.from_json(text, where="m")
    except CheckpointError:
        return
    assert found == read_manifest(home)


def test_pieces_that_change_places_are_refused(home: Path, tmp_path: Path) -> None:
    """Sound files in the wrong place: names swapped, or of another save."""
    copy = shutil.copytree(home, tmp_path / "copy")
    first, second = (copy / name for name in SHARDS)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CheckpointError, match=SHARDS[0]):
        read_everything(copy)
    other = tmp_path / "other"
    WEIGHTS["head"].mul_(2)
    try:
        make_checkpoint(other)
    finally:
        WEIGHTS["head"].div_(2)
    shutil.copy(other / SHARDS[1], home.parent / "y")
    copy = shutil.copytree(home, tmp_path / "again")
    shutil.copy(other / SHARDS[1], copy / SHARDS[1])
    with pytest.raises(CheckpointError, match="is damaged: in 'head'"):
        read_everything(copy)
    assert torch.equal(WEIGHTS["head"], torch.arange(8.0).view(2, 4).to(torch.bfloat16))
