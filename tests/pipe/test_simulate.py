"""Simulation: times of actions, waiting and memory, by hand-made plans."""

from dataclasses import replace

import pytest

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.lower import lower
from hf_speed.pipe.plan import Plan, folded, looped
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import Costs, simulate

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741


def _two_ranks(*rows: list[tuple[Kind, int, int]]) -> Plan:
    actions = tuple(tuple(Action(*one) for one in row) for row in rows)
    return Plan("by hand", 2, 2, 1, looped(2, 1), actions)


def _repeated(plan: Plan, times: int) -> Plan:
    """The plan done several times, each rank going on as soon as it can."""
    m = plan.num_microbatches
    rows = tuple(
        tuple(
            action._replace(microbatch=action.microbatch + turn * m)
            for turn in range(times)
            for action in row
        )
        for row in plan.rows
    )
    return replace(plan, rows=rows, num_microbatches=times * m)


def test_actions_start_when_rank_and_input_are_there() -> None:
    plan = _two_ranks([(F, 0, 0), (I, 0, 0), (W, 0, 0)], [(F, 1, 0), (I, 1, 0), (W, 1, 0)])
    costs = Costs(forward=(2.0, 3.0), input=4.0, weight=5.0, hop=0.5)
    first, second = simulate(plan, costs).events
    assert [(event.start, event.end) for event in second] == [(2.5, 5.5), (5.5, 9.5), (9.5, 14.5)]
    assert [(event.start, event.end) for event in first] == [(0, 2), (10, 14), (14, 19)]


def test_waiting_is_counted_over_all_ranks_and_by_rank() -> None:
    plan = _two_ranks([(F, 0, 0), (B, 0, 0)], [(F, 1, 0), (B, 1, 0)])
    found = simulate(plan)
    assert found.makespan == 6
    assert found.busy == (3, 3)
    assert found.bubble == 0.5
    assert found.bubbles == (0.5, 0.5)


def test_a_whole_backward_takes_both_parts_unless_it_is_given() -> None:
    plan = _two_ranks([(F, 0, 0), (B, 0, 0)], [(F, 1, 0), (B, 1, 0)])
    assert simulate(plan, Costs(input=2.0, weight=3.0)).makespan == 12
    assert simulate(plan, Costs(input=2.0, weight=3.0, backward=(1.0, 2.0))).makespan == 5


def test_a_message_to_the_own_rank_takes_no_time() -> None:
    rows = ((Action(F, 0, 0), Action(F, 1, 0), Action(B, 1, 0), Action(B, 0, 0)),)
    plan = Plan("by hand", 1, 2, 1, folded(1), rows)
    assert simulate(plan, Costs(hop=7.0)).makespan == 6


def test_activations_are_held_until_the_last_part_of_the_backward() -> None:
    forwards = [(F, 0, 0), (F, 0, 1)]
    split = [(I, 0, 0), (F, 0, 2), (W, 0, 0), (I, 0, 1), (W, 0, 1), (I, 0, 2), (W, 0, 2)]
    rows = (tuple(Action(*one) for one in [*forwards, *split]),)
    plan = Plan("by hand", 1, 1, 3, (0,), rows)
    assert simulate(plan).peak_activations == (3.0,)
    assert simulate(plan, Costs(kept=0.25)).peak_activations == (2.25,)
    assert simulate(plan, Costs(kept=0.0)).peak_activations == (2.0,)
    assert simulate(plan, Costs(activation=(0.5,))).peak_activations == (1.5,)


def test_larger_stages_weigh_more() -> None:
    plan = make_plan("1f1b", num_ranks=3, num_microbatches=6)
    found = simulate(plan, Costs(activation=(1.0, 2.0, 4.0)))
    assert found.peak_activations == (3.0, 4.0, 4.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_span_is_the_time_of_a_step_where_ranks_do_not_wait_for_each_other(name: str) -> None:
    plan = make_plan(name, num_ranks=4, num_microbatches=9)
    once, more, most = (simulate(_repeated(plan, times)) for times in (1, 4, 5))
    assert most.makespan - more.makespan == once.span


def test_messages_of_a_lowered_plan_change_nothing() -> None:
    plan = make_plan("zb_v", num_ranks=3, num_microbatches=6)
    assert simulate(lower(plan, shard="step")) == simulate(plan)


def test_an_empty_plan_takes_no_time() -> None:
    plan = make_plan("1f1b", num_ranks=2, num_microbatches=1).keep()
    found = simulate(plan)
    assert (found.makespan, found.span, found.bubble, found.span_bubble) == (0, 0, 0, 0)


def test_an_action_after_its_consumer_is_named_and_marked() -> None:
    plan = _two_ranks([(B, 0, 0), (F, 0, 0)], [(F, 1, 0), (B, 1, 0)])
    with pytest.raises(
        ConfigError, match=r"rank 0 waits for ever at BACKWARD .* later on the same"
    ):
        simulate(plan)
    with pytest.raises(ConfigError, match=r"rank 0  >B0< +F0\nrank 1  F0"):
        simulate(plan)


def test_ranks_that_wait_in_a_circle_are_named_and_marked() -> None:
    rows = (
        [(F, 0, 0), (B, 0, 0), (F, 0, 1), (B, 0, 1)],
        [(F, 1, 0), (F, 1, 1), (B, 1, 0), (B, 1, 1)],
    )
    plan = replace(_two_ranks(*rows), num_microbatches=2)
    with pytest.raises(ConfigError, match=r"waits for ever at BACKWARD of microbatch 0 on stage 0"):
        simulate(plan)
    with pytest.raises(ConfigError, match=r"whose rank waits as well.\nrank 0  F0 +>B0< F1 +B1"):
        simulate(plan)


def test_times_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Costs.weight=\(1.0, 0.0\) is no time"):
        Costs(weight=(1.0, 0.0))
    with pytest.raises(ConfigError, match=r"Costs.backward=-1.0 is no time"):
        Costs(backward=-1.0)
    with pytest.raises(ConfigError, match=r"Costs.hop=0.0 and Costs.kept=2.0"):
        Costs(kept=2.0)
