"""The pipeline benches: formulas, what is measured, stages that sleep, and that all train alike."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pipe_bubble
import pipe_sleep
import pipe_train
import pytest
import torch
from pipe_sleep import Note, SleepingLayer, SleepingModel, StepRecord, Times

BENCH = Path(pipe_bubble.__file__).parent
REPO = BENCH.parents[1]


@pytest.mark.parametrize(
    ("schedule", "chunks", "share"),
    [
        ("gpipe", 1, 3 / 19),
        ("1f1b", 1, 3 / 19),
        ("interleaved", 2, 3 / (2 * 16 + 3)),
        ("zb_h1", 1, 3 / (3 * 16 + 3)),
        ("zb_h2", 1, 0.0),
        ("zb_v", 2, 0.0),
    ],
)
def test_published_bubbles_at_4_ranks_and_16_microbatches(
    schedule: str, chunks: int, share: float
) -> None:
    assert pipe_bubble.published(schedule, 4, 16, chunks) == pytest.approx(share)


def _step(end: float, busy: float, held: float = 1.0) -> StepRecord:
    return StepRecord(end, busy, {}, held, None)


def test_a_bubble_is_what_the_slowest_rank_does_not_sleep_and_the_first_step_is_left_out() -> None:
    early = [_step(1.0, 9.0, 9.0), _step(2.0, 0.8), _step(3.0, 0.8)]
    late = [_step(5.0, 9.0, 9.0), _step(6.0, 0.6, 2.0), _step(7.5, 0.8)]
    measured = pipe_bubble.digest([early, late])
    assert measured.seconds == pytest.approx(1.25)
    assert measured.bubble == pytest.approx(1 - 0.75 / 1.25)
    assert measured.held == 2.0


def test_a_forward_is_held_until_its_weight_gradient() -> None:
    diary = [Note(kind, 0, 0.0, 0.0) for kind in "FFIFWIWIW"]
    assert pipe_sleep.most_held(diary, 1) == 3
    assert pipe_sleep.most_held(diary, 2) == 1.5


def _layer() -> tuple[SleepingLayer, list[Note]]:
    diary: list[Note] = []
    return SleepingLayer(0, Times(0.0, 0.0, 0.0), diary), diary


def _kinds(diary: list[Note]) -> str:
    return "".join(note.kind for note in diary)


def test_torch_sleeps_w_only_when_it_is_asked_for_the_weight() -> None:
    from torch.distributed.pipelining import _backward

    layer, diary = _layer()
    x = torch.randn(1, pipe_sleep.WIDTH, requires_grad=True)
    output = layer(x)
    assert _kinds(diary) == "F"
    _, groups = _backward.stage_backward_input(
        [output], [torch.ones_like(output)], [x], layer.parameters()
    )
    assert _kinds(diary) == "FI"
    _backward.stage_backward_weight(layer.parameters(), groups)
    assert _kinds(diary) == "FIW"


def test_a_waiting_linear_sleeps_w_when_its_queue_is_drained() -> None:
    from hf_speed.nn.deferred import Queue
    from hf_speed.pipe.weights import Switch, wrap_linears

    layer, diary = _layer()
    switch, queue = Switch(), Queue()
    wrap_linears([layer], switch)
    with switch.to(queue):
        layer(torch.randn(1, pipe_sleep.WIDTH)).sum().backward()
    assert _kinds(diary) == "FI"
    queue.drain()
    assert _kinds(diary) == "FIW"


def test_the_best_schedule_is_the_one_with_the_lowest_median() -> None:
    seconds = {
        "torch-1f1b": [2.0, 2.0, 2.0],
        "torch-zb_v": [1.0, 2.1, 2.1],
        "ours-1f1b": [1.9, 1.9, 1.9],
        "ours-zb_v": [1.0, 1.0, 4.0],
        "deepspeed": [2.2, 2.2, 2.2],
    }
    rows = {row.claim: row for row in pipe_train.rows_of(seconds, "toy")}
    assert rows["best schedule: ours-zb_v vs torch-1f1b"].ratio == pytest.approx(2.0)
    assert rows["best schedule: ours-zb_v vs deepspeed"].holds
    assert rows["same schedule: ours-1f1b vs torch-1f1b"].ratio == pytest.approx(2.0 / 1.9)


RUN_ALL = """
import json, sys
import pipe_llama, pipe_train
from pipe_sleep import SCHEDULES, TORCH_SCHEDULES, Case, Sleeper, Times
from pipe_world import Task, worlds

case = lambda name: Case(name, 2, 4, SCHEDULES[name], Times(0.001, 0.001, 0.001))
with worlds([Task("sleep", 2, Sleeper)]) as started:
    slept = {
        f"{system} {name}": [a[1] for a in started["sleep"].ask("run", system, case(name), 2)]
        for system, names in (("torch", TORCH_SCHEDULES), ("ours", SCHEDULES))
        for name in names
    }
names = [name for name in pipe_train.systems(list(SCHEDULES)) if name not in sys.argv[1:]]
with worlds(pipe_train.tasks(names, pipe_llama.TINY)) as started:
    trained = {name: [a[1] for a in world.ask("train", 3)] for name, world in started.items()}
print(json.dumps({"slept": slept, "trained": trained}))
"""

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """What every system did: two sleeping steps, three steps of a tiny Llama."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_ALL, *([] if HAS_DEEPSPEED else ["deepspeed"])],
        cwd=BENCH, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{BENCH}:{REPO}"},
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_every_microbatch_sleeps_once_forward_once_for_each_gradient(ran: dict[str, Any]) -> None:
    for name, ranks in ran["slept"].items():
        chunks = pipe_sleep.SCHEDULES[name.split()[1]]
        for _, _, naps, _, _ in ranks:
            assert naps == dict.fromkeys("FIW", 4 * chunks), name


def test_sleeping_stages_compute_the_loss_of_the_whole_model(ran: dict[str, Any]) -> None:
    batch = pipe_sleep.Batch.make(4)
    for name, ranks in ran["slept"].items():
        stages = 2 * pipe_sleep.SCHEDULES[name.split()[1]]
        model = SleepingModel(stages, Times(0.0, 0.0, 0.0), [])
        known = [loss for *_, loss in ranks if loss is not None]
        assert known == [pytest.approx(model(*batch).item(), rel=1e-5)] * len(known), name
        assert known, name


def _check_losses(ran: dict[str, Any], names: list[str]) -> None:
    expected = ran["trained"]["one-1"][0]
    assert expected[0] > expected[-1] > 0
    for name in names:
        known = [losses for losses in ran["trained"][name] if None not in losses]
        assert known, name
        for losses in known:
            assert losses == pytest.approx(expected, rel=1e-5), name


def test_all_systems_train_the_same_model_on_the_same_tokens(ran: dict[str, Any]) -> None:
    names = [name for name in ran["trained"] if name != "deepspeed"]
    assert len(names) == 2 + len(pipe_sleep.TORCH_SCHEDULES) + len(pipe_sleep.SCHEDULES)
    _check_losses(ran, names)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed (extra 'bench')")
def test_deepspeed_trains_the_same_too(ran: dict[str, Any]) -> None:
    _check_losses(ran, ["deepspeed"])
