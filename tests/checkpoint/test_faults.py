"""Saves that fail: a full disk, a killed rank, another model. No hang, nothing lost."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_speed.checkpoint import (
    LocalState,
    ModelPlan,
    PlannedFile,
    StateReader,
    TensorGroup,
    TensorSpec,
    read_manifest,
    write_model,
    write_states,
)
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import RankError, run_ranks, small_disk

MIB = 1 << 20
NUMEL = MIB // 4
"""One tensor: 1 MiB of fp32."""


def world_group() -> AxisGroup:
    return AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")


def plan_of(num_files: int) -> ModelPlan:
    names = [f"w{index}" for index in range(num_files)]
    files = tuple(
        PlannedFile(
            f"model-{index + 1:05d}-of-{num_files:05d}.safetensors",
            (TensorSpec(name, (NUMEL,), torch.float32),),
        )
        for index, name in enumerate(names)
    )
    groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in names)
    return ModelPlan(files, groups, dict, {}, num_files * NUMEL)


def gathered(num_files: int, value: float) -> Iterator[tuple[str, torch.Tensor]]:
    """A collective per tensor, as the engine's: a rank that stops early would hang the others."""
    for index in range(num_files):
        tensor = torch.full((NUMEL,), value)
        if dist.is_initialized():
            dist.broadcast(tensor, src=0)
        yield f"w{index}", tensor


def states_of(world: AxisGroup, value: float) -> Iterator[LocalState]:
    numel = 2 * NUMEL // world.size
    yield LocalState(
        "w", "master", (2, NUMEL), world.rank * numel, numel, torch.full((numel,), value)
    )


def save(directory: Path, world: AxisGroup, value: float) -> None:
    write_model(directory, plan_of(2), gathered(2, value), world=world)
    write_states(directory, states_of(world, value), {"value": value}, world=world)


def check(directory: Path, value: float) -> None:
    with StateReader(directory) as reader:
        assert reader.meta == {"value": value}
        read = reader.read("w", "master", 1, 2 * NUMEL - 1)
        assert read is not None
        assert bool((read == value).all())
        assert "model-00002-of-00002.safetensors" in reader.manifest.files


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Path]:
    """Of 8 MiB."""
    with small_disk(tmp_path / "disk", "8m") as disk:
        yield disk


def _full_disk_rank(disk: str) -> list[str]:
    """A good save of 4 MiB, then one of the model and one of the state for which 4 MiB are left."""
    world = world_group()
    save(Path(disk) / "checkpoint-1", world, 1.0)
    texts = []
    for attempt in (_save_large_model, _save_large_state):
        try:
            attempt(Path(disk) / "checkpoint-2", world)
        except CheckpointError as error:
            texts.append(str(error))
    return texts


def _save_large_model(directory: Path, world: AxisGroup) -> None:
    write_model(directory, plan_of(6), gathered(6, 2.0), world=world)


def _save_large_state(directory: Path, world: AxisGroup) -> None:
    # Only rank 1 has more than fits.
    numel = 6 * NUMEL if world.rank else 1
    start = world.rank
    state = LocalState("w", "m", (6 * NUMEL + 1,), start, numel, torch.zeros(numel))
    write_states(directory, [state], {}, world=world)


def test_full_disk_fails_on_every_rank_and_keeps_the_previous_checkpoint(disk: Path) -> None:
    for texts in run_ranks(_full_disk_rank, 2, str(disk), timeout_s=60):
        model, state = texts
        assert "Saving the model to" in model
        assert "No space left on device" in model
        # Only rank 1 has more than fits, but what it has written may leave rank 0 no room either.
        assert re.search(r"failed on rank [01]: OSError: \[Errno 28\] No space left", state)
        assert "What was saved before is untouched" in state
    check(disk / "checkpoint-1", 1.0)
    with pytest.raises(CheckpointError, match="was not saved to the end"):
        read_manifest(disk / "checkpoint-2")
    leftovers = [path for path in (disk / "checkpoint-2").rglob("*") if path.is_file()]
    assert leftovers == []


def test_full_disk_keeps_what_is_in_the_same_directory(disk: Path) -> None:
    save(disk, IDENTITY, 1.0)
    large = LocalState("w", "m", (6 * NUMEL,), 0, 6 * NUMEL, torch.zeros(6 * NUMEL))
    with pytest.raises(CheckpointError, match="No space left"):
        write_model(disk, plan_of(6), gathered(6, 2.0), world=IDENTITY)
    with pytest.raises(CheckpointError, match="No space left"):
        write_states(disk, [large], {}, world=IDENTITY)
    check(disk, 1.0)


def _killed_rank(directory: str, when: str) -> None:
    world = world_group()
    save(Path(directory), world, 1.0)

    def die_midway(items: Iterator) -> Iterator:
        for item in items:
            yield item
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    if when == "model":
        write_model(directory, plan_of(4), die_midway(gathered(4, 2.0)), world=world)
    else:
        write_states(directory, die_midway(states_of(world, 2.0)), {}, world=world)


@pytest.mark.parametrize("when", ["model", "states"])
def test_killed_rank_ends_the_others_and_leaves_the_save_before(when: str, tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_killed_rank, 2, str(tmp_path), when, timeout_s=60)
    assert "exit code -9" in caught.value.reports[1]
    assert "CheckpointError" in caught.value.reports[0]
    assert "a rank is gone" in caught.value.reports[0]
    check(tmp_path, 1.0)
    # What the dead left behind does not disturb the next save.
    save(tmp_path, IDENTITY, 3.0)
    check(tmp_path, 3.0)
    assert not list(tmp_path.rglob("*staging*"))


def test_new_model_in_a_finished_checkpoint_retires_its_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, IDENTITY, 1.0)
    write_model(tmp_path, plan_of(3), gathered(3, 2.0), world=IDENTITY)
    assert "a new model replaces that of a finished checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match="was not saved to the end"):
        read_manifest(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model-*")) == [
        f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([("w0", torch.zeros(NUMEL))], r"did not yield \['w1'\]"),
        ([("w0", torch.zeros(NUMEL)), ("x", torch.zeros(1))], "yields x, which the plan does not"),
        ([("w0", torch.zeros(3))], r"w0 came as \(3,\) torch.float32; the plan has \(262144,\)"),
    ],
)
def test_model_that_differs_from_its_plan_is_refused(
    parameters: list[tuple[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_model(tmp_path, plan_of(2), parameters, world=IDENTITY)
    assert list(tmp_path.iterdir()) == []


def _save_until_killed(directory: str, delay_s: float) -> None:
    """Save again and again: whole checkpoints side by side, and states one over the other."""
    root = Path(directory)
    value = 1.0
    save(root / "checkpoint-1", IDENTITY, value)
    write_states(root / "same", states_of(IDENTITY, value), {"value": value}, world=IDENTITY)
    # The default action ends the process at once, like SIGKILL, wherever it is.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, delay_s)
    while True:
        value += 1
        save(root / f"checkpoint-{value:.0f}", IDENTITY, value)
        write_states(root / "same", states_of(IDENTITY, value), {"value": value}, world=IDENTITY)


@pytest.mark.parametrize("delay_s", [0.003, 0.011, 0.023, 0.037, 0.059, 0.083])
def test_kill_at_any_moment_leaves_whole_checkpoints(delay_s: float, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code -14"):
        run_ranks(_save_until_killed, 1, str(tmp_path), delay_s, backend=None)
    saved = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in saved[:-1]:
        check(path, float(path.name.split("-")[1]))
    try:
        check(saved[-1], float(len(saved)))
    except CheckpointError as error:
        assert "training state" in str(error) or "was not saved to the end" in str(error)  # noqa: PT017
    with StateReader(tmp_path / "same") as reader:
        value = reader.meta["value"]
        assert value in (len(saved) - 1, len(saved))
        read = reader.read("w", "master", 0, 2 * NUMEL)
        assert read is not None
        assert bool((read == value).all())
