"""The flat buffers of one unit.

A group holds the parameters of a unit that share a dtype and requires_grad. It owns

    full     the values that modules compute with: resident (stages 0-2), or there only while
             gathered (stage 3, or parameters on a tier other than the device)
    master   this rank's part in the dtype that the optimizer updates: a view of `full` where that
             is resident and of the same dtype, else a buffer of its own, perhaps in a store
    sources  cells that `full` is brought from, where that is not the master
    pieces   what the optimizer holds: one nn.Parameter per parameter of which this rank has a part,
             each a view of `master`, or without values while the master is not in memory
    grad     this rank's part of the reduced gradient, of which the pieces' grads are views
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_speed.errors import EngineError
from hf_speed.offload import Store, Ticket
from hf_speed.shard.layout import FlatLayout, Slot, SlotPiece
from hf_speed.zero.cells import (
    ON_DEVICE,
    Cell,
    GroupTiers,
    ShadowedCell,
    StoreCell,
    TensorCell,
    scratch,
    twin_of,
)
from hf_speed.zero.parameter import ShardedParameter, hide, placeholder_of, publish
from hf_speed.zero.spec import GroupAxes, GroupSpec


class FlatGroup:
    """One flat buffer of one unit, on one rank.

    Args:
        spec: parameters and dtypes.
        axes: the ranks that it is divided between and repeated on.
        divided: whether parameters are divided between the ranks of `axes.gather` (stage 3).
        device: where modules compute.
        released: class of a parameter that is not here.
        tiers: where the buffers live.
    """

    def __init__(
        self,
        spec: GroupSpec,
        *,
        axes: GroupAxes,
        divided: bool,
        device: torch.device,
        released: type[ShardedParameter],
        tiers: GroupTiers = ON_DEVICE,
    ) -> None:
        self.name = spec.name
        self.entries = spec.entries
        self.dtypes = spec.dtypes
        self.trainable = spec.trainable
        self.is_counted = spec.sharing.is_counted
        self.is_repeated = spec.sharing.is_repeated
        self.axes = axes
        self.device = device
        self.layout = FlatLayout.plan(
            [(entry.name, tuple(entry.parameter.shape)) for entry in spec.entries],
            dtype=spec.dtypes.compute,
            parts=axes.gather.size,
            replicas=axes.replica.size,
        )
        self.streams = tiers.streams and spec.trainable
        self.divided = divided and axes.gather.size > 1
        same_dtype = spec.dtypes.master == spec.dtypes.compute
        on_device = tiers.parameters is None
        # One part in one dtype is the whole: there is nothing to release and nothing to copy.
        alone = axes.gather.size == 1 and same_dtype
        self.resident = on_device and (alone or not divided)
        self.whole = on_device and alone and not self.streams
        self.version = 0
        self.full: Tensor | None = None
        self.grad: Tensor | None = None
        self._released = released
        self._placeholders: list[Tensor] = []
        self._master_before_parking: Tensor | None = None
        self._original_dtypes = [entry.parameter.dtype for entry in spec.entries]
        self.slot_pieces: tuple[SlotPiece, ...] = self.layout.pieces(axes.gather.rank)
        self.interval = self.layout.interval(axes.gather.rank)
        self._shares_memory = self.resident and same_dtype
        self._same_dtype = same_dtype
        self._cells: list[StoreCell] = []
        self.sources: tuple[Cell, ...] = ()
        if self.resident:
            self.full = self._zeros(self.layout.padded_numel, spec.dtypes.compute)
        self._place(tiers)
        self.pieces: tuple[nn.Parameter, ...] = ()

    def _place(self, tiers: GroupTiers) -> None:
        """Make the buffers on their tiers."""
        numel, compute = self.layout.part_numel, self.dtypes.compute
        if tiers.parameters is not None:
            parts = [self.axes.gather.rank] if self.divided else range(self.axes.gather.size)
            self.sources = tuple(
                self._stored(tiers.parameters, f"parameters.{part}", numel, compute)
                for part in parts
            )
        self.master_cell = self._make_master(tiers)
        self._master = self.master_cell.view()
        apart = tiers.optimizer is not None and not self._same_dtype
        if apart and not self.resident and not self.sources:
            # The master is out of reach of a gather, which reads this copy in its place.
            self.sources = (TensorCell(self._zeros(numel, compute)),)
        self._working: Cell | None = None
        if not self._same_dtype and self.sources:
            self._working = self.own_source
        elif not self._same_dtype and self.full is not None:
            self._working = TensorCell(self.part_of(self.full))
        self._spare_gradient: Cell | None = None
        self.gradient_cell: Cell | None = (
            self._stored(tiers.gradients, "gradients", numel, self.dtypes.accumulate)
            if tiers.gradients is not None and self.trainable
            else None
        )

    def _make_master(self, tiers: GroupTiers) -> Cell:
        numel = self.layout.part_numel
        if self._shares_memory and self.full is not None:
            return TensorCell(self.part_of(self.full))
        if self._same_dtype and self.sources:
            return self.own_source
        if tiers.optimizer is not None and not self._same_dtype:
            return self._stored(tiers.optimizer, "master", numel, self.dtypes.master)
        return TensorCell(self._zeros(numel, self.dtypes.master))

    def _stored(self, store: Store, kind: str, numel: int, dtype: torch.dtype) -> StoreCell:
        cell = StoreCell(store, f"{self.name}/{kind}", numel, dtype)
        self._cells.append(cell)
        return cell

    @property
    def own_source(self) -> Cell:
        """The source of this rank's own part."""
        return self.sources[0 if self.divided else self.axes.gather.rank]

    @property
    def working_cell(self) -> Cell | None:
        """This rank's part in the dtype that computes, where updates must be copied to it.

        None where the master is what computes, or what a gather casts from.
        """
        return self._working

    @property
    def master(self) -> Tensor:
        """This rank's part in the dtype that the optimizer updates.

        Raises:
            EngineError: it is not in memory; see `in_memory`.
        """
        if self._master is None:
            raise EngineError(f"The master of {self.name} is not in memory.")
        return self._master

    @property
    def master_is_here(self) -> bool:
        """Whether `master` can be read."""
        return self._master is not None

    @contextmanager
    def in_memory(self, *, modify: bool = False) -> Iterator[None]:
        """`master`, the pieces and, where this rank keeps all of it, `full` can be read inside.

        Args:
            modify: keep what is written to `master`, or to `full` where this rank keeps all of it.
        """
        keeps_whole = bool(self.sources) and not self.divided
        was_open, had_master = self.full, self._master
        memory = _memory_of(self.device)
        if keeps_whole and self.full is None:
            full = scratch(self.layout.padded_numel, self.dtypes.compute, memory)
            for ticket in self.fetch_into(full):
                ticket.wait()
            self.full = full
        if self._master is None:
            self._master = scratch(self.layout.part_numel, self.dtypes.master, memory)
            self.master_cell.fetch(self._master).wait()
            self.point_pieces()
        try:
            yield
            if modify:
                self._write_back(keeps_whole=keeps_whole)
        finally:
            self.full, self._master = was_open, had_master
            if had_master is None:
                self.point_pieces()

    def _write_back(self, *, keeps_whole: bool) -> None:
        """Bring what is not in memory up to date with what was changed there."""
        if self.master_cell.view() is None:
            self.master_cell.commit(self.master).wait()
        if keeps_whole and self.full is not None:
            self.part_of(self.full).copy_(self.master)
            for part, source in enumerate(self.sources):
                first, last = self.layout.interval(part)
                source.commit(self.full[first:last]).wait()
        elif self.working_cell is not None and self.streams:
            self.working_cell.commit(self.master.to(self.dtypes.compute)).wait()

    def fetch_into(self, full: Tensor) -> list[Ticket]:
        """Start to bring what this rank keeps into a full flat buffer: its part, or everything."""
        if not self.sources:
            self.part_of(full).copy_(self.master)
            return []
        if self.divided:
            return [self.own_source.fetch(self.part_of(full))]
        tickets = []
        for part, source in enumerate(self.sources):
            first, last = self.layout.interval(part)
            tickets.append(source.fetch(full[first:last]))
        return tickets

    def shadow(self) -> list[ShadowedCell]:
        """Give what an update writes a second buffer each, for updates that may be refused."""
        master = ShadowedCell(self.master_cell, self._twin(self.master_cell))
        shadowed = {id(self.master_cell): master}
        if self.working_cell is not None:
            working = ShadowedCell(self.working_cell, self._twin(self.working_cell))
            shadowed[id(self.working_cell)] = working
            self._working = working
        self.master_cell = master
        self.sources = tuple(shadowed.get(id(cell), cell) for cell in self.sources)
        return list(shadowed.values())

    def _twin(self, cell: Cell) -> Cell:
        twin = twin_of(cell)
        if isinstance(twin, StoreCell):
            self._cells.append(twin)
        return twin

    def hand_over_gradient(self) -> None:
        """The gradient now belongs to an update under way: the next one gets another buffer."""
        if self.gradient_cell is None:
            self.grad = None
            return
        if self._spare_gradient is None:
            self._spare_gradient = self._twin(self.gradient_cell)
        self.gradient_cell, self._spare_gradient = self._spare_gradient, self.gradient_cell

    @property
    def tensor_cells(self) -> list[TensorCell]:
        """Cells that are tensors of the group's own."""
        cells = [self.master_cell, *self.sources, self._working]
        bare = [
            each
            for cell in cells
            for each in ((cell.primary, cell.shadow) if isinstance(cell, ShadowedCell) else (cell,))
        ]
        return [cell for cell in bare if isinstance(cell, TensorCell)]

    def look_again(self) -> None:
        """After an update was accepted: masters may be in the other buffer."""
        self._master = self.master_cell.view()
        self.point_pieces()

    def free(self) -> None:
        """Give the buffers in stores back."""
        for cell in self._cells:
            cell.free()
        self._cells.clear()

    @property
    def travels(self) -> bool:
        """Whether gradients go to other ranks or change dtype on their way to the optimizer."""
        return not (self.whole and self.axes.replica.size == 1)

    @property
    def is_sharded(self) -> bool:
        """Whether the values are away, on other ranks or another tier, while nothing computes."""
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
        if not all(entry.parameter.is_meta for entry in self.entries):
            with self.in_memory(modify=True):
                self._adopt_values()
        self._repoint()
        self.pieces = self._make_pieces()

    def _adopt_values(self) -> None:
        if self.full is not None:
            for slot, entry in zip(self.layout.slots, self.entries, strict=True):
                if not entry.parameter.is_meta:
                    self.slot_view(self.full, slot).copy_(entry.parameter.detach())
        if not self._shares_memory:
            # From the parameters, not from `full`: they may be more precise than its dtype.
            self._adopt_part()

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
        return tuple(nn.Parameter(self._piece_values(piece)) for piece in self.slot_pieces)

    def _piece_values(self, piece: SlotPiece) -> Tensor:
        whole = self.axes.gather.size == 1
        shape = self.layout.slots[piece.index].shape if whole else (piece.numel,)
        if self._master is not None:
            return self.master_values(piece).view(shape)
        return placeholder_of(shape, dtype=self.dtypes.master, device=_memory_of(self.device))

    def point_pieces(self) -> None:
        """Let the pieces look into the master where it is now, or at nothing."""
        if self.pieces and not self.whole:
            for piece, slot_piece in zip(self.pieces, self.slot_pieces, strict=True):
                piece.data = self._piece_values(slot_piece)

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

    def device_buffers(self) -> list[Tensor]:
        """The memory of its own that the group keeps on the device; gathered values left out."""
        views = [self.full if self.resident else None]
        views += [cell.view() for cell in self.tensor_cells]
        found: dict[int, Tensor] = {}
        for view in views:
            if view is not None and view.numel():
                found.setdefault(view.untyped_storage().data_ptr(), view)
        return list(found.values())

    def park(self) -> None:
        """Let nobody read what has been taken away."""
        if self.resident:
            self._hide()
        self._master_before_parking, self._master = self._master, None
        self.point_pieces()

    def unpark(self) -> None:
        """The buffers are back."""
        self._master = self._master_before_parking
        self._publish()
        self.point_pieces()

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


def _memory_of(device: torch.device) -> torch.device:
    """Where what comes from a store is put for the optimizer: always the host."""
    return torch.device("cpu") if device.type == "cuda" else device


def _moved(name: str, what: str) -> str:
    return (
        f"{name} {what} after hf_speed took the model over, so its training would silently stop. "
        f"Change the model before it is prepared, or inside "
        f"`with hf_speed.gathered(model, modify=True):`, or call engine.detach() first and "
        f"prepare it again."
    )
