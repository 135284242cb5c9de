"""A checkpoint that takes the place of another: whole or not at all, wherever a process dies."""

import shutil
from pathlib import Path

import pytest
import torch

from hf_speed.checkpoint import LocalState, StateReader, write_states
from hf_speed.checkpoint.replace import place_to_write, recover, swap
from hf_speed.mesh.axes import IDENTITY


def fill(path: Path, value: float) -> None:
    states = [LocalState("w", "m", (2,), 0, 2, torch.full((2,), value))]
    write_states(path, states, {"value": value}, world=IDENTITY)
    (path / "part").write_text(str(value))


def check(path: Path, value: float) -> None:
    with StateReader(path) as reader:
        assert reader.meta["value"] == value
        read = reader.read("w", "m", 0, 2)
        assert read is not None
        assert read.tolist() == [value, value]
    assert (path / "part").read_text() == str(value)


def is_part(name: str) -> bool:
    return name in {"part", "hf_speed"}


def test_a_new_place_is_given_only_beside_a_finished_checkpoint(tmp_path: Path) -> None:
    home = tmp_path / "state"
    assert place_to_write(home) == home
    (home / "checkpoint-1").mkdir(parents=True)
    fill(home / "checkpoint-1", 1.0)
    assert place_to_write(home) == home
    fill(home / "model_0", 1.0)
    beside = place_to_write(home)
    assert beside == tmp_path / ".state.saving"
    fill(beside, 2.0)
    # What a save that was killed has left does not stay.
    assert place_to_write(home) == beside
    assert not beside.exists()


def test_what_cannot_be_renamed_is_written_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "state", 1.0)
    monkeypatch.chdir(tmp_path / "state")
    assert place_to_write(Path()) == tmp_path / "state"
    assert "neither is whole" in caplog.text


class _KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def _die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let the process die before its change of the disk with this number, from 0."""
    count = [0]

    def dying(call: object) -> object:
        def run(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] > number:
                raise _KilledError
            return call(*args, **kwargs)  # pyrefly: ignore[not-callable]

        return run

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return count


@pytest.mark.parametrize("number", range(6))
def test_wherever_a_swap_dies_it_is_completed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames, one of a file of the user's, a manifest, the rest of the old: five changes."""
    home = tmp_path / "state"
    fill(home, 1.0)
    (home / "notes.txt").write_text("mine")
    fill(place_to_write(home), 2.0)
    with monkeypatch.context() as patched:
        count = _die_at(patched, number)
        if number < 5:
            with pytest.raises(_KilledError):
                swap(home, is_part=is_part)
        else:
            swap(home, is_part=is_part)
            assert count == [5]
    if number == 0:
        check(home, 1.0)
        return
    recover(home, is_part=is_part)
    check(home, 2.0)
    assert (home / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    recover(home, is_part=is_part)
    check(home, 2.0)
