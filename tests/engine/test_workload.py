"""The formulas of activations are the papers', and the schedule says how many are held."""

import pytest

from hf_speed.config import load_config
from hf_speed.config.parallel import resolve_pipe
from hf_speed.engine.workload import (
    Workload,
    activation_bytes,
    head_bytes,
    layer_bytes,
    plan_of,
)
from hf_speed.errors import ConfigError
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import simulate

HIDDEN = 1000
WORK = Workload(num_rows=16, num_tokens=10, hidden=HIDDEN, vocabulary=5000, itemsize=2)


@pytest.mark.parametrize(
    ("num_slices", "sequence_parallel", "per_feature"),
    [(1, False, 34), (4, False, 10 + 24 / 4), (4, True, 4 + 30 / 4), (1, True, 34)],
)
def test_a_layer_in_16_bit(num_slices: int, sequence_parallel: bool, per_feature: float) -> None:  # noqa: FBT001
    found = layer_bytes(WORK, num_slices=num_slices, sequence_parallel=sequence_parallel)
    assert found == pytest.approx(per_feature * HIDDEN)


def test_a_layer_in_fp32_has_the_same_masks() -> None:
    wide = WORK._replace(itemsize=4)
    assert layer_bytes(wide, num_slices=1, sequence_parallel=False) == (2 * 32 + 2) * HIDDEN


def test_recomputed_layers_keep_their_input() -> None:
    again = WORK._replace(recomputes=True)
    assert layer_bytes(again, num_slices=4, sequence_parallel=False) == 2 * HIDDEN
    assert layer_bytes(again, num_slices=4, sequence_parallel=True) == 2 * HIDDEN / 4


def test_the_head_keeps_logits_of_its_words() -> None:
    assert head_bytes(WORK, num_slices=1) == 4 * HIDDEN + 4 * 5000
    assert head_bytes(WORK, num_slices=4) == 4 * HIDDEN + 5000


def test_without_a_pipeline_all_of_the_batch_is_kept() -> None:
    kept = activation_bytes(WORK, None, num_layers=(3,), num_slices=1, sequence_parallel=False)
    assert kept == (16 * 10 * (3 * 34 * HIDDEN + 4 * HIDDEN + 4 * 5000),)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_keeps_what_its_simulation_says(schedule: str) -> None:
    plan = make_plan(schedule, num_ranks=4, num_microbatches=8)
    layers = (3,) * plan.num_stages
    kept = activation_bytes(
        WORK._replace(vocabulary=0, hidden=HIDDEN),
        plan,
        num_layers=layers,
        num_slices=1,
        sequence_parallel=False,
    )
    peaks = simulate(plan).peak_activations
    for rank in range(4):
        # Two rows a microbatch. The last stage has the head besides.
        expected = peaks[rank] * 2 * 10 * 3 * 34 * HIDDEN
        has_head = plan.placement[-1] == rank
        assert kept[rank] == pytest.approx(expected, rel=0.05 if has_head else 1e-9)


def test_microbatches_are_those_of_the_config_or_four_a_rank() -> None:
    pipe = resolve_pipe(load_config({"mesh": {"pp": 2}, "pipe": {"microbatches": 3}}))
    left_open = resolve_pipe(load_config({"mesh": {"pp": 2}}))
    for config, num_rows, count in ((pipe, 16, 3), (left_open, 16, 8), (left_open, 5, 5)):
        plan = plan_of(config, WORK._replace(num_rows=num_rows), num_ranks=2)
        assert plan is not None
        assert plan.num_microbatches == count
    assert plan_of(left_open, WORK, num_ranks=1) is None
    assert WORK.rows_of(3) == 6
    with pytest.raises(ConfigError, match=r"pipe\.microbatches=3 needs a batch of at least 3"):
        plan_of(pipe, WORK._replace(num_rows=2), num_ranks=2)
