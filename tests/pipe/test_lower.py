"""Lowering: where messages and shard actions stand."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speed.errors import ConfigError
from hf_speed.pipe.action import Action, Kind, counterpart
from hf_speed.pipe.lower import lower
from hf_speed.pipe.plan import Plan, looped
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import Costs
from hf_speed.pipe.validate import validate

SHARDING = (Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE)
COMPUTING = tuple(kind for kind in Kind if kind.computes)

names = st.sampled_from(sorted(SCHEDULES))


def _names(row: tuple[Action, ...]) -> str:
    return " ".join(f"{one.kind}{one.microbatch if one.microbatch >= 0 else ''}" for one in row)


def test_messages_of_two_ranks_stand_where_they_are_made_and_expected() -> None:
    plan = lower(make_plan("1f1b", num_ranks=2, num_microbatches=3))
    assert [_names(row) for row in plan.rows] == [
        "F0 SF0 F1 SF1 RB0 B0 F2 SF2 RB1 B1 RB2 B2",
        "RF0 RF1 F0 B0 SB0 F1 RF2 B1 SB1 F2 B2 SB2",
    ]


def test_neighbouring_stages_on_one_rank_send_nothing() -> None:
    for name in ("zb_v", "v_half", "dualpipe_v"):
        plan = lower(make_plan(name, num_ranks=3, num_microbatches=6))
        turns = {(Kind.SEND_FORWARD, 2), (Kind.RECV_FORWARD, 3)}
        turns |= {(Kind.SEND_BACKWARD, 3), (Kind.RECV_BACKWARD, 2)}
        found = {(action.kind, action.stage) for _, action in plan.actions()}
        assert not turns & found
        assert (Kind.SEND_FORWARD, 3) in found
    alone = lower(make_plan("interleaved", num_ranks=1, num_microbatches=3, chunks=3))
    assert all(action.kind.computes for _, action in alone.actions())


@settings(max_examples=60)
@given(
    names,
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([None, Costs(input=1.3, weight=0.6, hop=0.2)]),
)
def test_both_ends_of_a_pair_see_all_messages_in_one_order(
    name: str, num_ranks: int, num_microbatches: int, costs: Costs | None
) -> None:
    plan = make_plan(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    lowered = lower(plan, costs=costs)
    seen: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, action in lowered.actions():
        if action.kind.sends:
            seen[rank, lowered.peer(action)].append(action)
        elif action.kind.receives:
            seen[rank, lowered.peer(action)].append(counterpart(action))
    for (rank, peer), messages in seen.items():
        assert messages == seen[peer, rank]
    assert lowered.keep(*COMPUTING) == plan
    assert validate(lowered).blocking


def test_a_receive_is_posted_while_the_message_is_made() -> None:
    """The rank that will consume it posts it before the action that runs as the message comes."""
    plan = lower(make_plan("zb_h2", num_ranks=4, num_microbatches=9))
    row = plan.rows[3]
    posted = row.index(Action(Kind.RECV_FORWARD, 3, 3))
    used = row.index(Action(Kind.FORWARD, 3, 3))
    assert sum(one.kind.computes for one in row[posted:used]) >= 2


def test_parameters_are_gathered_once_a_step_and_one_action_ahead() -> None:
    plan = lower(make_plan("looped_bfs", num_ranks=2, num_microbatches=2), shard="step")
    assert _names(plan.rows[0]) == (
        "US F0 SF0 US F1 SF1 RF0 F0 SF0 RF1 F1 SF1 RB0 B0 SB0 RB1 B1 SB1 RS RD RB0 B0 RB1 B1 RS RD"
    )
    unsharded = [one.stage for one in plan.rows[0] if one.kind is Kind.UNSHARD]
    assert unsharded == [0, 2]


def test_parameters_gathered_for_every_microbatch_leave_only_the_reductions() -> None:
    plan = make_plan("zb_v", num_ranks=2, num_microbatches=4)
    lowered = lower(plan, shard="microbatch")
    assert {action.kind for _, action in lowered.actions()} & set(SHARDING) == {Kind.REDUCE}
    bare = lower(plan)
    assert lowered.keep(*(set(Kind) - set(SHARDING))) == bare
    assert not any(action.kind in SHARDING for _, action in bare.actions())


@settings(max_examples=40)
@given(names, st.integers(1, 6), st.integers(1, 12))
def test_shard_actions_enclose_all_uses(name: str, num_ranks: int, num_microbatches: int) -> None:
    plan = make_plan(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    lowered = lower(plan, shard="step")
    validate(lowered)
    for stage, rank in enumerate(lowered.placement):
        row = [one for one in lowered.rows[rank] if one.stage == stage]
        kinds = [one.kind for one in row if one.kind.computes or one.kind in SHARDING]
        assert kinds[0] is Kind.UNSHARD
        assert kinds[-2:] == [Kind.RESHARD, Kind.REDUCE]
        assert [kinds.count(kind) for kind in SHARDING] == [1, 1, 1]


def test_the_last_message_of_a_stage_is_sent_before_its_gradients_are_reduced() -> None:
    plan = lower(make_plan("1f1b", num_ranks=2, num_microbatches=2), shard="step")
    assert _names(plan.rows[1]).endswith("B1 SB1 RS RD")


def test_a_plan_of_forwards_has_no_gradients_to_reduce() -> None:
    plan = make_plan("interleaved", num_ranks=2, num_microbatches=3).keep(Kind.FORWARD)
    lowered = lower(plan, shard="step")
    kinds = {action.kind for _, action in lowered.actions()}
    assert kinds == {
        Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.UNSHARD, Kind.RESHARD
    }  # fmt: skip
    assert validate(lowered).blocking


def test_a_plan_that_deadlocks_is_not_lowered() -> None:
    rows = ((Action(Kind.FORWARD, 0, 0),), (Action(Kind.FORWARD, 1, 1),))
    with pytest.raises(ConfigError, match="waits for ever at FORWARD of microbatch 1 on stage 1"):
        lower(Plan("by hand", 2, 2, 2, looped(2, 1), rows))
