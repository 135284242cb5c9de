"""Files by someone who means harm, or by a broken disk: each is refused by name, with a reason."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_speed.checkpoint import StateReader, read_manifest, write_states
from hf_speed.checkpoint.digest import digest_file
from hf_speed.checkpoint.header import MAX_HEADER_BYTES
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.mapped import MappedFile
from hf_speed.checkpoint.strict_json import load_json
from hf_speed.checkpoint.verify import verify_weights
from hf_speed.checkpoint.written import WrittenFiles
from hf_speed.engine.rng import load_rng
from hf_speed.engine.saved_run import (
    check_hyperparameter,
    counter,
    masters_in_files,
    saved_run,
)
from hf_speed.errors import CheckpointError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.axes import IDENTITY
from tests.checkpoint.toys import (
    LOCAL_FILE,
    META,
    SHARDS,
    STATE_FILE,
    edit_manifest,
    make_checkpoint,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    make_checkpoint(path)
    return path


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "checkpoint")


# ---- headers ----


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\x01\x02", "it has 2 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808"),
        ((3).to_bytes(8, "little") + b"{}", "it has 10 bytes, and a header of 3"),
        (file_of(b"\xff\xfe"), "its header is no text"),
        (file_of(b"{"), "the header is damaged: Expecting"),
        (file_of(b"[]"), "the header is list where dict"),
        (file_of(b"[" * 5000), "the header is damaged"),
        (file_of(b'{"a": NaN}'), "NaN is not JSON"),
        (file_of(b'{"a": ' + b"9" * 60 + b"}"), "more than 64 bits"),
        (
            file_of(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
            "the key 'a' is there twice",
        ),
        (file_of({"__metadata__": 3}), "__metadata__ is int where dict"),
        (file_of({"__metadata__": {"format": 3}}), "format in __metadata__ is int where str"),
        (file_of({"a": 3}), "'a': the tensor is int where dict"),
        (file_of({"a": {}}), "'a': dtype is NoneType where str"),
        (file_of({"a": tensor(0, 4) | {"shape": "4"}}, b"0000"), "shape is str where list"),
        (file_of({"a": tensor(0, 4, [-4])}, b"0000"), "shape is -4 where a count"),
        (file_of({"a": tensor(0, 4, [4.0])}, b"0000"), "shape is float where int"),
        (file_of({"a": tensor(0, 4, [True])}, b"0000"), "shape is True where a count"),
        (file_of({"a": tensor(0, 4) | {"x": 1}}, b"0000"), "has the fields"),
        (file_of({"a": tensor(0, 4) | {"data_offsets": [0]}}, b"0000"), r"data_offsets \(0,\)"),
        (file_of({"a": tensor(4, 0, [1])}, b"0000"), r"data_offsets \(4, 0\)"),
        (file_of({"a": tensor(0, 4, [1, 2], "F32")}, b"0000"), r"4 bytes where \(1, 2\) F32 needs"),
        (file_of({"a": tensor(0, 4, [1 << 40, 1 << 40])}, b"0000"), "4 bytes where"),
        (file_of({"a": tensor(0, 4)}, b"00000"), "5 bytes|its tensors end at"),
        (file_of({"a": tensor(0, 4)}, b"000"), "its tensors end at"),
        (file_of({"a": tensor(0, 1 << 62)}, b"000"), "its tensors end at"),
        (file_of({"a": tensor(0, 4), "b": tensor(2, 6)}, b"000000"), "b begins at byte"),
        (file_of({"a": tensor(0, 2), "b": tensor(4, 6)}, b"000000"), "b begins at byte"),
        (file_of(b'{"\\ud800": {}}'), "a name is .* which is no text"),
    ],
)
def test_bad_header_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*({message})"):
        digest_file(path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        MappedFile(path)


def test_header_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # Sparse: takes no disk.
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES}"):
        MappedFile(path)


def test_dtype_that_torch_lacks_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": tensor(0, 4, [8], "F4"), "b": tensor(4, 4, [0])}, b"0000"))
    file = MappedFile(path)
    assert file.tensor("b", "b", None).shape == (0,)
    with pytest.raises(CheckpointError, match="holds the moment as F4; known are F64, F32"):
        file.tensor("a", "the moment", None)
    with pytest.raises(CheckpointError, match="lacks the moment: it has no tensor 'c'"):
        file.tensor("c", "the moment", None)


# ---- paths ----


def test_link_out_of_the_checkpoint_is_refused(home: Path) -> None:
    outside = home.parent / "outside.safetensors"
    (home / STATE_FILE).rename(outside)
    (home / STATE_FILE).symlink_to(outside)
    with pytest.raises(
        CheckpointError, match=r"is a link to .*outside.*Copy the file in its place"
    ):
        read_manifest(home)
    (home / STATE_FILE).unlink()
    (home / "kept").write_bytes(outside.read_bytes())
    (home / STATE_FILE).symlink_to("../kept")
    assert read_manifest(home).world_size == 1
    shutil.move(home / "hf_speed", home.parent / "elsewhere")
    (home / "hf_speed").symlink_to(home.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        read_manifest(home)


def test_links_within_the_cache_of_the_hub_are_its_own(home: Path) -> None:
    snapshot = home.parent / "models--a--b" / "snapshots" / "0f3a"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for index, path in enumerate(sorted(path for path in home.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(index))
        link = snapshot / path.relative_to(home)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    with StateReader(snapshot) as reader:
        assert reader.read("head", "master", 0, 8) is not None
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(home / SHARDS[0])
    with pytest.raises(CheckpointError, match="is a link to"):
        read_manifest(snapshot)


def test_what_is_no_regular_file_is_missing(home: Path) -> None:
    (home / LOCAL_FILE).unlink()
    os.mkfifo(home / LOCAL_FILE)  # Opening it would wait for ever.
    with pytest.raises(CheckpointError, match="is missing; it holds what rank 0 stored"):
        read_manifest(home)
    (home / STATE_FILE).unlink()
    (home / STATE_FILE).symlink_to(Path(STATE_FILE).name)
    with pytest.raises(CheckpointError, match=STATE_FILE):
        read_manifest(home)
    (home / MANIFEST_PATH).unlink()
    os.mkfifo(home / MANIFEST_PATH)
    with pytest.raises(CheckpointError, match="was not saved to the end"):
        read_manifest(home)


def test_name_that_no_file_can_have_is_refused(home: Path) -> None:
    edit_manifest(home, lambda body: body["files"].update({"x" * 5000: body["files"][STATE_FILE]}))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*too long"):
        read_manifest(home)


def test_manifest_larger_than_any_is_refused_unread(home: Path) -> None:
    with (home / MANIFEST_PATH).open("r+b") as file:
        file.truncate((2 << 30) + 1)
    with pytest.raises(CheckpointError, match="more than any manifest"):
        read_manifest(home)


def test_weights_that_are_links_elsewhere_are_not_vouched_for(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "extra.safetensors").symlink_to(home.parent / "absent.safetensors")
    make_checkpoint(home)
    assert "extra.safetensors is a link out of the checkpoint" in caplog.text
    assert "extra.safetensors" not in read_manifest(home).files


def test_weights_changed_between_their_save_and_the_manifest_are_read_again(tmp_path: Path) -> None:
    """As by a hook of the user's: the manifest must not vouch for what is no longer there."""
    staging, final = tmp_path / "staging", tmp_path / "final"
    staging.mkdir()
    (staging / "x.safetensors").write_bytes(file_of({"a": tensor(0, 1)}, b"0"))
    record = digest_file(staging / "x.safetensors")
    written = WrittenFiles()
    written.note(staging, final, {"x.safetensors": record})
    assert written.record(final / "x.safetensors") is None
    staging.rename(final)
    assert written.record(final / "x.safetensors") == record
    data = (final / "x.safetensors").read_bytes()
    (final / "x.safetensors").write_bytes(data[:-1] + b"1")
    os.utime(final / "x.safetensors", ns=(0, 0))
    assert written.record(final / "x.safetensors") is None
    assert written.record(final / "other") is None


# ---- meta data ----


def changed(*path: Any, to: Any) -> dict[str, Any]:
    meta = json.loads(json.dumps(META))
    inner = meta
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return meta


GOOD_SCALE = {"scale": 2.0, "good_steps": 3.0, "tolerance": 1}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (changed("mesh", to=3), "mesh is int where dict"),
        (changed("mesh", to={"dp": 1}), r"mesh is \{'dp': 1\}, not sizes of the axes"),
        (changed("mesh", to={"tp": 0}), r"mesh is \{'tp': 0\}, not sizes"),
        (changed("mesh", to={"tp": 2.0}), "mesh is float where int"),
        (changed("optimizer", to=["AdamW"]), "optimizer is list where str"),
        (changed("param_groups", to={}), "param_groups is dict where list"),
        (changed("param_groups", to=[3]), r"param_groups\[0\]: the group is int where dict"),
        (changed("param_groups", 0, "params", to=[1]), r"param_groups\[0\]: 'params' is list, not"),
        (changed("param_groups", 0, "lr", to={"a": 1}), "'lr' is dict, not a number"),
        (changed("parameters", to=[]), "parameters is list where dict"),
        (changed("parameters", "head", to=8), "the shape of 'head' is int where list"),
        (changed("parameters", "head", to=[-1]), "the shape of 'head' is -1 where a count"),
        (changed("loss_scale", to=2.0), "loss_scale is float where dict"),
        (changed("loss_scale", to={"scale": 2.0}), "not numbers for scale, good_steps, tolerance"),
        (changed("loss_scale", to={**GOOD_SCALE, "scale": 0}), "loss_scale is"),
        (changed("loss_scale", to={**GOOD_SCALE, "good_steps": "3"}), "loss_scale is"),
        (changed("loss_scale", to={**GOOD_SCALE, "tolerance": True}), "loss_scale is"),
    ],
)
def test_meta_data_of_another_kind_is_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^dir/manifest\.json.*{message}"):
        saved_run(meta, "dir/manifest.json")


def test_good_meta_data_is_taken() -> None:
    run = saved_run({**META, "loss_scale": GOOD_SCALE}, "m")
    assert run.mesh == {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "ep": 1, "tp": 1}
    assert run.optimizer == "AdamW"
    assert run.param_groups == META["param_groups"]
    assert run.loss_scale == GOOD_SCALE
    assert run.shapes == {"embed": (6, 4), "head": (2, 4)}
    assert saved_run({}, "m") == (None,) * len(run)


@pytest.mark.parametrize(
    ("value", "now", "fits"),
    [
        (1, 0.1, True),
        (0.1, 1, True),
        ("x", 0.1, False),
        (True, 0.1, False),
        (0.1, True, False),
        (False, True, True),
        (None, True, True),
        (True, None, True),
        ("a", "b", True),
        (1, "b", False),
        ([0.9, 0.99], (0.8, 0.9), True),
        ([0.9], (0.8, 0.9), False),
        ([0.9, "x"], (0.8, 0.9), False),
        (0.9, (0.8, 0.9), False),
        ([1.0], 0.1, False),
        (0.5, torch.tensor(0.1), True),
        (None, torch.tensor(0.1), False),
    ],
)
def test_hyperparameter_takes_the_place_of_its_kind_only(
    value: object,
    now: object,
    fits: bool,  # noqa: FBT001 - a column of the table
) -> None:
    if fits:
        check_hyperparameter("lr", value, now, "m")
    else:
        with pytest.raises(CheckpointError, match=r"m: lr is .*, but this run's optimizer has"):
            check_hyperparameter("lr", value, now, "m")


# ---- states ----


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = to

    return edit


def test_piece_that_is_said_to_be_another_is_refused(home: Path) -> None:
    """A manifest that fits its own checksum, but not the files."""
    body = load_json((home / MANIFEST_PATH).read_text(), "m")
    place = [entry["name"] + "/" + entry["kind"] for entry in body["entries"]].index("head/master")
    piece = body["entries"][place]["pieces"][0]
    before = (home / MANIFEST_PATH).read_text()
    for path, value, message in (
        ((1,), "absent", "lacks the master of head: it has no tensor 'absent'"),
        ((4,), "0" * 32, r"is damaged in the master of head .*that of the save was 0{32}"),
        ((0,), SHARDS[0], "lacks the master of head"),
    ):
        edit_manifest(home, _set("entries", place, "pieces", 0, *path, to=value))
        with StateReader(home) as reader, pytest.raises(CheckpointError, match=message):
            reader.read("head", "master", 0, 8)
        (home / MANIFEST_PATH).write_text(before)
    assert piece[0] == STATE_FILE
    edit_manifest(home, _set("entries", place, "dtype", to="I32"))
    with StateReader(home) as reader, pytest.raises(CheckpointError, match="the manifest says"):
        reader.read("head", "master", 0, 8)


def test_damaged_random_states_are_refused(home: Path) -> None:
    data = (home / LOCAL_FILE).read_bytes()
    (home / LOCAL_FILE).write_bytes(data[:-1] + b"\xff")
    with StateReader(home) as reader, pytest.raises(CheckpointError, match="what rank 0 stored"):
        reader.local(0)


def test_checkpoint_without_checksums_is_read_and_says_so(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = load_json((home / MANIFEST_PATH).read_text(), "m")
    body["format_version"] = 1
    body["files"] = {path: record["bytes"] for path, record in body["files"].items()}
    for entry in body["entries"]:
        entry["pieces"] = [piece[:4] for piece in entry["pieces"]]
    del body["digest"], body["checksums"]
    (home / MANIFEST_PATH).write_text(json.dumps(body))
    with caplog.at_level("INFO", logger="hf_speed"), StateReader(home) as reader:
        value = reader.read("head", "exp_avg", 3, 2)
        assert value is not None
        assert value.tolist() == (torch.arange(3.0, 5.0) / 5).tolist()
        assert reader.local(0)["cpu_rng"].tolist() == list(range(16))
    assert "before checkpoints had checksums" in caplog.text


def test_weights_of_other_names_or_with_another_header_are_refused(home: Path) -> None:
    """Sizes and data as they were; so that only names and what the header says besides differ."""
    path = home / SHARDS[1]
    data = path.read_bytes()
    for old, new, message in (
        (b'"head"', b'"heed"', "only the file has a tensor 'heed'|only the manifest lists a"),
        (b'"pt"', b'"tf"', "its header was changed: with it the checksum is"),
    ):
        path.write_bytes(data.replace(old, new))
        assert path.read_bytes() != data
        with pytest.raises(CheckpointError, match=message):
            verify_weights(home, world=IDENTITY)
    path.write_bytes(data)
    verify_weights(home, world=IDENTITY)


def test_manifest_that_is_no_text_is_refused(home: Path) -> None:
    (home / MANIFEST_PATH).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged or cannot be read"):
        read_manifest(home)


@pytest.mark.parametrize("reader", [digest_file, MappedFile])
def test_file_that_is_not_there_is_named(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be opened: .*No such file"):
        reader(tmp_path / "x.safetensors")


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)])
def test_random_state_that_is_none_is_refused(state: torch.Tensor, tmp_path: Path) -> None:
    write_states(tmp_path, [], {}, world=IDENTITY, local={"cpu_rng": state})
    mesh = ParallelMesh({}, device=torch.device("cpu"))
    before = torch.get_rng_state()
    with (
        StateReader(tmp_path) as reader,
        pytest.raises(CheckpointError, match="holds random states of rank 0 that are none"),
    ):
        load_rng(mesh, reader)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_number_and_no_dtype_is_refused() -> None:
    assert counter(5, "step of head", "m") == 5.0
    for value in ("5", True, None):
        with pytest.raises(CheckpointError, match=r"m: the step of head is .*, not a number"):
            counter(value, "step of head", "m")
    assert masters_in_files({"masters_in_files": "float32"}, "m") is torch.float32
    assert masters_in_files({}, "m") is None
    for value, message in (("int8", "is 'int8', none of float64"), (4, "is int where str")):
        with pytest.raises(CheckpointError, match=f"m: masters_in_files {message}"):
            masters_in_files({"masters_in_files": value}, "m")
