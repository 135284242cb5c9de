"""Which rank sits where: pure arithmetic over axis sizes, testable without a process group."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AXES, Axis


def axis_sizes(world_size: int, requested: Mapping[Axis, int]) -> dict[Axis, int]:
    """Fill in the axes left out with 1 and check the product.

    Raises:
        MeshError: an axis is below 1, or the product is not `world_size`.
    """
    sizes: dict[Axis, int] = {axis: requested.get(axis, 1) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1:
            raise MeshError(f"mesh.{axis}={size} has no ranks. Give a size of at least 1.")
    total = prod(sizes.values())
    if total != world_size:
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1"
        raise MeshError(
            f"The mesh {shape} needs {total} ranks, but {world_size} were started. "
            f"Start {total} processes (hf-speed launch -n {total} ...) or change `mesh` in the "
            f"config."
        )
    return sizes


def coordinates(rank: int, sizes: Mapping[Axis, int]) -> dict[Axis, int]:
    """The place of `rank` along each axis; the last of AXES varies fastest."""
    places: dict[Axis, int] = {}
    for axis in reversed(AXES):
        rank, places[axis] = divmod(rank, sizes[axis])
    return places


def rank_of(places: Mapping[Axis, int], sizes: Mapping[Axis, int]) -> int:
    """Inverse of `coordinates`."""
    rank = 0
    for axis in AXES:
        rank = rank * sizes[axis] + places[axis]
    return rank


def groups_along(axes: Sequence[Axis], sizes: Mapping[Axis, int]) -> list[list[int]]:
    """Every set of ranks that differ only along `axes`, in an order that all ranks agree on."""
    others = [axis for axis in AXES if axis not in axes]
    varying = [axis for axis in AXES if axis in axes]
    groups = []
    for fixed in product(*(range(sizes[axis]) for axis in others)):
        members = []
        for moved in product(*(range(sizes[axis]) for axis in varying)):
            places = dict(zip([*others, *varying], [*fixed, *moved], strict=True))
            members.append(rank_of(places, sizes))
        groups.append(sorted(members))
    return groups
