"""Layouts: every element in one place, of one rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speed.shard.layout import ALIGNMENT_NUMEL, FlatLayout

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=6)


def _plan(shapes: list[tuple[int, ...]], parts: int = 1, replicas: int = 1) -> FlatLayout:
    named = [(f"p{index}", shape) for index, shape in enumerate(shapes)]
    return FlatLayout.plan(named, dtype=torch.float32, parts=parts, replicas=replicas)


@given(SHAPES, st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_pieces_of_all_parts_cover_every_element_once(
    shapes: list[tuple[int, ...]], parts: int, replicas: int
) -> None:
    layout = _plan(shapes, parts, replicas)
    buffer = torch.full((layout.padded_numel,), -1)
    for index, slot in enumerate(layout.slots):
        buffer[slot.start : slot.start + slot.numel] = index
    seen = [torch.zeros(slot.numel) for slot in layout.slots]
    for part in range(parts):
        start, stop = layout.interval(part)
        assert stop - start == layout.part_numel
        for piece in layout.pieces(part):
            assert piece.numel >= 1
            assert piece.part_start + piece.numel <= layout.part_numel
            first = start + piece.part_start
            assert first == layout.slots[piece.index].start + piece.start
            assert (buffer[first : first + piece.numel] == piece.index).all()
            seen[piece.index][piece.start : piece.start + piece.numel] += 1
    assert all((each == 1).all() for each in seen)


@given(SHAPES, st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_gaps_are_what_belongs_to_no_parameter(
    shapes: list[tuple[int, ...]], parts: int, replicas: int
) -> None:
    layout = _plan(shapes, parts, replicas)
    used = torch.zeros(layout.padded_numel)
    for slot in layout.slots:
        used[slot.start : slot.start + slot.numel] += 1
    for start, stop in layout.gaps():
        assert start < stop
        used[start:stop] += 1
    assert (used == 1).all()
    assert layout.numel == sum(slot.numel for slot in layout.slots)


@given(SHAPES, st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_slots_are_aligned_and_parts_divide_among_replicas(
    shapes: list[tuple[int, ...]], parts: int, replicas: int
) -> None:
    layout = _plan(shapes, parts, replicas)
    assert all(slot.start % ALIGNMENT_NUMEL == 0 for slot in layout.slots)
    assert layout.padded_numel == parts * layout.part_numel
    assert layout.part_numel % (ALIGNMENT_NUMEL * replicas) == 0
    assert layout.part_numel > 0


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_order_of_slots_does_not_depend_on_the_number_of_parts(parts: int) -> None:
    shapes = [(3, 5), (), (0, 4), (17,), (2, 2, 2)]
    assert _plan(shapes, parts).slots == _plan(shapes).slots


def test_more_parts_than_elements_leave_some_without_pieces() -> None:
    layout = _plan([(3,)], parts=4)
    assert [len(layout.pieces(part)) for part in range(4)] == [1, 0, 0, 0]
