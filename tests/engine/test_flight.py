"""Buffers in flight are counted as the pool makes them."""

from hf_speed.engine.flight import Buffer, Passing, most_alive

SENT = Buffer(1000, 2)
SUM = Buffer(1000, 4)
PART = Buffer(250, 4)
OTHER = Buffer(64, 2)


def _most(num_blocks: int, passing: Passing, *, fills: bool = True) -> dict[Buffer, int]:
    return most_alive([[passing]] * num_blocks, [], fills=fills)


def test_two_reductions_are_under_way_and_one_more_is_filled() -> None:
    passing = Passing(sent=SENT)
    assert [_most(count, passing)[SENT] for count in range(5)] == [0, 2, 4, 5, 5]
    assert [_most(count, passing, fills=False)[SENT] for count in range(5)] == [0, 2, 4, 4, 4]


def test_sums_of_another_dtype_leave_one_by_one() -> None:
    assert _most(6, Passing(sent=SENT, summed=SUM)) == {SENT: 5, SUM: 6}


def test_a_sum_that_has_left_is_a_buffer_for_the_next() -> None:
    assert _most(6, Passing(sent=SUM, summed=SUM)) == {SUM: 6 + 3}
    assert _most(6, Passing(sent=SUM, summed=SUM), fills=False) == {SUM: 6 + 2}


def test_groups_of_one_unit_share_the_places_under_way() -> None:
    unit = [Passing(sent=SENT), Passing(sent=OTHER)]
    assert most_alive([unit] * 8, [], fills=True) == {SENT: 3, OTHER: 3}


def test_what_goes_on_to_a_tier_waits_for_two_others() -> None:
    passing = Passing(sent=SENT, leaving=PART)
    assert [_most(count, passing)[PART] for count in (1, 2, 3, 9)] == [1, 2, 3, 3]


def test_units_that_stay_for_the_backward_go_as_it_passes_them() -> None:
    passing = Passing(sent=SUM, gathered=SUM)
    assert _most(4, passing)[SUM] == 4 + 3
    frozen = Passing(gathered=SUM)
    assert _most(4, frozen)[SUM] == 4


def test_the_roots_buffer_is_filled_from_the_beginning() -> None:
    root = [Passing(sent=SENT)]
    assert most_alive([[Passing(sent=SENT)]] * 4, root, fills=True) == {SENT: 6}
    assert most_alive([[Passing(sent=SENT)]] * 4, root, fills=False) == {SENT: 4}
