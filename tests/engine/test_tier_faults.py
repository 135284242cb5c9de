"""What happens to a run when its tiers fail: a full, missing or shared disk, a kill, lost bytes."""

import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from hf_speed.config import load_config
from hf_speed.engine import Engine
from hf_speed.errors import ConfigError, OffloadError
from tests.engine.toys import global_batch, share, speed, toy_model
from tests.support import RankError, run_ranks, small_disk

KINDS = ("optimizer", "gradients", "parameters")


def _everything_on(path: str | Path) -> dict[str, object]:
    return {**dict.fromkeys(KINDS, "disk"), "paths": [str(path)], "update": "fused"}


def _train(path: str, num_steps: int) -> list[float]:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(3, offload=_everything_on(path)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    losses = []
    for step in range(num_steps):
        loss = model(**share(global_batch("llama", step))).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine.detach()
    return losses


def test_a_disk_that_is_full_stops_every_rank_before_training(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "small", "24k") as path,
        pytest.raises(RankError, match="No plan fits this model") as failed,
    ):
        run_ranks(_train, 2, str(path), 1, timeout_s=60.0)
    assert len(failed.value.reports) == 2


def _attach_without_room(path: str) -> None:
    # More than all tiers have together: refused with the table, nothing made.
    tree = {"offload": {**_everything_on(path), "host_bytes": 1 << 20}, "zero": {"stage": 3}}
    tree["offload"]["optimizer"] = tree["offload"]["gradients"] = None
    tree["offload"]["parameters"] = None
    with pytest.raises(ConfigError, match="No plan fits this model"):
        Engine.attach(toy_model("llama", hidden_size=1024, num_layers=1), load_config(tree))
    assert list(Path(path).iterdir()) == []


def test_a_missing_directory_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, OffloadError), match="nowhere"):
        Engine.attach(toy_model("llama"), speed(3, offload=_everything_on(tmp_path / "nowhere")))


def _run_until_killed(path: str, started: str) -> None:
    model = toy_model("llama")
    engine = Engine.attach(model, speed(3, offload=_everything_on(path)))
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    step = 0
    while True:
        engine.backward(model(**global_batch("llama", step)).loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 2:
            Path(started).touch()


def test_a_killed_run_leaves_nothing_that_the_next_one_meets(tmp_path: Path) -> None:
    path, started = tmp_path / "disk", tmp_path / "started"
    path.mkdir()
    clean = run_ranks(_train, 1, str(path), 3)
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_until_killed, args=(str(path), str(started))
    )
    process.start()
    deadline = time.monotonic() + 60.0
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started.exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert run_ranks(_train, 1, str(path), 3) == clean
    assert list(path.iterdir()) == []


def _two_at_once(path: str) -> tuple[list[float], list[float]]:
    """Two engines in one process, on one path."""
    models = [toy_model("llama"), toy_model("llama", num_layers=1)]
    engines = [Engine.attach(each, speed(3, offload=_everything_on(path))) for each in models]
    optimizers = []
    for model, engine in zip(models, engines, strict=True):
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-2))
        engine.bind_optimizer(optimizers[-1])
    losses: list[list[float]] = [[], []]
    for step in range(3):
        for index, engine in enumerate(engines):
            loss = models[index](**global_batch("llama", step)).loss
            engine.backward(loss)
            optimizers[index].step()
            optimizers[index].zero_grad()
            losses[index].append(loss.item())
    for engine in engines:
        engine.detach()
    return losses[0], losses[1]


def test_two_runs_share_a_directory_and_no_bytes() -> None:
    with tempfile.TemporaryDirectory() as path:
        ((first, second),) = run_ranks(_two_at_once, 1, path)
        (alone,) = run_ranks(_train, 1, path, 3)
    assert first == alone
    assert second != alone


def _truncated(path: str) -> None:
    """The file of the disk tier loses its bytes under a running engine."""
    model = toy_model("llama", hidden_size=64, intermediate_size=96)
    engine = Engine.attach(model, speed(3, offload=_everything_on(path)))
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    engine.backward(model(**global_batch("llama", 0)).loss)
    optimizer.step()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith(path) and "part" in target:
            os.truncate(f"/proc/self/fd/{entry.name}", 0)

    def go_on() -> None:
        for step in range(2):
            engine.backward(model(**global_batch("llama", step)).loss)
            optimizer.step()

    with pytest.raises(OffloadError, match=r"parameters|master|gradients|exp_avg"):
        go_on()


def test_a_file_that_loses_bytes_is_an_error_and_never_a_number() -> None:
    with tempfile.TemporaryDirectory() as path:
        run_ranks(_truncated, 1, path)


def test_a_model_larger_than_all_tiers_is_refused_with_the_table(tmp_path: Path) -> None:
    run_ranks(_attach_without_room, 1, str(tmp_path))
