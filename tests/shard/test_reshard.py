"""Intervals and boxes against index arithmetic on real tensors."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_speed.shard.reshard import Box, boxes, cover_error, flat_start, intersect

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(0, prod(shape) - start))


@given(intervals())
def test_boxes_are_the_interval_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, numel = case
    tensor = torch.arange(prod(shape)).reshape(shape)
    found = boxes(shape, start, numel)
    parts = [tensor[box.slices()].reshape(-1) for box in found]
    joined = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    assert joined.tolist() == list(range(start, start + numel))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(intervals())
def test_each_box_is_one_stretch(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, numel = case
    here = start
    for box in boxes(shape, start, numel):
        assert flat_start(shape, box) == here
        here += box.numel
    assert here == start + numel


@given(SHAPES, st.data())
def test_intersection_holds_the_common_elements(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    tensor = torch.arange(prod(shape)).reshape(shape)

    def draw_box() -> Box:
        offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        extents = tuple(
            data.draw(st.integers(1, size - offset))
            for size, offset in zip(shape, offsets, strict=True)
        )
        return Box(offsets, extents)

    left, right = draw_box(), draw_box()
    common = set(tensor[left.slices()].flatten().tolist()) & set(
        tensor[right.slices()].flatten().tolist()
    )
    both = intersect(left, right)
    assert (set(tensor[both.slices()].flatten().tolist()) if both else set()) == common


@given(SHAPES, st.data())
def test_cut_intervals_cover_exactly_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, prod(shape)), max_size=4)))
    edges = [0, *cuts, prod(shape)]
    pieces = tuple(
        box for begin, end in pairwise(edges) for box in boxes(shape, begin, end - begin)
    )
    assert cover_error(shape, pieces) is None
    assert "missing" in (cover_error(shape, pieces[1:]) or "")
    assert "overlap" in (cover_error(shape, (*pieces, pieces[0])) or "")


def test_worst_case_reaches_the_bound() -> None:
    assert len(boxes((4, 4, 4), 1, 62)) == 5


def test_tensors_without_elements_have_no_boxes() -> None:
    assert boxes((3, 0), 0, 0) == ()
    assert cover_error((3, 0), ()) is None


def test_interval_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 8\) is not within a tensor of shape \(2, 3\)"):
        boxes((2, 3), 3, 5)


def test_blocks_that_are_no_stretches_are_checked_too() -> None:
    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 2))
    assert cover_error((4, 4), (left, right)) is None
    assert "overlap" in (cover_error((4, 4), (left, Box((0, 1), (4, 2)))) or "")
    # As many elements as the first row has, but a column.
    column, row = Box((0, 0), (2, 1)), Box((1, 0), (1, 2))
    assert "overlap" in (cover_error((2, 2), (column, row)) or "")


@given(SHAPES.filter(bool), st.data())
def test_pieces_are_refused_exactly_when_two_have_a_common_element(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    count = torch.zeros(shape)
    pieces = []
    for _ in range(data.draw(st.integers(1, 5))):
        offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        extents = tuple(
            data.draw(st.integers(1, min(2, size - offset)))
            for size, offset in zip(shape, offsets, strict=True)
        )
        pieces.append(Box(offsets, extents))
        count[pieces[-1].slices()] += 1
    assert ("overlap" in (cover_error(shape, tuple(pieces)) or "")) == bool((count > 1).any())


def test_box_outside_is_named() -> None:
    assert "does not fit" in (cover_error((2, 3), (Box((0, 0), (3, 3)),)) or "")
    assert "does not fit" in (cover_error((2, 3), (Box((0,), (2,)),)) or "")
