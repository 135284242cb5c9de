"""Layers go to stages so that the slowest is as fast as it can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_speed.errors import ConfigError
from hf_speed.pipe.partition import Costs, partition


def _slowest(costs: Costs, counts: tuple[int, ...]) -> float:
    bounds = [sum(counts[:index]) for index in range(len(counts) + 1)]
    times = [sum(costs.layers[a:b]) for a, b in pairwise(bounds)]
    times[0] += costs.before
    times[-1] += costs.after
    return max(times)


def test_equal_layers_are_dealt_out_evenly() -> None:
    assert partition(Costs((1.0,) * 8, 0.0, 0.0), 4) == (2, 2, 2, 2)
    # What is left over goes where it costs least: the squares are smallest.
    assert sorted(partition(Costs((1.0,) * 7, 0.0, 0.0), 3)) == [2, 2, 3]


def test_the_embedding_and_the_head_count_as_the_work_that_they_are() -> None:
    assert partition(Costs((1.0,) * 8, 0.0, 2.0), 2) == (5, 3)
    assert partition(Costs((1.0,) * 8, 2.0, 0.0), 2) == (3, 5)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.data(),
)
def test_no_other_cut_has_a_faster_slowest_stage(
    layers: list[int], before: int, after: int, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))
    costs = Costs(tuple(map(float, layers)), float(before), float(after))
    counts = partition(costs, num_stages)
    assert sum(counts) == len(layers)
    assert len(counts) == num_stages
    assert min(counts) >= 1
    best = min(
        _slowest(costs, tuple(b - a for a, b in zip((0, *cut), (*cut, len(layers)), strict=True)))
        for cut in combinations(range(1, len(layers)), num_stages - 1)
    )
    assert _slowest(costs, counts) == best


def test_more_stages_than_layers_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"5 stages, but the model has 4 layers.*at most 4"):
        partition(Costs((1.0,) * 4, 0.0, 0.0), 5)
