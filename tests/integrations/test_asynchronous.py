"""checkpoint.asynchronous: the files of a save at once, behind the training; nothing is lost."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

import hf_speed
from hf_speed.checkpoint import StateReader
from hf_speed.checkpoint.latest import read_latest
from hf_speed.errors import CheckpointError
from tests.integrations.toys import curve, llama, stage, trainer
from tests.support import RankError, run_ranks, small_disk

BEHIND: dict[str, Any] = {"checkpoint": {"asynchronous": True}}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def _both(directory: str, number: int, options: dict[str, Any]) -> list[Any]:
    """The same run with saves at once and behind, and one resumed from the latter."""
    found = []
    for name, sections in (("once", {}), ("behind", BEHIND)):
        made = trainer(f"{directory}/{name}", stage(number, **sections), **SAVING, **options)
        made.train()
        found.append(curve(made))
    if dist.get_rank() == 0:
        shutil.rmtree(f"{directory}/behind/checkpoint-4")
    dist.barrier()
    again = trainer(
        f"{directory}/behind", stage(number, **BEHIND), model=llama(seed=9), **SAVING, **options
    )
    again.train(resume_from_checkpoint=True)
    return [*found, curve(again)]


def states_in(directory: Path) -> dict[tuple[str, str], torch.Tensor | None]:
    with StateReader(directory) as reader:
        return {
            (entry.name, entry.kind): reader.read(
                entry.name, entry.kind, 0, torch.Size(entry.shape).numel()
            )
            for entry in reader.manifest.entries
        }


@pytest.mark.parametrize(
    ("number", "options"), [(1, {}), (3, {"bf16": True})], ids=["stage1-fp32", "stage3-bf16"]
)
def test_files_written_behind_are_those_written_at_once(
    number: int, options: dict[str, Any], tmp_path: Path
) -> None:
    once, behind, again = run_ranks(_both, 2, str(tmp_path), number, options)[0]
    assert once == behind == again
    for step in (2, 4):
        one, two = (tmp_path / name / f"checkpoint-{step}" for name in ("once", "behind"))
        names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
        assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*"))
        mine, theirs = (load_file(home / "model.safetensors") for home in (two, one))
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
        mine, theirs = states_in(two), states_in(one)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
        args = torch.load(two / "training_args.bin", weights_only=False)
        assert args.save_total_limit is None
    assert read_latest(tmp_path / "behind") == tmp_path / "behind" / "checkpoint-4"


def _limited(directory: str) -> dict[str, Any]:
    made = trainer(
        directory, stage(1, **BEHIND), **SAVING, save_total_limit=1, save_only_model=True
    )
    made.train()
    made.save_model(f"{directory}/final")
    return {
        "files": sorted(path.name for path in Path(directory).iterdir()),
        "final": sorted(path.name for path in Path(directory, "final").glob("*.safetensors")),
        "limit": made.args.save_total_limit,
        "saved": torch.load(
            f"{directory}/checkpoint-4/training_args.bin", weights_only=False
        ).save_total_limit,
        "saving": _is_saving(),
    }


def _is_saving() -> bool:
    return any(thread.name == "hf_speed-saver" for thread in threading.enumerate())


def test_train_ends_when_its_saves_have_and_keeps_its_limit(tmp_path: Path) -> None:
    for each in run_ranks(_limited, 2, str(tmp_path)):
        assert each["files"] == ["checkpoint-4", "final", "latest"]
        assert each["final"] == ["model.safetensors"]
        assert each["limit"] == each["saved"] == 1
        assert not each["saving"]


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Path]:
    """Of 1 MiB."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def _until_full(directory: str) -> tuple[int, str, str | None]:
    made = trainer(directory, stage(2, **BEHIND), **(SAVING | {"max_steps": 40}))
    try:
        made.train()
    except CheckpointError as error:
        latest = read_latest(directory)
        return made.state.global_step, str(error), None if latest is None else latest.name
    return -1, "", None


def _go_on(directory: str) -> int:
    made = trainer(directory, stage(2), **(SAVING | {"max_steps": 40, "save_strategy": "no"}))
    first: list[int] = []
    step = made.training_step

    def noting(*args: Any, **kwargs: Any) -> torch.Tensor:
        first.append(made.state.global_step)
        return step(*args, **kwargs)

    made.training_step = noting
    made.train(resume_from_checkpoint=True)
    return first[0]


def test_a_full_disk_stops_all_ranks_at_one_step_and_leaves_the_save_before(
    disk: Path,
) -> None:
    one, two = run_ranks(_until_full, 2, str(disk), timeout_s=60)
    assert one == two
    step, message, latest = one
    assert step > 0
    assert "No space left on device" in message
    assert "behind the training" in message
    assert latest is not None
    assert run_ranks(_go_on, 1, str(disk))[0] == int(latest.removeprefix("checkpoint-"))


def _accelerated(directory: str, config: Any) -> tuple[Any, Any, Any]:
    project = ProjectConfiguration(directory, automatic_checkpoint_naming=True, total_limit=1)
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=config, project_config=project)
    model = llama()
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def _killed(directory: str) -> None:
    accelerator, model, optimizer = _accelerated(directory, stage(1, **BEHIND))
    for number in range(3):
        tokens = torch.full((2, 4), number + 5)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        if number == 2 and dist.get_rank() == 1:
            # In the midst of the save: this rank's states are never written.
            hf_speed.engine_of(model).save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        accelerator.save_state()
    accelerator.wait_for_save()


def _load_newest(directory: str) -> tuple[list[str], float]:
    accelerator, _, optimizer = _accelerated(directory, stage(3))
    accelerator.load_state()
    names = sorted(path.name for path in Path(directory, "checkpoints").iterdir())
    return names, _steps(optimizer)


def _steps(optimizer: Any) -> float:
    (steps,) = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    return steps


def _save_in_one_place(directory: str) -> list[Any]:
    """Twice into one directory, the second time in the midst of which the process may die."""
    accelerator, model, optimizer = _accelerated(directory, stage(3, **BEHIND))
    accelerator.project_configuration.automatic_checkpoint_naming = False
    home, found = Path(directory) / "state", []
    for number in range(2):
        tokens = torch.full((2, 4), number + 5)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(accelerator.save_state(str(home)) == home)
        accelerator.wait_for_save()
        if number == 0 and dist.get_rank() == 0:
            (home / "notes.txt").write_text("mine")
    if dist.get_rank() == 0:
        # Where a swap died after its first rename.
        home.rename(home.parent / ".state.saving")
        shutil.copytree(home.parent / ".state.saving", home.parent / ".state.replaced")
    dist.barrier()
    accelerator.load_state(str(home))
    return [
        *found,
        _steps(optimizer),
        (home / "notes.txt").read_text(),
        sorted(path.name for path in home.iterdir()),
    ]


def test_a_state_saved_over_another_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    for each in run_ranks(_save_in_one_place, 2, str(tmp_path)):
        same, again, steps, notes, names = each
        assert same
        assert again
        assert (steps, notes) == (2.0, "mine")
        assert {"config.json", "hf_speed", "model.safetensors", "random_states_1.pkl"} < {*names}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_named_states_are_limited_when_the_new_one_is_whole(tmp_path: Path) -> None:
    """Accelerate itself removes the only state before it writes the next one."""
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(_killed, 2, str(tmp_path), timeout_s=60)
    assert (tmp_path / "latest").read_text() == "checkpoints/checkpoint_1\n"
    names, step = run_ranks(_load_newest, 2, str(tmp_path))[0]
    assert names == ["checkpoint_1", "checkpoint_2"]
    assert step == 2.0
    # Without `latest`, the newest whole one is looked for.
    (tmp_path / "latest").unlink()
    assert run_ranks(_load_newest, 1, str(tmp_path))[0][1] == 2.0
