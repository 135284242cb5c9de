"""Bytes of model state per rank at each stage, from sizes alone: nothing is allocated.

With P elements, all trained in 16 bit with float32 masters and Adam, over N ranks
(ZeRO, arXiv:1910.02054, figure 1):

    stage 0: 16P       parameters 2P, gradients 2P, optimizer 12P (master, two moments)
    stage 1: 4P + 12P/N
    stage 2: 2P + 14P/N
    stage 3: 16P/N     plus the units in flight
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

MASTER_BYTES = 4
"""Bytes of a float32 element: masters and the optimizer's moments."""


class ParameterSize(NamedTuple):
    """One parameter: element count, bytes per element while it computes, and whether it trains."""

    numel: int
    itemsize: int
    trained: bool


class StateBytes(NamedTuple):
    """Bytes per rank at one stage."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    """Masters and moments."""
    in_flight: int
    """Gathered units (stage 3), and the gradient of the one being reduced (stages 2 and 3)."""

    @property
    def total(self) -> int:
        """All of it, units in flight included."""
        return self.parameters + self.gradients + self.optimizer + self.in_flight


def estimate_states(
    units: Sequence[Sequence[ParameterSize]],
    *,
    num_shards: int,
    masters: bool = True,
    num_moments: int = 2,
    prefetch_units: int = 1,
) -> tuple[StateBytes, StateBytes, StateBytes, StateBytes]:
    """Estimate stages 0, 1, 2 and 3.

    Args:
        units: the parameters of each unit, as `zero.units` plans them: the root, which stays
            gathered from the start of the forward to the end of the backward, comes last.
        num_shards: ranks that share one copy of the state (mesh.dp_shard).
        masters: 16-bit parameters have a float32 copy.
        num_moments: tensors that the optimizer keeps per parameter (Adam 2, momentum 1, SGD 0).
        prefetch_units: units gathered ahead of the one that computes.

    Returns:
        One estimate per stage. A share is rounded up: the last byte lives somewhere.
    """
    sizes = [size for unit in units for size in unit]
    parameters = _bytes(sizes)
    gradients = _bytes(sizes, trained_only=True)
    optimizer = sum(
        _optimizer_bytes(size, masters=masters, num_moments=num_moments) for size in sizes
    )

    def share(num_bytes: int, *, from_stage: int, stage: int) -> int:
        return ceil(num_bytes / num_shards) if stage >= from_stage else num_bytes

    def at(stage: int) -> StateBytes:
        return StateBytes(
            stage=stage,
            parameters=share(parameters, from_stage=3, stage=stage),
            gradients=share(gradients, from_stage=2, stage=stage),
            optimizer=share(optimizer, from_stage=1, stage=stage),
            in_flight=_in_flight(units, stage=stage, prefetch_units=prefetch_units),
        )

    return at(0), at(1), at(2), at(3)


def _optimizer_bytes(size: ParameterSize, *, masters: bool, num_moments: int) -> int:
    if not size.trained:
        return 0
    has_master = masters and size.itemsize < MASTER_BYTES
    # Moments are of the dtype that the optimizer updates: the master's, or the parameter's own.
    updated = MASTER_BYTES if has_master else size.itemsize
    return size.numel * (num_moments * updated + (MASTER_BYTES if has_master else 0))


def _in_flight(units: Sequence[Sequence[ParameterSize]], *, stage: int, prefetch_units: int) -> int:
    """Bytes of what passes through: gathered units (stage 3), a gradient on its way (2 and 3)."""
    if stage < 2:
        return 0
    gradient = max((_bytes(unit, trained_only=True) for unit in units), default=0)
    if stage < 3:
        return gradient
    *blocks, root = units
    largest = sorted((_bytes(block) for block in blocks), reverse=True)
    return gradient + _bytes(root) + sum(largest[: prefetch_units + 1])


def _bytes(sizes: Sequence[ParameterSize], *, trained_only: bool = False) -> int:
    return sum(size.numel * size.itemsize for size in sizes if size.trained or not trained_only)
