"""`latest` names a whole checkpoint, and rotation leaves one, whatever fails."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_speed.checkpoint import LocalState, read_manifest, write_states
from hf_speed.checkpoint.latest import (
    Rotation,
    beyond_limit,
    finish_checkpoint,
    newest_whole,
    read_latest,
    remove_checkpoint,
    write_latest,
)
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import run_ranks


def whole(path: Path) -> Path:
    write_states(path, [LocalState("w", "m", (2,), 0, 2, torch.ones(2))], {}, world=IDENTITY)
    return path


def cut(path: Path) -> Path:
    (whole(path) / "hf_speed" / "manifest.json").unlink()
    return path


def found(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def finish(directory: Path, *, limit: int | None = None, keep: Sequence[Path] = ()) -> None:
    root = directory.parent
    finish_checkpoint(
        directory,
        root=root,
        world=IDENTITY,
        require_whole=read_manifest,
        rotation=Rotation(limit, keep, partial(found, root)),
    )


def test_latest_names_the_checkpoint_that_was_finished_last(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    for name in ("3", "1"):
        finish(whole(tmp_path / name))
        assert read_latest(tmp_path) == tmp_path / name
    assert (tmp_path / "latest").read_text() == "1\n"
    write_latest(tmp_path, tmp_path / "states" / "checkpoint_0")
    assert read_latest(tmp_path) == tmp_path / "states/checkpoint_0"


@pytest.mark.parametrize(
    "text", ["", "../elsewhere", "/etc", "a/../../b", "a\x00b", "a\nb", "x" * 5000, b"\xff\xfe"]
)
def test_latest_that_names_nothing_here_is_ignored(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_latest(tmp_path) is None


def test_a_cut_save_is_not_finished_and_older_ones_stay(tmp_path: Path) -> None:
    finish(whole(tmp_path / "1"), limit=1)
    with pytest.raises(CheckpointError, match=r"Finishing .*2 failed on rank 0.*not saved to the"):
        finish(cut(tmp_path / "2"), limit=1)
    assert read_latest(tmp_path) == tmp_path / "1"
    assert [path.name for path in found(tmp_path)] == ["1", "2"]


def test_what_cannot_be_mirrored_is_not_the_latest(tmp_path: Path) -> None:
    finish(whole(tmp_path / "1"))

    def mirror(directory: Path) -> None:
        raise CheckpointError(f"no room for {directory.name} there")

    with pytest.raises(CheckpointError, match="no room for 2 there"):
        finish_checkpoint(
            whole(tmp_path / "2"),
            root=tmp_path,
            world=IDENTITY,
            require_whole=read_manifest,
            rotation=Rotation(1, (), partial(found, tmp_path)),
            mirror=mirror,
        )
    assert read_latest(tmp_path) == tmp_path / "1"
    assert len(found(tmp_path)) == 2


def test_rotation_keeps_the_newest_and_the_best_and_drops_cut_ones_first(tmp_path: Path) -> None:
    for name in ("1", "2", "4"):
        whole(tmp_path / name)
    cut(tmp_path / "3")
    finish(whole(tmp_path / "5"), limit=3, keep=[tmp_path / "1"])
    assert [path.name for path in found(tmp_path)] == ["1", "4", "5"]
    finish(tmp_path / "5", limit=1, keep=[tmp_path / "." / "1"])
    assert [path.name for path in found(tmp_path)] == ["1", "5"]


@pytest.mark.parametrize(
    ("limit", "keep", "cuts", "gone"),
    [
        (5, "e", "", ""),
        (2, "e", "", "abc"),
        (1, "e", "", "abcd"),
        (1, "be", "", "acd"),
        (3, "e", "d", "da"),
        (3, "e", "bcd", "bc"),
        (9, "e", "bcd", ""),
    ],
)
def test_which_go_beyond_a_limit(limit: int, keep: str, cuts: str, gone: str) -> None:
    paths = [Path("/run") / name for name in "abcde"]
    chosen = beyond_limit(
        paths,
        limit=limit,
        keep={Path("/run") / name for name in keep},
        is_cut=lambda path: path.name in cuts,
    )
    assert "".join(path.name for path in chosen) == gone


def test_the_one_to_go_on_from_is_latest_or_else_the_newest_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def newest() -> str | None:
        path = newest_whole(tmp_path, found(tmp_path), require_whole=read_manifest)
        return None if path is None else path.name

    assert newest() is None
    for name in ("1", "2"):
        finish(whole(tmp_path / name))
    cut(tmp_path / "3")
    write_latest(tmp_path, tmp_path / "1")
    assert newest() == "1"
    remove_checkpoint(tmp_path / "1")
    assert newest() == "2"
    assert "1 is passed over" in caplog.text
    assert "3 is passed over" in caplog.text
    cut(tmp_path / "2")
    assert newest() is None


def test_what_cannot_be_removed_is_a_warning_and_no_longer_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    finish(whole(tmp_path / "1"))
    # Root, as which tests may run, is refused nothing.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **k: None if k else refuse(path))
    finish(whole(tmp_path / "2"), limit=1)
    assert "1 is beyond the limit but cannot be removed" in caplog.text
    assert read_latest(tmp_path) == tmp_path / "2"
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path / "1")


def _finish_together(root: str) -> list[str]:
    """Rank 1 writes its last file late: it is looked for when it is there."""
    import time

    world = AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")
    directory = Path(root) / "1"
    state = LocalState("w", "m", (2,), world.rank, 1, torch.ones(1))
    write_states(directory, [state], {}, world=world)
    if world.rank == 1:
        time.sleep(0.2)
    (directory / f"rng-{world.rank}").write_text("x")

    def require_whole(path: Path) -> None:
        read_manifest(path)
        for rank in range(world.size):
            (path / f"rng-{rank}").stat()

    finish_checkpoint(
        directory,
        root=Path(root),
        world=world,
        require_whole=require_whole,
        rotation=Rotation(1, (), partial(found, Path(root))),
    )
    return [str(read_latest(root))]


def test_a_checkpoint_is_finished_when_every_rank_has_written_its_files(tmp_path: Path) -> None:
    assert run_ranks(_finish_together, 2, str(tmp_path)) == [[str(tmp_path / "1")]] * 2
