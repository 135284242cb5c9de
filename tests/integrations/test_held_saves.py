"""A save behind the training holds what it began with, whatever the training does meanwhile."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_speed.checkpoint.held import Held
from hf_speed.config import load_config
from hf_speed.engine import Engine
from hf_speed.engine.delivery import can_deliver
from hf_speed.errors import CheckpointError
from hf_speed.integrations.weights import write_model
from tests.engine.toys import global_batch, share, toy_model
from tests.support import run_ranks

CASES: tuple[tuple[int, torch.dtype | None, str], ...] = (
    (1, None, "host"),  # copied when the save begins: a tier is read where an engine says
    (0, None, "device"),
    (1, None, "device"),
    (2, torch.bfloat16, "device"),
    (3, None, "device"),
    (3, torch.bfloat16, "device"),
)


def test_what_has_been_read_is_never_copied_and_the_rest_once() -> None:
    read, unread = torch.ones(3), torch.ones(3)
    first, second = Held(read, "read"), Held(unread, "unread")
    with first.reading() as value:
        assert value is read
    for held in (first, second, second):
        held.secure()
    unread.zero_()
    with second.reading() as value:
        assert value.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="unread was read before"), second.reading():
        pass


def test_securing_waits_for_a_value_that_is_being_read() -> None:
    held = Held(torch.ones(3), "w")
    secured = threading.Event()
    with held.reading():
        thread = threading.Thread(target=lambda: (held.secure(), secured.set()))
        thread.start()
        assert not secured.wait(0.05)
    thread.join()
    assert secured.is_set()


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_change_that_nobody_announced_is_refused(when: str) -> None:
    value = torch.ones(3)
    parameter = nn.Parameter(torch.zeros(3))
    parameter.data = value
    held = Held(value, "layer.weight", [parameter])

    def save() -> None:
        with held.reading(), torch.no_grad():
            if when == "while":
                parameter.add_(1)

    if when == "before":
        with torch.no_grad():
            parameter.add_(1)
        held.secure()
    with pytest.raises(CheckpointError, match=r"layer.weight was changed after the save began"):
        save()


class _Run:
    """An engine that has trained a step and saves behind the training."""

    def __init__(self, stage: int, compute: torch.dtype | None, tier: str) -> None:
        self.model = toy_model("llama", tie_word_embeddings=stage == 1)
        config = {
            "zero": {"stage": stage},
            "offload": {"optimizer": tier},
            "checkpoint": {"asynchronous": True, "max_shard_bytes": 4096},
        }
        self.engine = Engine.attach(self.model, load_config(config), compute_dtype=compute)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.engine.bind_optimizer(self.optimizer)
        assert can_deliver(self.engine.parts) == (tier == "device")
        self.step()

    def step(self) -> None:
        self.engine.backward(self.model(**share(global_batch("llama", 0))).loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_at_once(self, directory: str) -> None:
        save = self.engine.saves.at_once("at once")
        write_model(self.engine, directory, save=save)
        self.engine.save(directory, save=save)

    def start_behind(self, directory: str) -> threading.Event:
        """Begin a save that reads nothing before the event is set."""
        may_read = threading.Event()
        save = self.engine.saves.begin("behind")
        save.submit(may_read.wait)
        write_model(self.engine, directory, save=save)
        self.engine.save(directory, save=save)
        return may_read


def _save_all(directory: str) -> _Run:
    """Save every case at once, and behind a step that comes before anything is read."""
    for number, case in enumerate(CASES):
        run = _Run(*case)
        run.save_at_once(f"{directory}/{number}/at_once")
        may_read = run.start_behind(f"{directory}/{number}/behind")
        run.step()
        assert run.engine.saves.secured_s > 0
        may_read.set()
        run.engine.saves.wait()
    return run


def _check_all(directory: Path) -> None:
    for number, case in enumerate(CASES):
        at_once = directory / str(number) / "at_once"
        names = {path.relative_to(at_once) for path in at_once.rglob("*") if path.is_file()}
        assert sum(name.suffix == ".safetensors" for name in names) > 4, case
        for name in names:
            behind = directory / str(number) / "behind" / name
            assert behind.read_bytes() == (at_once / name).read_bytes(), (case, name)


def _saves(directory: str) -> None:
    run = _save_all(directory)
    may_read = run.start_behind(f"{directory}/changed")
    if dist.get_rank() == 0:
        with torch.no_grad():
            run.optimizer.param_groups[0]["params"][0].add_(1)
    may_read.set()
    with pytest.raises(CheckpointError, match=r"failed on rank 0: .* was changed after the save"):
        run.engine.saves.wait()


def test_a_save_behind_is_that_of_the_moment_it_began(tmp_path: Path) -> None:
    run_ranks(_saves, 2, str(tmp_path))
    _check_all(tmp_path)


def test_one_process_saves_as_several_do(tmp_path: Path) -> None:
    _save_all(str(tmp_path))
    _check_all(tmp_path)
