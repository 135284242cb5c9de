"""Validation: each law has a plan that breaks it, and an error that marks where."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.lower import lower
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.validate import validate

Row = list[Action]

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741
SF, RF = Kind.SEND_FORWARD, Kind.RECV_FORWARD
SB, RB = Kind.SEND_BACKWARD, Kind.RECV_BACKWARD


def _changed(plan: Plan, rank: int, change: Callable[[Row], Row | None]) -> Plan:
    """The plan with one row changed; a change in place returns None."""
    row = list(plan.rows[rank])
    row = change(row) or row
    return replace(plan, rows=(*plan.rows[:rank], tuple(row), *plan.rows[rank + 1 :]))


def _simple() -> Plan:
    return make_plan("1f1b", num_ranks=2, num_microbatches=3)


def _split() -> Plan:
    return make_plan("zb_h1", num_ranks=2, num_microbatches=3)


def _move(row: Row, action: Action, index: int) -> None:
    row.remove(action)
    row.insert(index, action)


def test_a_row_and_a_rank_for_everything() -> None:
    plan = _simple()
    with pytest.raises(ConfigError, match="places 1 stages and has 2 rows, for 2 stages on 2"):
        validate(replace(plan, placement=(0,)))
    with pytest.raises(ConfigError, match=r"stage 1 is not on rank 0.\nrank 0  F0 +F1 +>B0<"):
        validate(_changed(plan, 0, lambda row: row.__setitem__(2, Action(B, 1, 0))))
    with pytest.raises(ConfigError, match=r"stage 7 is not on rank 0.\nrank 0  >F0\(stage 7\)<"):
        validate(_changed(plan, 0, lambda row: row.__setitem__(0, Action(F, 7, 0))))
    with pytest.raises(ConfigError, match=r"microbatch 3 is not one of 3.\nrank 0  >F3<"):
        validate(_changed(plan, 0, lambda row: row.__setitem__(0, Action(F, 0, 3))))


def test_every_action_once() -> None:
    plan = _simple()
    with pytest.raises(ConfigError, match=r"FORWARD of microbatch 1 on stage 0 is there twice"):
        validate(_changed(plan, 0, lambda row: row.insert(0, row[1])))
    with pytest.raises(ConfigError, match=r"rank 1 does F for microbatch 2 .* not F\+B or F\+I\+W"):
        validate(_changed(plan, 1, lambda row: row[:-1]))
    with pytest.raises(ConfigError, match=r"rank 0 does nothing for microbatch 0 on stage 0"):
        validate(_changed(plan, 0, lambda row: [one for one in row if one.microbatch]))


def test_a_backward_is_whole_or_in_two_parts() -> None:
    with pytest.raises(ConfigError, match=r"rank 0 does F\+B\+W for microbatch 0"):
        validate(_changed(_simple(), 0, lambda row: [*row, Action(W, 0, 0)]))
    with pytest.raises(ConfigError, match=r"rank 0 does F\+I for microbatch 1"):
        validate(_changed(_split(), 0, lambda row: row.remove(Action(W, 0, 1))))
    mixed = _changed(_split(), 0, lambda row: [one for one in row if one != Action(W, 0, 1)])
    mixed = _changed(
        mixed, 0, lambda row: [one._replace(kind=B) if one == (I, 0, 1) else one for one in row]
    )
    assert validate(mixed).blocking


def test_a_weight_gradient_before_its_input_gradient_deadlocks() -> None:
    wrong = _changed(_split(), 0, lambda row: _move(row, Action(W, 0, 0), 0))
    with pytest.raises(ConfigError, match=r"at WEIGHT .* later on the same rank.\nrank 0  >W0<"):
        validate(wrong)


def test_forwards_alone_are_a_plan() -> None:
    plan = _simple().keep(F)
    assert validate(plan).one_queue
    with pytest.raises(ConfigError, match=r"rank 0 does nothing for microbatch 0 .* and not F\."):
        validate(_changed(plan, 0, lambda row: row[1:]))


def test_a_message_that_nobody_sends_is_found_at_its_maker() -> None:
    plan = lower(_simple())
    wrong = _changed(plan, 0, lambda row: row.remove(Action(SF, 0, 1)))
    with pytest.raises(ConfigError, match=r"FORWARD of microbatch 1 on stage 0 needs SEND_FORWARD"):
        validate(wrong)
    early = _changed(plan, 0, lambda row: _move(row, Action(SF, 0, 1), 0))
    with pytest.raises(ConfigError, match=r"needs SEND_FORWARD .* after it.\nrank 0 .* >F1<"):
        validate(early)
    late = _changed(plan, 1, lambda row: _move(row, Action(RF, 1, 2), len(row)))
    with pytest.raises(ConfigError, match=r"needs RECV_FORWARD .* before it.\nrank 0 .*\n.* >F2<"):
        validate(late)


def test_a_message_that_nobody_needs_is_marked() -> None:
    wrong = _changed(lower(_simple()), 0, lambda row: row.insert(1, Action(SB, 0, 0)))
    with pytest.raises(ConfigError, match=r"nobody needs SEND_BACKWARD .*\nrank 0  F0 +>SB0<"):
        validate(wrong)


def test_messages_of_one_direction_must_not_overtake_each_other() -> None:
    wrong = _changed(lower(_simple()), 1, lambda row: _move(row, Action(RF, 1, 1), 0))
    with pytest.raises(ConfigError, match=r"would get what .* sends: messages overtake"):
        validate(wrong)


def test_messages_in_circles_are_told_from_those_in_order() -> None:
    """Each rank sends before it receives: fine if both go on, a deadlock if a send blocks."""
    plan = lower(_simple())
    crossed = _changed(plan, 1, lambda row: _move(row, Action(RF, 1, 1), 4))
    found = validate(crossed)
    assert not found.blocking
    assert not found.one_queue
    assert validate(plan).blocking


def test_gathers_must_enclose_all_uses() -> None:
    plan = lower(_split(), shard="step")
    for kind, index in ((Kind.UNSHARD, 5), (Kind.RESHARD, 2), (Kind.REDUCE, -4)):
        action = Action(kind, 0, -1)
        wrong = _changed(plan, 0, lambda row, action=action, index=index: _move(row, action, index))
        with pytest.raises(ConfigError, match=f"{kind.name} on stage 0 is not (before|after) all"):
            validate(wrong)


def test_messages_waiting_are_counted_and_bounded() -> None:
    plan = make_plan("zb_h2", num_ranks=4, num_microbatches=12)
    assert max(validate(plan).peak_messages) == 3
    assert validate(plan, max_messages=3) == validate(plan)
    with pytest.raises(ConfigError, match=r"has 3 messages waiting, more than 2.\n"):
        validate(plan, max_messages=2)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "looped_bfs"])
def test_messages_waiting_do_not_grow_with_the_microbatches(name: str) -> None:
    """In breadth-first order they must: all outputs of a stage wait until the next one starts."""
    peaks = [
        validate(make_plan(name, num_ranks=4, num_microbatches=m)).peak_messages for m in (8, 40)
    ]
    assert peaks[0] == peaks[1]
    assert max(peaks[0]) <= 4
