"""Which rank sits where."""

from itertools import product
from math import prod

import pytest

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AXES
from hf_speed.mesh.topology import axis_sizes, coordinates, groups_along, rank_of

SHAPES = [
    {},
    {"dp_shard": 4},
    {"dp_replicate": 2, "dp_shard": 3},
    {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "tp": 2},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_coordinates_and_ranks_are_inverses_and_the_last_axis_varies_fastest(shape: dict) -> None:
    sizes = axis_sizes(prod(shape.values()), shape)
    assert set(sizes) == set(AXES)
    places = [tuple(coordinates(rank, sizes).values()) for rank in range(prod(shape.values()))]
    by_axis = [coordinates(rank, sizes) for rank in range(len(places))]
    assert [rank_of(each, sizes) for each in by_axis] == list(range(len(places)))
    ordered = [tuple(each[axis] for axis in AXES) for each in by_axis]
    assert ordered == list(product(*(range(sizes[axis]) for axis in AXES)))


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_along_axes_divide_the_world(shape: dict) -> None:
    world = range(prod(shape.values()))
    sizes = axis_sizes(len(world), shape)
    for axes in (("dp_shard",), ("dp_replicate", "dp_shard"), AXES):
        groups = groups_along(axes, sizes)
        assert sorted(rank for group in groups for rank in group) == list(world)
        assert {len(group) for group in groups} == {prod(sizes[axis] for axis in axes)}
        for group in groups:
            fixed = {
                tuple(coordinates(rank, sizes)[axis] for axis in AXES if axis not in axes)
                for rank in group
            }
            assert len(fixed) == 1


def test_neighbouring_ranks_shard_and_distant_ones_replicate() -> None:
    sizes = axis_sizes(4, {"dp_replicate": 2, "dp_shard": 2})
    assert groups_along(("dp_shard",), sizes) == [[0, 1], [2, 3]]
    assert groups_along(("dp_replicate",), sizes) == [[0, 2], [1, 3]]


def test_a_mesh_that_is_not_the_world_is_an_error() -> None:
    with pytest.raises(MeshError, match="dp_replicate=2 x dp_shard=3 needs 6 ranks, but 4 were"):
        axis_sizes(4, {"dp_replicate": 2, "dp_shard": 3})
    with pytest.raises(MeshError, match=r"mesh\.tp=0 has no ranks"):
        axis_sizes(4, {"tp": 0})
