"""Checkpoints in remote stores: whole or refused, on memory:// and file://, by several ranks."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist

from hf_speed.checkpoint import LocalState, StateReader, read_manifest, stores
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.remote import (
    MIRROR_PATH,
    download,
    inspect_remote,
    localized,
    mirror_checkpoint,
    newest_url,
    share,
    upload,
)
from hf_speed.checkpoint.stores import Store, is_url
from hf_speed.checkpoint.writer import write_states
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import run_ranks

URL = "memory://bucket/run"
VALUES = torch.arange(64.0)


@pytest.fixture(autouse=True)
def clean_memory() -> Iterator[None]:
    """memory:// outlives a test."""
    yield
    fsspec.filesystem("memory").store.clear()


def checkpoint(directory: Path) -> Path:
    """States, and what a Trainer puts beside them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    state = LocalState("weight", "master", (64,), 0, 64, VALUES)
    write_states(directory, [state], {"name": directory.name}, world=IDENTITY)
    (directory / "trainer_state.json").write_text('{"global_step": 7}')
    (directory / ".hidden").write_text("")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket/run", True),
        ("memory://x", True),
        ("simplecache::s3://bucket", True),
        ("C:/run", False),
        ("out/checkpoint-1", False),
        ("my-org/my-model", False),
        (Path("s3://bucket"), False),
        (None, False),
    ],
)
def test_urls_are_told_from_paths(place: object, expected: bool) -> None:  # noqa: FBT001
    assert is_url(place) is expected


def test_every_byte_comes_back_and_latest_names_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        source = checkpoint(tmp_path / f"checkpoint-{step}")
        mirror_checkpoint(source, url=URL, world=IDENTITY)
    assert newest_url(URL) == f"{URL}/checkpoint-2"
    assert newest_url(f"{URL}/checkpoint-1") == f"{URL}/checkpoint-1"
    target = tmp_path / "back" / "checkpoint-2"
    target.parent.mkdir()
    download(newest_url(URL), target, world=IDENTITY)
    assert contents(target) == contents(source)
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint-2"]
    # Again: it is there already, and nothing else may take its place.
    stamp = (target / "config.json").stat().st_mtime_ns
    download(newest_url(URL), target, world=IDENTITY)
    assert (target / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="exists already and is not the checkpoint that"):
        download(f"{URL}/checkpoint-1", target, world=IDENTITY)
    with localized(URL, tmp_path) as found, StateReader(found) as reader:
        assert found.name == "checkpoint-2"
        assert torch.equal(reader.read("weight", "master", 0, 64), VALUES)
    assert not found.exists()


@pytest.mark.parametrize("kept", range(4))
def test_an_upload_that_was_killed_is_refused(kept: int, tmp_path: Path) -> None:
    """SIGKILL before any file, over the upload of another checkpoint of the same name."""
    source = checkpoint(tmp_path / "checkpoint-1")
    url = f"file://{tmp_path}/store"
    mirror_checkpoint(source, url=url, world=IDENTITY)
    child = os.fork()
    if child == 0:
        put, sent = Store.put, []

        def dying(self: Store, local: Path, name: str) -> None:
            if len(sent) == kept:
                os.kill(os.getpid(), signal.SIGKILL)
            sent.append(name)
            put(self, local, name)

        Store.put = dying  # type: ignore[method-assign]
        mirror_checkpoint(source, url=url, world=IDENTITY)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(CheckpointError, match="was not uploaded to the end"):
        download(newest_url(url), tmp_path / "back", world=IDENTITY)
    assert not inspect_remote(newest_url(url), fast=True).is_whole
    mirror_checkpoint(source, url=url, world=IDENTITY)
    download(newest_url(url), tmp_path / "back", world=IDENTITY)


@pytest.mark.parametrize("kept", [0, 3])
def test_an_upload_that_was_cut_short_is_refused(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of files, also where an older upload lies there already."""
    source = checkpoint(tmp_path / "checkpoint-1")
    mirror_checkpoint(source, url=URL, world=IDENTITY)
    sent = 0
    put = Store.put

    def failing(self: Store, local: Path, name: str) -> None:
        nonlocal sent
        if sent == kept:
            raise OSError("connection reset")
        sent += 1
        put(self, local, name)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(CheckpointError, match=r"Uploading .* failed on rank 0: .*connection reset"):
        mirror_checkpoint(source, url=URL, world=IDENTITY)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="was not uploaded to the end"):
        download(f"{URL}/checkpoint-1", tmp_path / "back", world=IDENTITY)
    assert not (tmp_path / "back").exists()


def _damage(store: Store, name: str) -> None:
    path = store._path(name)
    data = bytearray(store._fs.cat_file(path))
    data[len(data) // 2] ^= 1
    store._fs.pipe_file(path, bytes(data))


@pytest.mark.parametrize("name", ["STATE", "config.json", "trainer_state.json", MANIFEST_PATH])
def test_a_flipped_bit_in_the_store_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-1")
    upload(source, URL, world=IDENTITY)
    if name == "STATE":
        name = next(file for file in read_manifest(source).files if "state-" in file)
    _damage(Store(URL), name)
    with pytest.raises(CheckpointError, match=name):
        download(URL, tmp_path / "back", world=IDENTITY)
    assert not (tmp_path / "back").exists()


def test_a_file_that_is_missing_or_short_is_named(tmp_path: Path) -> None:
    upload(checkpoint(tmp_path / "checkpoint-1"), URL, world=IDENTITY)
    store = Store(URL)
    store.write("config.json", "")
    with pytest.raises(CheckpointError, match=r"config.json has 0 bytes; 2 were saved"):
        download(URL, tmp_path / "back", world=IDENTITY)
    store.remove("config.json")
    with pytest.raises(CheckpointError, match=r"config.json is missing; 2 were saved"):
        download(URL, tmp_path / "back", world=IDENTITY)


def test_inspect_names_every_bad_file_in_a_store(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-1")
    upload(source, URL, world=IDENTITY)
    assert inspect_remote(URL, fast=False).is_whole
    state = next(file for file in read_manifest(source).files if "state-" in file)
    _damage(Store(URL), state)
    Store(URL).remove("trainer_state.json")
    found = inspect_remote(URL, fast=False)
    assert {each.file for each in found.problems} == {state, "trainer_state.json"}
    found = inspect_remote(URL, fast=True)
    assert [each.text for each in found.problems] == ["is missing; 18 were saved"]
    Store(URL).remove(MANIFEST_PATH)
    assert "was not uploaded to the end" in inspect_remote(URL, fast=True).problems[0].text
    with pytest.raises(CheckpointError, match=r"memory://nowhere holds no hf_speed/manifest.json"):
        inspect_remote("memory://nowhere", fast=True)


def test_damage_on_the_disk_is_not_uploaded(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-1")
    path = next(source.glob("hf_speed/state-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"another checksum than the manifest says. It"):
        upload(source, URL, world=IDENTITY)


def test_weights_alone_come_back_by_the_list_of_their_upload(tmp_path: Path) -> None:
    """save_only_model: no manifest."""
    source = checkpoint(tmp_path / "checkpoint-1")
    shutil.rmtree(source / "hf_speed")
    upload(source, URL, world=IDENTITY)
    download(URL, tmp_path / "back", world=IDENTITY)
    assert contents(tmp_path / "back") == contents(source)
    Store(URL).remove(MIRROR_PATH)
    _damage(Store(URL), "config.json")  # Copied by other means: taken as it is.
    download(URL, tmp_path / "other", world=IDENTITY)
    assert (tmp_path / "other" / "config.json").read_bytes() != b"{}"


def test_copied_by_other_means_it_is_checked_against_the_manifest(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-1")
    url = f"file://{source}"
    download(url, tmp_path / "back", world=IDENTITY)
    assert contents(tmp_path / "back") == contents(source)
    _damage(Store(url), "config.json")
    with pytest.raises(CheckpointError, match=r"config.json is damaged: it has another checksum"):
        download(url, tmp_path / "other", world=IDENTITY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the list is list where dict"),
        ('{"format_version": 9}', "has format_version 9; this hf_speed reads 2"),
        (
            '{"format_version": 2, "has_manifest": false, "files": {"../x": {}}}',
            "the path '../x' leaves",
        ),
    ],
)
def test_a_bad_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    Store(URL).write(MIRROR_PATH, text)
    with pytest.raises(CheckpointError, match=message):
        download(URL, tmp_path / "back", world=IDENTITY)


def test_places_that_hold_nothing_or_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="memory://nowhere holds no file"):
        download("memory://nowhere", tmp_path / "back", world=IDENTITY)
    with pytest.raises(ConfigError, match="'bucket/run' is no URL"):
        Store("bucket/run")
    with pytest.raises(ConfigError, match="nosuch://x cannot be opened: Protocol not known"):
        Store("nosuch://x")
    Store(URL).write("latest", "../checkpoint-1")
    with pytest.raises(CheckpointError, match=r"latest names no checkpoint: '\.\./checkpoint-1'"):
        newest_url(URL)


def test_a_missing_backend_is_named_and_no_password_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.get_filesystem_class", absent)
    with pytest.raises(ConfigError, match="s3://bucket/x cannot be opened: Install s3fs") as raised:
        Store("s3://key:secret@bucket/x")
    assert "secret" not in str(raised.value)


def test_files_are_shared_out_by_size() -> None:
    mib = 1 << 20
    sizes = [("a", 9 * mib), ("b", 5 * mib), ("c", 4 * mib), ("d", 0)]
    parts = [share(sizes, AxisGroup(2, rank, None, "two")) for rank in range(2)]
    assert parts == [["a", "d"], ["b", "c"]]
    assert share(sizes, IDENTITY) == ["a", "b", "c", "d"]


def _two_ranks(directory: str) -> list[str]:
    home = Path(directory)
    rank = dist.get_rank()
    world = AxisGroup(2, rank, dist.group.WORLD, "world")
    source = home / "checkpoint-5"
    states = [LocalState("weight", "master", (64,), rank * 32, 32, VALUES[rank * 32 :][:32])]
    source.mkdir(exist_ok=True)
    write_states(source, states, {}, world=world)
    sent: list[str] = []
    put = Store.put
    stores.Store.put = lambda self, local, name: (  # type: ignore[method-assign]
        sent.append(name),
        put(self, local, name),
    )[1]
    url = f"file://{home}/store"
    mirror_checkpoint(source, url=url, world=world)
    download(newest_url(url), home / "back", world=world)
    with StateReader(home / "back") as reader:
        assert torch.equal(reader.read("weight", "master", 0, 64), VALUES)
    if rank == 1:
        next((home / "store").glob("*/hf_speed/state-*-rank00001-*")).write_bytes(b"x")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"state-001-rank00001-00000.safetensors has 1 bytes"):
        download(newest_url(url), home / "again", world=world)
    return sent


def test_two_ranks_share_the_files_and_fail_together(tmp_path: Path) -> None:
    first, second = run_ranks(_two_ranks, 2, str(tmp_path))
    assert not set(first) & set(second)
    assert first[-1] == MANIFEST_PATH
    assert second
    listed = json.loads((tmp_path / "store" / "checkpoint-5" / MIRROR_PATH).read_text())
    assert listed["has_manifest"] is True
