"""The state of a run by name: what a rank holds of it, and whole tensors across ranks.

Kinds: "parameter" (working values), "master" (where kept apart), "gradient", and the optimizer's
own ("exp_avg", "momentum_buffer", ...).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.errors import EngineError
from hf_speed.mesh.collectives import all_gather_flat
from hf_speed.mesh.journal import Journal
from hf_speed.shard.layout import Slot, SlotPiece
from hf_speed.zero.group import FlatGroup


class Holding(NamedTuple):
    """What this rank holds of one parameter: an interval of it, flattened."""

    group: FlatGroup
    slot: Slot
    piece: nn.Parameter
    slot_piece: SlotPiece


def holdings(groups: list[FlatGroup]) -> Iterator[Holding]:
    """Every piece on this rank, in layout order."""
    for group in groups:
        for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
            yield Holding(group, group.layout.slots[slot_piece.index], piece, slot_piece)


def whole_tensor(
    group: FlatGroup,
    slot: Slot,
    part_of: Callable[[nn.Parameter], Tensor | None],
    *,
    dtype: torch.dtype,
    journal: Journal,
) -> Tensor:
    """Assemble one parameter-shaped tensor from the ranks' pieces. Collective over the shard axis.

    Args:
        group: that holds the parameter.
        slot: the parameter.
        part_of: this rank's values for a piece, any shape of its size; None counts as zeros.
        dtype: of the result.
        journal: of the run.

    Returns:
        A new tensor of slot.shape on every rank. One all-gather of the group.
    """
    full = torch.zeros(group.layout.padded_numel, dtype=dtype, device=group.device)
    mine = group.part_of(full)
    for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
        values = part_of(piece) if group.layout.slots[slot_piece.index] is slot else None
        if values is not None:
            target = mine[slot_piece.part_start : slot_piece.part_start + slot_piece.numel]
            target.copy_(values.detach().reshape(-1))
    all_gather_flat(full, group=group.axes.gather, journal=journal).wait()
    return group.slot_view(full, slot).clone()


def set_parts(
    group: FlatGroup, slot: Slot, value: Tensor, part_of: Callable[[nn.Parameter], Tensor]
) -> None:
    """Write this rank's interval of `value` (slot.shape) into what `part_of` names."""
    if tuple(value.shape) != slot.shape:
        raise EngineError(
            f"{slot.name} has shape {slot.shape}, but the new value has {tuple(value.shape)}."
        )
    flat = value.detach().reshape(-1)
    for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
        if group.layout.slots[slot_piece.index] is slot:
            target = part_of(piece)
            part = flat[slot_piece.start : slot_piece.start + slot_piece.numel]
            target.copy_(part.view(target.shape))


def tensor_states(optimizer: Optimizer, piece: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors of the piece's own size: moments and their like."""
    state: Mapping[str, Any] = optimizer.state.get(piece, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == piece.numel()
    }


def scalar_states(optimizer: Optimizer, piece: nn.Parameter) -> dict[str, float]:
    """The optimizer's counters of a piece, as plain numbers."""
    scalars: dict[str, float] = {}
    for key, value in optimizer.state.get(piece, {}).items():
        if (isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0) or isinstance(
            value, (int, float)
        ):
            scalars[key] = float(value)
    return scalars
