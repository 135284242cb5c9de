"""The flat buffers of one unit.

A group holds the parameters of a unit that share a dtype and requires_grad. It owns

    full     the values that modules compute with: resident (stages 0-2), or there only while
             gathered (stage 3)
    master   this rank's part in the dtype that the optimizer updates: a view of `full` where that
             is resident and of the same dtype, else memory of its own
    pieces   what the optimizer holds: one nn.Parameter per parameter of which this rank has a part,
             each a view of `master`
    grad     this rank's part of the reduced gradient, of which the pieces' grads are views
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.errors import EngineError
from hf_speed.mesh import AxisGroup
from hf_speed.shard.layout import FlatLayout, Slot, SlotPiece
from hf_speed.zero.parameter import ShardedParameter, hide, placeholder_of, publish
from hf_speed.zero.units import ParameterEntry


class Dtypes(NamedTuple):
    """The dtypes of one group, each named by the step of the walk at which it is used."""

    compute: torch.dtype
    master: torch.dtype
    wire: torch.dtype
    accumulate: torch.dtype


class GroupAxes(NamedTuple):
    """The ranks that a group deals with.

    Attributes:
        gather: between which the buffer is divided, for gathers; size 1 at stage 0.
        reduce: the same ranks, for reductions.
        replica: ranks that hold equal parts.
    """

    gather: AxisGroup
    reduce: AxisGroup
    replica: AxisGroup


class GroupSpec(NamedTuple):
    """What a group is made of, before anything is allocated."""

    name: str
    entries: tuple[ParameterEntry, ...]
    dtypes: Dtypes
    trainable: bool


class FlatGroup:
    """One flat buffer of one unit, on one rank.

    Args:
        spec: parameters and dtypes.
        axes: the ranks that it is divided between and repeated on.
        resident: whether every rank keeps all values (stages 0-2), or only while gathered (3).
        device: where the buffers live.
        released: class of a parameter that is not here.
    """

    def __init__(
        self,
        spec: GroupSpec,
        *,
        axes: GroupAxes,
        resident: bool,
        device: torch.device,
        released: type[ShardedParameter],
    ) -> None:
        self.name = spec.name
        self.entries = spec.entries
        self.dtypes = spec.dtypes
        self.trainable = spec.trainable
        self.axes = axes
        self.device = device
        self.layout = FlatLayout.plan(
            [(entry.name, tuple(entry.parameter.shape)) for entry in spec.entries],
            dtype=spec.dtypes.compute,
            parts=axes.gather.size,
            replicas=axes.replica.size,
        )
        same_dtype = spec.dtypes.master == spec.dtypes.compute
        # One part in one dtype is the whole: there is nothing to release and nothing to copy.
        self.whole = axes.gather.size == 1 and same_dtype
        self.resident = resident or self.whole
        self.version = 0
        self.full: Tensor | None = None
        self.grad: Tensor | None = None
        self._released = released
        self._placeholders: list[Tensor] = []
        self._original_dtypes = [entry.parameter.dtype for entry in spec.entries]
        self.slot_pieces: tuple[SlotPiece, ...] = self.layout.pieces(axes.gather.rank)
        self.interval = self.layout.interval(axes.gather.rank)
        self._shares_memory = self.resident and same_dtype
        if self.resident:
            self.full = self._zeros(self.layout.padded_numel, spec.dtypes.compute)
        self.master = (
            self.part_of(self.full)
            if self._shares_memory and self.full is not None
            else self._zeros(self.layout.part_numel, spec.dtypes.master)
        )
        self.pieces: tuple[nn.Parameter, ...] = ()

    @property
    def travels(self) -> bool:
        """Whether gradients go to other ranks or change dtype on their way to the optimizer."""
        return not (self.whole and self.axes.replica.size == 1)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank lacks the values of other parts while the group is not gathered."""
        return not self.resident

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def part_of(self, full: Tensor) -> Tensor:
        """This rank's part of a full flat buffer."""
        return full[self.interval[0] : self.interval[1]]

    def slot_view(self, full: Tensor, slot: Slot) -> Tensor:
        """One parameter's values in a full flat buffer, in its true shape."""
        return full[slot.start : slot.start + slot.numel].view(slot.shape)

    def adopt(self) -> None:
        """Take over the parameters' values, re-point their data, and make the pieces.

        Parameters on the meta device bring no values: theirs are loaded later.
        """
        if self.full is not None:
            for slot, entry in zip(self.layout.slots, self.entries, strict=True):
                if not entry.parameter.is_meta:
                    self.slot_view(self.full, slot).copy_(entry.parameter.detach())
        if not self._shares_memory:
            # From the parameters, not from `full`: they may be more precise than its dtype.
            self._adopt_part()
        self._repoint()
        self.pieces = self._make_pieces()

    def _adopt_part(self) -> None:
        for piece in self.slot_pieces:
            parameter = self.entries[piece.index].parameter
            if not parameter.is_meta:
                flat = parameter.detach().reshape(-1)
                self.master_values(piece).copy_(flat[piece.start : piece.start + piece.numel])

    def master_values(self, piece: SlotPiece) -> Tensor:
        """What the master holds of one parameter: (piece.numel,)."""
        return self.master[piece.part_start : piece.part_start + piece.numel]

    def store(self, slot: Slot, values: Tensor) -> None:
        """Overwrite one whole parameter: this rank's part of it, and its working values if here."""
        flat = values.detach().reshape(-1)
        if self.full is not None:
            self.full[slot.start : slot.start + slot.numel].copy_(flat)
        for piece in self.slot_pieces:
            if self.layout.slots[piece.index] is slot:
                self.master_values(piece).copy_(flat[piece.start : piece.start + piece.numel])

    def _repoint(self) -> None:
        for index, slot in enumerate(self.layout.slots):
            parameter = self.entries[index].parameter
            placeholder = placeholder_of(slot.shape, dtype=self.layout.dtype, device=self.device)
            self._placeholders.append(placeholder)
            if parameter.is_meta:
                # `.data =` refuses to leave the meta device; swapping keeps the object.
                torch.utils.swap_tensors(
                    parameter, nn.Parameter(placeholder, requires_grad=self.trainable)
                )
        if self.full is None:
            self._hide()
        else:
            self._publish()

    def _make_pieces(self) -> tuple[nn.Parameter, ...]:
        if not self.trainable:
            return ()
        if self.whole:
            return tuple(entry.parameter for entry in self.entries)
        pieces = []
        for piece in self.slot_pieces:
            values = self.master_values(piece)
            if self.axes.gather.size == 1:
                values = values.view(self.layout.slots[piece.index].shape)
            pieces.append(nn.Parameter(values))
        return tuple(pieces)

    def piece_slots(self) -> Sequence[SlotPiece]:
        """The slot piece of each of `pieces`, in the same order; none where nothing is trained."""
        if not self.trainable:
            return ()
        if not self.whole:
            return self.slot_pieces
        return [
            SlotPiece(index, 0, slot.numel, slot.start)
            for index, slot in enumerate(self.layout.slots)
        ]

    def open(self, full: Tensor) -> None:
        """Give the modules their values: `full` has been gathered."""
        self.full = full
        self._publish()

    def close(self) -> Tensor:
        """Take the values away again; returns the buffer for reuse."""
        if self.full is None:
            raise EngineError(f"{self.name} was released twice.")
        full, self.full = self.full, None
        self._hide()
        return full

    def _publish(self) -> None:
        if self.full is None:
            return
        for slot, entry in zip(self.layout.slots, self.entries, strict=True):
            publish(entry.parameter, self.slot_view(self.full, slot))

    def _hide(self) -> None:
        for placeholder, entry in zip(self._placeholders, self.entries, strict=True):
            hide(entry.parameter, placeholder, self._released)

    def check_in_place(self) -> None:
        """Raise if someone moved, resized or replaced a parameter behind the engine's back."""
        for slot, entry in zip(self.layout.slots, self.entries, strict=True):
            parameter = entry.parameter
            replaced = any(
                each.module._parameters.get(each.key) is not parameter for each in entry.places
            )
            if replaced:
                raise EngineError(_moved(entry.name, "was replaced by another parameter"))
            if self.full is not None:
                expected = self.slot_view(self.full, slot)
                if parameter.shape != slot.shape or parameter.data_ptr() != expected.data_ptr():
                    raise EngineError(_moved(entry.name, "was moved or resized"))
            elif not isinstance(parameter, ShardedParameter) or parameter.shape != slot.shape:
                raise EngineError(_moved(entry.name, "was moved or resized"))
            if parameter.requires_grad != self.trainable:
                now = parameter.requires_grad
                raise EngineError(_moved(entry.name, f"had requires_grad set to {now}"))

    def restore(self, full: Tensor) -> None:
        """Make the parameters plain tensors again, with their own memory; the inverse of adopt."""
        for slot, entry, dtype in zip(
            self.layout.slots, self.entries, self._original_dtypes, strict=True
        ):
            publish(entry.parameter, self.slot_view(full, slot).to(dtype, copy=True))
        self.full = None


def _moved(name: str, what: str) -> str:
    return (
        f"{name} {what} after hf_speed took the model over, so its training would silently stop. "
        f"Change the model before it is prepared, or inside "
        f"`with hf_speed.gathered(model, modify=True):`, or call engine.detach() first and "
        f"prepare it again."
    )
