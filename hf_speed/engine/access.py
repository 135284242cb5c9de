"""Whole parameters, gradients and optimizer states by name, of an engine whose parts are spread.

Everything here is collective: every rank calls it with the same names in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import ParameterRecord
from hf_speed.engine.division import SliceReader
from hf_speed.engine.whole import Wholes
from hf_speed.errors import EngineError
from hf_speed.mesh.collectives import all_gather_flat, broadcast_flat
from hf_speed.shard.layout import Slot
from hf_speed.zero.gather import Unit
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.states import set_parts, whole_tensor


class Location(NamedTuple):
    """Where a parameter stands."""

    unit: Unit
    group: FlatGroup
    slot: Slot


class Access:
    """Reads and writes whole tensors of an engine's model by name."""

    def __init__(self, parts: Parts, model: nn.Module) -> None:
        self._parts = parts
        self._model = model
        self._locations = {
            slot.name: Location(unit, group, slot)
            for unit in parts.units
            for group in unit.groups
            for slot in group.layout.slots
        }
        self._catalogue = parts.catalogue
        self._wholes = Wholes(parts.catalogue, parts.mesh)

    @property
    def names(self) -> list[str]:
        """Every parameter of the whole model once, in the order of `model.named_parameters()`."""
        return list(self._catalogue.records)

    def record(self, name: str) -> ParameterRecord:
        """What is known of a parameter, by any of its names.

        Raises:
            EngineError: the model has no such parameter; names the nearest.
        """
        try:
            return self._catalogue.record(name)
        except KeyError:
            near = get_close_matches(name, self._catalogue.aliases, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise EngineError(
                f"{type(self._model).__name__} has no parameter {name!r}.{hint}"
            ) from None

    def locate(self, name: str) -> Location | None:
        """Find a parameter by any of its names; None where another pipeline rank has it.

        Raises:
            EngineError: the model has no such parameter; names the nearest.
        """
        return self._locations.get(self.record(name).name)

    @contextmanager
    def gathered(self, names: Sequence[str] | None, *, modify: bool) -> Iterator[None]:
        """Hold the units of the named parameters; see Engine.gathered."""
        wanted = self.names if names is None else list(names)
        located = [place for name in wanted if (place := self.locate(name)) is not None]
        units = list(dict.fromkeys(place.unit for place in located))
        gatherer = self._parts.gatherer
        gatherer.hold(units)
        groups = [group for unit in units for group in unit.groups]
        before = [self._snapshot(group) for group in groups] if modify else []
        try:
            yield
            if modify:
                for group, old in zip(groups, before, strict=True):
                    self._keep_changes(group, old)
        finally:
            gatherer.let_go(units)

    def _snapshot(self, group: FlatGroup) -> Tensor | None:
        """This rank's part as it was, where the masters hold more than the working values show."""
        if group.full is None or group.dtypes.master == group.dtypes.compute:
            return None
        return group.part_of(group.full).clone()

    def _keep_changes(self, group: FlatGroup, old: Tensor | None) -> None:
        if group.full is None:
            return
        mesh = self._parts.mesh
        ranks = [mesh.axis("dp_replicate", "dp_shard")]
        if group.is_repeated:
            ranks.append(mesh.axis("tp"))
        if group.axes.num_sharers > 1:
            # Copies of a tied weight, or of heads that several slices have.
            ranks.append(group.axes.replica)
        for each in ranks:
            broadcast_flat(group.full.view(torch.uint8), group=each, journal=mesh.journal)
        new = group.part_of(group.full)
        with group.in_memory(modify=True):
            if old is None:
                if new.data_ptr() != group.master.data_ptr():
                    group.master.copy_(new)
                return
            changed = new != old
            values = new[changed].to(device=group.master.device, dtype=group.master.dtype)
            group.master[changed.to(group.master.device)] = values

    def full_parameters(
        self, names: Sequence[str] | None, *, master: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one flat group in memory at a time; see Engine.full_parameters."""
        wanted = self.names if names is None else list(names)
        locations = [(name, self.locate(name)) for name in wanted]
        held: FlatGroup | None = None
        full: Tensor | None = None
        for name, place in locations:
            local = None
            if place is not None:
                if place.group is not held or full is None:
                    full = self._full_values(place.group, master=master)
                    held = place.group
                local = place.group.slot_view(full, place.slot)
            dtype = self._dtype_of(name, local, master=master)
            yield name, self._wholes.assemble(name, local, dtype=dtype)

    def _dtype_of(self, name: str, local: Tensor | None, *, master: bool) -> torch.dtype:
        """Of whole values; where others hold them, as their precision says."""
        if local is not None:
            return local.dtype
        dtypes = self._parts.dtypes_of(name)
        return dtypes.master if master else dtypes.compute

    def _full_values(self, group: FlatGroup, *, master: bool) -> Tensor:
        if group.full is not None and not (master and group.dtypes.master != group.dtypes.compute):
            return group.full
        apart = master and group.dtypes.master != group.dtypes.compute
        dtype = group.dtypes.master if apart else group.dtypes.compute
        full = torch.empty(group.layout.padded_numel, dtype=dtype, device=group.device)
        if apart:
            with group.in_memory():
                group.part_of(full).copy_(group.master)
        else:
            for ticket in group.fetch_into(full):
                ticket.wait()
            if group.sources and not group.divided:
                return full
        return all_gather_flat(
            full, group=group.axes.gather, journal=self._parts.mesh.journal
        ).wait()

    def parameter(self, name: str) -> Tensor:
        """A copy of one whole parameter, in master precision."""
        ((_, value),) = self.full_parameters([name], master=True)
        return value.clone()

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Overwrite one parameter, masters included."""
        local = self._local(name, value)
        place = self.locate(name)
        if place is not None and local is not None:
            with place.group.in_memory(modify=True):
                place.group.store(place.slot, local)

    def _local(self, name: str, whole: Tensor) -> Tensor | None:
        """What this rank holds of a whole tensor.

        Raises:
            EngineError: it is of another shape than the parameter.
        """
        record = self.record(name)
        if tuple(whole.shape) != record.shape:
            raise EngineError(
                f"{name} has shape {record.shape}, but the new value has {tuple(whole.shape)}."
            )
        return self._wholes.local(name, whole)

    def gradient(self, name: str) -> Tensor | None:
        """A copy of one whole gradient as the optimizer will see it; None if no rank has one."""
        self._parts.stepper.make_ready()
        place = self.locate(name)
        local = None if place is None else self._local_gradient(place)
        if not self._anywhere(name, local is not None):
            return None
        return self._wholes.assemble(name, local, dtype=self._dtype_of(name, local, master=True))

    def _local_gradient(self, place: Location) -> Tensor | None:
        """What the ranks of this stage and slice have of a gradient, together."""
        group, slot = place.group, place.slot
        index = group.layout.slots.index(slot)
        if not (group.trainable and self._parts.reducer.has_gradient(group, index)):
            return None
        with self._parts.stepper.gradients.exposed(group):
            return whole_tensor(
                group,
                slot,
                lambda piece: piece.grad,
                dtype=group.dtypes.master,
                journal=self._parts.mesh.journal,
            )

    def _anywhere(self, name: str, here: bool) -> bool:  # noqa: FBT001 - a value, not a switch
        """What the owner of a parameter says, on every pipeline rank."""
        pipeline, mesh = self._parts.mesh.axis("pp"), self._parts.mesh
        flag = torch.tensor([here], dtype=torch.uint8, device=mesh.device)
        source = self.record(name).stages[0]
        return bool(broadcast_flat(flag, group=pipeline, journal=mesh.journal, source=source))

    def set_gradient(self, name: str, value: Tensor) -> None:
        """Overwrite one gradient, after the backward and before the step."""
        self._parts.stepper.make_ready()
        if not self.record(name).trainable:
            raise EngineError(
                f"{name} is frozen (requires_grad=False): no optimizer reads its gradient."
            )
        local, place = self._local(name, value), self.locate(name)
        if place is None or local is None:
            return
        _, group, slot = place
        self._parts.reducer.mark_used(group, group.layout.slots.index(slot))

        def grad_of(piece: nn.Parameter) -> Tensor:
            if piece.grad is None:
                piece.grad = torch.zeros_like(piece)
            return piece.grad

        gradients = self._parts.stepper.gradients
        gradients.settle()
        with gradients.exposed(group, modify=True):
            set_parts(group, slot, local, grad_of)

    def optimizer_state(self, name: str, key: str, optimizer: torch.optim.Optimizer) -> Tensor:
        """A copy of one whole moment of a parameter, for example key="exp_avg"."""
        place = self.locate(name)
        self._require_state(name, key, optimizer)
        local = None
        if place is not None:
            with self._parts.stepper.exposed(place.group):
                local = whole_tensor(
                    place.group,
                    place.slot,
                    lambda piece: optimizer.state[piece].get(key),
                    dtype=place.group.dtypes.master,
                    journal=self._parts.mesh.journal,
                )
        return self._wholes.assemble(name, local, dtype=self._dtype_of(name, local, master=True))

    def set_optimizer_state(
        self, name: str, key: str, value: Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        """Overwrite one whole moment of a parameter."""
        local, place = self._local(name, value), self.locate(name)
        if place is None or local is None:
            return

        def state_of(piece: nn.Parameter) -> Tensor:
            state = optimizer.state[piece]
            if key not in state:
                state[key] = torch.zeros_like(piece)
            return state[key]

        with self._parts.stepper.exposed(place.group, modify=True):
            set_parts(place.group, place.slot, local, state_of)

    def _require_state(self, name: str, key: str, optimizer: torch.optim.Optimizer) -> None:
        """Raise on every rank if the optimizer keeps no `key` for any parameter. Collective."""
        mine = {
            each
            for group in self._parts.groups
            for piece in group.pieces
            for each in optimizer.state.get(piece, {})
        }
        world = self._parts.mesh.world
        everyone = [mine] * world.size
        if not world.is_identity:
            # A stage may have nothing that is trained; it must not go on alone.
            torch.distributed.all_gather_object(everyone, mine, group=world.group)
        known = set().union(*everyone)
        if known and key not in known:
            raise EngineError(
                f"{type(optimizer).__name__} keeps no {key!r} for {name}; it keeps {sorted(known)}."
            )


def fill_group(group: FlatGroup, read: SliceReader) -> None:
    """Fill what this rank keeps of a group, which is in memory."""
    if group.full is not None and not group.divided:
        for slot in group.layout.slots:
            value = read(slot.name, 0, slot.numel)
            if value is not None:
                group.store(slot, value)
        return
    for piece in group.slot_pieces:
        value = read(group.layout.slots[piece.index].name, piece.start, piece.numel)
        if value is not None:
            group.master_values(piece).copy_(value)
