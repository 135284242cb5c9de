"""Remote stores behind the Trainer and the Accelerator: mirrored, lost, fetched, gone on with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import ProjectConfiguration

import hf_speed
from hf_speed.checkpoint.remote import inspect_remote, newest_url
from hf_speed.checkpoint.stores import Store
from hf_speed.cli import main
from hf_speed.errors import CheckpointError, ConfigError
from tests.integrations.toys import curve, flat, llama, stage, trainer
from tests.support import run_ranks

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def _config(home: Path, **options: Any) -> dict[str, Any]:
    return stage(3, checkpoint={"mirror": f"file://{home}/store", **options})


def _mirrored(directory: str) -> dict[str, Any]:
    """Train and mirror behind the training; then go on from the store alone, twice."""
    home = Path(directory)
    whole = trainer(home / "run", _config(home, asynchronous=True), **SAVING)
    whole.train()
    url = f"file://{home}/store"
    # The machine is lost.
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(home / "run")
        Store(url).write("latest", "checkpoint-2\n")
    dist.barrier()
    other = llama(seed=9)
    again = trainer(home / "run", _config(home), model=other, **SAVING)
    again.train(resume_from_checkpoint=True)
    named = trainer(home / "named", stage(1), model=llama(seed=8), **SAVING)
    named.train(resume_from_checkpoint=f"{url}/checkpoint-2")
    state = _states(home)
    return {
        "curves": [curve(each) for each in (whole, again, named)],
        "fetched": sorted(path.name for path in (home / "run").iterdir()),
        "state": state,
    }


def _states(home: Path) -> dict[str, Any]:
    """save_state and load_state at an address."""
    url = f"file://{home}/states/one"
    project = ProjectConfiguration(project_dir=str(home / "project"))
    accelerator = hf_speed.Accelerator(hf_speed=stage(3), project_config=project)
    model = llama(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.arange(3, 15)[None] + dist.get_rank()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()
    saved = accelerator.save_state(url)
    losses = [step(), step()]
    accelerator.load_state(url)
    again = [step(), step()]
    project.automatic_checkpoint_naming = True
    with pytest.raises(ConfigError, match="names an address, but with automatic_checkpoint_naming"):
        accelerator.save_state(url)
    project.automatic_checkpoint_naming = False
    dist.barrier()
    if dist.get_rank() == 0:
        Store(url).remove("hf_speed/manifest.json")
    dist.barrier()
    with pytest.raises(CheckpointError, match="was not uploaded to the end"):
        accelerator.load_state(url)
    dist.barrier()  # Rank 0 removes what the others may still see.
    return {
        "returned": saved == url,
        "losses": losses,
        "again": again,
        "left": sorted(path.name for path in (home / "project").iterdir()),
    }


def test_a_run_goes_on_from_its_mirror_as_if_nothing_had_happened(tmp_path: Path) -> None:
    first, second = run_ranks(_mirrored, 2, str(tmp_path))
    whole, again, named = (flat(each) for each in first["curves"])
    assert len(whole) == len(again) == len(named) == 4
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    torch.testing.assert_close(named[:, 0], whole[:, 0], rtol=1e-5, atol=0)
    assert "checkpoint-4" in first["fetched"]
    url = f"file://{tmp_path}/store"
    # save_total_limit is of the disk; the store keeps all.
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "checkpoint-2",
        "checkpoint-4",
        "latest",
    }
    assert newest_url(url) == f"{url}/checkpoint-4"
    assert inspect_remote(f"{url}/checkpoint-4", fast=False).is_whole
    for state in (first["state"], second["state"]):
        assert state["returned"]
        assert state["losses"] == state["again"]
        assert state["left"] == []
    assert main(["inspect", url]) == 0
    assert main(["export", url, str(tmp_path / "model")]) == 0
    (tmp_path / "store" / "checkpoint-4" / "config.json").write_text("{}")
    assert main(["inspect", "--fast", url]) == 1
    assert main(["export", url, str(tmp_path / "other")]) == 2


def test_a_mirror_that_cannot_be_opened_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    config = stage(1, checkpoint={"mirror": "nosuch://bucket/run"})
    with pytest.raises(ConfigError, match="nosuch://bucket/run cannot be opened: Protocol not"):
        trainer(tmp_path, config)
