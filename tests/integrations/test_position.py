"""A resumed run goes on at the sample that would have come next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

import hf_speed
from hf_speed.errors import CheckpointError
from hf_speed.integrations.transformers import position
from hf_speed.integrations.transformers.position import (
    DataPosition,
    Start,
    lengths_from,
    start_after,
)
from tests.integrations.toys import arguments, llama, stage
from tests.support import run_ranks

NUM_ROWS = 24
SAVED_AT = 8
"""Updates of 4 samples: one pass is 6 of them, and 8 samples of the second pass are seen."""


class _Stream(IterableDataset):
    """The rows in their order, without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from _rows()


class _Watching(hf_speed.Trainer):
    """Notes which samples this rank trains on, by their first token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        """As the base class does."""
        self.seen.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().training_step(model, inputs, *args)


class Seen(NamedTuple):
    """What a run has trained on.

    Attributes:
        updates: step (before the update) -> samples of all ranks, in order.
        message: what it says of its position.
        last: step at which it ended.
        rate: learning rate of the last update.
    """

    updates: dict[int, list[int]]
    message: str
    last: int
    rate: float


def _rows() -> list[dict[str, torch.Tensor]]:
    ids = [torch.full((6,), 3 + number) for number in range(NUM_ROWS)]
    return [{"input_ids": each, "labels": each} for each in ids]


def _train(directory: str, checkpoint: str | None, batch: int, **options: Any) -> Seen:
    """`batch` samples a micro-step of all ranks."""
    data = _Stream() if options.pop("stream", False) else _rows()
    args = arguments(
        directory,
        options.pop("config", stage(1)),
        **{
            "per_device_train_batch_size": batch // dist.get_world_size(),
            "gradient_accumulation_steps": 1,
            "max_steps": -1,
            "num_train_epochs": 3,
            "seed": 5,
            "save_strategy": "no" if checkpoint else "steps",
            "save_steps": SAVED_AT,
            **options,
        },
    )
    made = _Watching(model=llama(num_hidden_layers=1), args=args, train_dataset=data)
    with patch.object(position._log, "log") as log:
        made.train(resume_from_checkpoint=checkpoint)
    texts = [call.args[1] % call.args[2:] for call in log.call_args_list]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, made.seen)
    updates: dict[int, list[int]] = {}
    for calls in zip(*everyone, strict=True):
        updates.setdefault(calls[0][0], []).extend(token for _, ids in calls for token in ids)
    rates = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
    return Seen(updates, "\n".join(texts), made.state.global_step, rates[-1])


def _whole(root: str) -> dict[str, Seen]:
    return {
        "map": _train(f"{root}/map", None, 4),
        "stream": _train(f"{root}/stream", None, 4, stream=True, max_steps=16),
    }


def _again(root: str) -> dict[str, Seen]:
    """On two ranks, as before, and as a pipeline."""
    checkpoint = f"{root}/map/checkpoint-{SAVED_AT}"
    shared = {"config": stage(1, mesh={"tp": 2}), "per_device_train_batch_size": 4}
    return {
        "same": _train(f"{root}/x", checkpoint, 4),
        "sliced": _train(f"{root}/x", checkpoint, 4, **shared),
        "stream": _train(
            f"{root}/x", f"{root}/stream/checkpoint-{SAVED_AT}", 4, stream=True, max_steps=16
        ),
    }


def _alone(root: str) -> dict[str, Seen]:
    checkpoint = f"{root}/map/checkpoint-{SAVED_AT}"
    stream = f"{root}/stream/checkpoint-{SAVED_AT}"
    accumulated = {"gradient_accumulation_steps": 2}
    return {
        "same": _train(f"{root}/x", checkpoint, 4),
        "accumulated": _train(f"{root}/x", checkpoint, 2, **accumulated),
        "twice": _train(f"{root}/y", checkpoint, 4, **accumulated, save_strategy="epoch"),
        "odd": _train(f"{root}/x", checkpoint, 3),
        "half": _train(f"{root}/x", checkpoint, 2, max_steps=12),
        "unskipped": _train(f"{root}/x", checkpoint, 8, ignore_data_skip=True),
        "stream": _train(f"{root}/x", stream, 8, stream=True, max_steps=12),
    }


def _later(root: str) -> Seen:
    """Of a run whose batch has changed on the way: 6 updates of 4, then 3 + ... of 8."""
    (checkpoint,) = Path(f"{root}/y").glob("checkpoint-10")
    return _train(f"{root}/x", str(checkpoint), 8)


def _order(seen: Seen, first: int = 0) -> list[int]:
    """Samples from an update on, in order."""
    return [token for step, ids in sorted(seen.updates.items()) if step >= first for token in ids]


class Runs(NamedTuple):
    """One run, and those that go on from its eighth step."""

    root: str
    whole: dict[str, Seen]
    again: dict[str, Seen]
    alone: dict[str, Seen]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """On two ranks; and on two and on one."""
    root = str(tmp_path_factory.mktemp("runs"))
    whole = run_ranks(_whole, 2, root)[0]
    return Runs(root, whole, run_ranks(_again, 2, root)[0], run_ranks(_alone, 1, root)[0])


def test_the_next_sample_is_the_one_that_would_have_come(runs: Runs) -> None:
    root, whole, again, alone = runs
    left = _order(whole["map"], SAVED_AT)
    second, third = left[:16], left[16:]
    assert set(third) == {3 + number for number in range(NUM_ROWS)}
    for seen in (again["same"], alone["same"], alone["accumulated"]):
        assert _order(seen) == left
        assert seen.last == whole["map"].last == 18
        assert seen.rate == whole["map"].rate
        assert seen.message == "Going on after step 8 at sample 8 of pass 2 over the data."
    # Both ranks of a slice see the whole batch.
    assert _order(again["sliced"])[::2] != left
    assert [ids[:4] for ids in again["sliced"].updates.values()] == [
        left[start : start + 4] for start in range(0, len(left), 4)
    ]
    # Twice the batch: 2 updates end the pass, 3 more the run.
    assert _order(alone["twice"]) == left
    assert alone["twice"].last == SAVED_AT + 2 + 3
    assert alone["twice"].rate > 0.0
    assert "an update has 8 samples now and had 4. The run ends at step 13" in (
        alone["twice"].message
    )
    assert "seen again" not in alone["twice"].message
    assert _order(run_ranks(_later, 1, root)[0]) == third
    # 8 samples are 2 updates of 3, and 2 samples.
    assert _order(alone["odd"])[2:] == left
    assert _order(alone["odd"])[:2] == _order(whole["map"])[30:32]
    assert "2 samples are seen again, since 8 is no multiple of 3" in alone["odd"].message
    assert _order(alone["half"]) == second[:8]
    assert alone["half"].last == 12
    assert set(_order(alone["unskipped"])[:NUM_ROWS]) == set(third)


def test_a_stream_goes_on_in_the_pass_and_at_the_sample_that_would_have_come(runs: Runs) -> None:
    left = _order(runs.whole["stream"], SAVED_AT)
    assert left == [3 + number % NUM_ROWS for number in range(32, 64)]
    assert _order(runs.again["stream"]) == left
    assert _order(runs.alone["stream"]) == left


def _loops(*, resumed: bool) -> list[list[int]]:
    """First tokens of this rank's batches: in a loop of an Accelerator, over rows and a stream."""
    # Without it a shuffled order is drawn anew, and is another one on every number of ranks.
    seeded = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5)
    accelerator = hf_speed.Accelerator(hf_speed=stage(1), dataloader_config=seeded)
    found = []
    for data in (_rows(), _Stream()):
        batch = 4 // accelerator.num_batches
        shuffle = {"shuffle": True} if isinstance(data, list) else {}
        loader = accelerator.prepare(DataLoader(data, batch_size=batch, **shuffle))
        if resumed:
            loader = accelerator.skip_first_batches(loader, 8 // (batch * accelerator.num_batches))
        found.append([token for rows in loader for token in rows["input_ids"][:, 0].tolist()])
    return found


def _looped() -> list[list[list[int]]]:
    return [_loops(resumed=False), _loops(resumed=True)]


def test_a_loop_skips_samples_on_any_mesh() -> None:
    ((whole, alone),) = run_ranks(_looped, 1)
    two = run_ranks(_looped, 2)
    for index in range(2):
        assert alone[index] == whole[index][8:]
        halves = [rank[1][index] for rank in two]
        joined = [
            token
            for start in range(0, len(halves[0]), 2)
            for half in halves
            for token in half[start : start + 2]
        ]
        assert joined == whole[index][8:]


def test_a_position_becomes_updates_of_the_new_size() -> None:
    there = DataPosition(passes=1, samples=8, batch=4, step=8)
    assert start_after(there, batch=4, updates_per_pass=6) == Start(1, 2, 8, 0)
    assert start_after(there, batch=8, updates_per_pass=3) == Start(1, 1, 8, 0)
    assert start_after(there, batch=3, updates_per_pass=8) == Start(1, 2, 6, 2)
    assert start_after(there, batch=16, updates_per_pass=None) == Start(1, 0, 0, 8)
    # Of a data set that has become smaller.
    assert start_after(there, batch=4, updates_per_pass=2) == Start(2, 0, 0, 0)


def test_what_is_left_is_counted_from_the_position() -> None:
    start = Start(1, 1, 8, 0)
    lengths = position._Lengths(3, 3, 24, 72, 8, 3, 9)
    left = lengths_from(lengths, start, step=8, by_passes=True, is_stream=False)
    assert (left.num_train_epochs, left.max_steps) == (3, 13)
    lengths = lengths._replace(num_train_epochs=10, max_steps=30)
    left = lengths_from(lengths, start, step=20, by_passes=False, is_stream=False)
    assert (left.num_train_epochs, left.max_steps) == (5, 30)
    assert lengths_from(lengths, start, step=20, by_passes=False, is_stream=True) == lengths


@pytest.mark.parametrize(
    "value",
    [
        7,
        {"passes": 1},
        {"passes": 1, "samples": -1, "batch": 4, "step": 8},
        {"passes": 0, "samples": 0, "batch": 0, "step": 8},
        {"passes": True, "samples": 0, "batch": 4, "step": 8},
    ],
)
def test_a_position_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"a/manifest.json: notes.position is .*passes, samp"):
        DataPosition.of_notes({"position": value}, "a/manifest.json")
    assert DataPosition.of_notes({}, "a") is None
    assert DataPosition.of_notes(None, "a") is None
