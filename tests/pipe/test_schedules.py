"""Schedules: every plan is valid; bubbles and peaks are those of the papers.

Times are F = I = W = 1 on one stage, B = 2. `waits` is the time that a rank waits between the first
start and the last end of all ranks.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import Costs, Simulation, simulate
from hf_speed.pipe.validate import validate

LOOPED = [name for name, entry in SCHEDULES.items() if entry.chunks is None]
SPLIT = ["zb_h1", "zb_h2", "zb_v", "v_half", "v_min"]
RANKS = range(1, 9)

names = st.sampled_from(sorted(SCHEDULES))
ranks = st.integers(1, 8)
microbatches = st.integers(1, 20)
times = st.floats(0.1, 3.0)


def _plan(name: str, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Plan:
    chunks = chunks if SCHEDULES[name].chunks is None else None
    return make_plan(name, num_ranks=num_ranks, num_microbatches=num_microbatches, chunks=chunks)


def _run(name: str, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Simulation:
    return simulate(_plan(name, num_ranks, num_microbatches, chunks))


def _waits(simulation: Simulation) -> float:
    return simulation.makespan - max(simulation.busy)


@settings(max_examples=150)
@given(names, ranks, microbatches, st.integers(1, 4))
def test_every_plan_is_valid_under_every_model_of_messages(
    name: str, num_ranks: int, num_microbatches: int, chunks: int
) -> None:
    plan = _plan(name, num_ranks, num_microbatches, chunks)
    found = validate(plan)
    assert found.one_queue
    assert found.blocking
    counts = Counter(action.kind for _, action in plan.actions())
    whole = plan.num_stages * num_microbatches
    assert counts[Kind.FORWARD] == counts[Kind.BACKWARD] + counts[Kind.INPUT] == whole
    assert counts[Kind.INPUT] == counts[Kind.WEIGHT]
    assert plan.schedule == name


@settings(max_examples=50)
@given(names, ranks, microbatches, st.integers(1, 4))
def test_gradients_of_a_stage_add_up_in_the_order_of_the_microbatches(
    name: str, num_ranks: int, num_microbatches: int, chunks: int
) -> None:
    plan = _plan(name, num_ranks, num_microbatches, chunks)
    for stage, rank in enumerate(plan.placement):
        made = [
            action.microbatch
            for action in plan.rows[rank]
            if action.stage == stage and action.kind in (Kind.BACKWARD, Kind.WEIGHT)
        ]
        assert made == list(range(num_microbatches))


@settings(max_examples=50)
@given(st.sampled_from(SPLIT), ranks, microbatches, times, times, times, st.floats(0, 1))
def test_plans_for_any_times_are_valid_and_hold_no_more(
    name: str, p: int, m: int, forward: float, dgrad: float, wgrad: float, hop: float
) -> None:
    costs = Costs(forward=forward, input=dgrad, weight=wgrad, hop=hop)
    plan = make_plan(name, num_ranks=p, num_microbatches=m, costs=costs)
    assert validate(plan).blocking
    limits = {
        "zb_h1": p,
        "zb_h2": 2 * p - 1,
        "zb_v": 2 * p,
        "v_half": p + 2,
        "v_min": -(-(2 * p + 8) // 3),
    }
    assert max(simulate(plan, costs).peak_activations) <= limits[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_never_waits(name: str) -> None:
    simulation = _run(name, 1, 5)
    assert simulation.bubble == simulation.span_bubble == 0
    assert simulation.makespan == 5 * 3 * (SCHEDULES[name].chunks or 2)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_flushed_schedules_have_the_published_bubble(name: str) -> None:
    for p in RANKS:
        for m in range(1, 20):
            simulation = _run(name, p, m)
            assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
            held = [m if name == "gpipe" else min(m, p - rank) for rank in range(p)]
            assert list(simulation.peak_activations) == held


@pytest.mark.parametrize("name", LOOPED)
def test_v_stages_a_rank_divide_the_bubble_by_v_for_any_number_of_microbatches(name: str) -> None:
    for p in RANKS:
        for v in (1, 2, 3, 4):
            for m in range(p, 2 * p + 3):
                expected = (p - 1) / (v * m + p - 1)
                assert _run(name, p, m, v).bubble == pytest.approx(expected, abs=1e-12)


def test_interleaving_holds_what_megatron_holds() -> None:
    for p in range(2, 9):
        for v in (2, 3):
            peaks = _run("interleaved", p, 3 * p, v).peak_activations
            assert list(peaks) == [2 * (p - 1 - r) + (v - 1) * p + 1 for r in range(p)]


def test_interleaving_with_one_stage_a_rank_is_1f1b() -> None:
    assert _plan("interleaved", 4, 7, 1).rows == _plan("1f1b", 4, 7).rows
    assert _plan("looped_bfs", 4, 7, 1).rows == _plan("gpipe", 4, 7).rows


def test_zb_h1_waits_a_third_of_1f1b_and_holds_no_more() -> None:
    for p in RANKS:
        for m in range(p, 3 * p):
            ours, other = _run("zb_h1", p, m), _run("1f1b", p, m)
            assert 3 * _waits(ours) == _waits(other) == 3 * (p - 1)
            assert max(ours.peak_activations) == max(other.peak_activations) == p


def test_zb_h2_waits_only_to_start_for_twice_the_activations() -> None:
    for p in RANKS:
        for m in range(2 * p - 1, 3 * p):
            simulation = _run("zb_h2", p, m)
            assert simulation.span_bubble == 0
            assert _waits(simulation) == p - 1
            assert max(simulation.peak_activations) == 2 * p - 1


def test_zb_v_waits_only_to_start_and_holds_what_1f1b_holds() -> None:
    for p in RANKS:
        for m in range(2 * p - 1, 3 * p):
            simulation = _run("zb_v", p, m)
            assert simulation.span_bubble == 0
            assert _waits(simulation) == p - 1
            # Two stages a rank, each half of one of 1F1B's: 2 p halves are its p.
            assert max(simulation.peak_activations) == 2 * p


def test_zb_v_is_below_two_percent_and_cannot_be_shorter() -> None:
    simulation = _run("zb_v", 4, 16)
    assert simulation.span_bubble < 0.02
    # The last rank cannot start before the first microbatch has passed the three before it.
    first = min(row[0].start for row in simulation.events[3:])
    assert simulation.makespan == first + simulation.busy[3] == 99


def test_v_half_holds_and_waits_half_of_1f1b() -> None:
    for p in range(2, 17):
        for m in (p, 2 * p + 1):
            simulation = _run("v_half", p, m)
            assert max(simulation.peak_activations) <= p + 2
            assert _waits(simulation) == max(3 * p - 5, 2) <= 6 * (p - 1) / 2


def test_v_min_holds_a_third_of_1f1b_and_waits_two_thirds() -> None:
    for p in range(2, 17):
        for m in (p, 2 * p + 1):
            simulation = _run("v_min", p, m)
            assert max(simulation.peak_activations) <= -(-(2 * p + 8) // 3)
            assert _waits(simulation) == 4 * p - 5 <= 6 * (p - 1) * 2 / 3


def test_dualpipe_v_waits_at_most_as_published() -> None:
    for p in RANKS:
        for m in range(2 * p, 3 * p + 1):
            simulation = _run("dualpipe_v", p, m)
            # (PP/2 - 1) (F&B + B - 3 W) for PP = 2 p stages, without overlap: F&B = F + B.
            published = (p - 1) * (3 + 2 - 3)
            assert _waits(simulation) == p - 1 <= published or p == 1
            # PP + 1 microbatches on one stage.
            assert list(simulation.peak_activations) == [2 * p + 1] * p


def test_dualpipe_v_pairs_forwards_with_backwards_of_the_other_stage() -> None:
    p, m = 4, 16
    plan = _plan("dualpipe_v", p, m)
    for rank, row in enumerate(plan.rows):
        down, up = plan.stages_of(rank)
        kinds = [(action.kind, action.stage) for action in row]
        pair = [
            (Kind.FORWARD, down),
            (Kind.BACKWARD, up),
            (Kind.FORWARD, up),
            (Kind.BACKWARD, down),
        ]
        found = sum(kinds[i : i + 4] == pair for i in range(len(kinds)))
        assert found == m - 2 * p + rank + 1


def test_fewer_microbatches_than_ranks_is_a_plan_of_those_there_are() -> None:
    for name in SCHEDULES:
        plan = _plan(name, 6, 2)
        assert {action.microbatch for _, action in plan.actions()} == {0, 1}
        assert simulate(plan).makespan <= 2 * plan.num_stages * 3


def test_weight_gradients_fill_the_gaps_that_the_given_times_leave() -> None:
    costs = Costs(input=1.5, weight=0.5, hop=0.2)
    tuned = make_plan("zb_h1", num_ranks=4, num_microbatches=16, costs=costs)
    default = make_plan("zb_h1", num_ranks=4, num_microbatches=16)
    flushed = make_plan("1f1b", num_ranks=4, num_microbatches=16)
    lengths = [simulate(plan, costs).makespan for plan in (tuned, default, flushed)]
    assert lengths[0] <= lengths[1] < lengths[2]


def test_what_a_w_keeps_decides_how_long_it_may_wait() -> None:
    costs = Costs(kept=0.25)
    plan = make_plan("zb_h1", num_ranks=4, num_microbatches=16, costs=costs)
    assert max(simulate(plan, costs).peak_activations) <= 4
    assert simulate(plan, costs).makespan <= _run("zb_h1", 4, 16).makespan


def test_a_plan_of_the_last_rank_is_the_published_1f1b() -> None:
    row = _plan("1f1b", 3, 4).rows[1]
    expected = "F0 F1 B0 F2 B1 F3 B2 B3"
    assert " ".join(f"{action.kind}{action.microbatch}" for action in row) == expected
    assert row[0] == Action(Kind.FORWARD, 1, 0)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"pipe.schedule='zb-h1' is no schedule. .* 'zb_h1'\?"):
        make_plan("zb-h1", num_ranks=2, num_microbatches=2)


def test_stages_a_rank_that_a_schedule_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipe.chunks=2 does not .*'1f1b'.* exactly 1 stage"):
        make_plan("1f1b", num_ranks=2, num_microbatches=2, chunks=2)
    with pytest.raises(ConfigError, match=r"pipe.chunks=3 .*'zb_v'.*'interleaved', 'looped_bfs'"):
        make_plan("zb_v", num_ranks=2, num_microbatches=2, chunks=3)
    with pytest.raises(ConfigError, match=r"pipe.chunks=0 .*'interleaved'.* at least 1 stage"):
        make_plan("interleaved", num_ranks=2, num_microbatches=2, chunks=0)


def test_no_ranks_and_no_microbatches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh.pp=0 has no ranks"):
        make_plan("1f1b", num_ranks=0, num_microbatches=2)
    with pytest.raises(ConfigError, match=r"pipe.microbatches=0 leaves nothing to do"):
        make_plan("1f1b", num_ranks=2, num_microbatches=0)
