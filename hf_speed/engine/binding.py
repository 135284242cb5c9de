"""The user's optimizer while an engine serves it."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.whole import Wholes
from hf_speed.errors import EngineError
from hf_speed.zero.elementwise import require_elementwise
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.states import tensor_states, whole_tensor
from hf_speed.zero.step import repoint


class OptimizerBinding:
    """Re-points an optimizer's param_groups at this rank's pieces, and back.

    Raises:
        ConfigError: the optimizer needs whole tensors and parameters are divided.
        EngineError: it holds none of the model's parameters.
    """

    def __init__(self, optimizer: Optimizer, parts: Parts) -> None:
        self.optimizer = optimizer
        self._parts = parts
        self._wholes = Wholes(parts.catalogue, parts.mesh)
        self._original = [list(group["params"]) for group in optimizer.param_groups]
        entries = {id(e.parameter) for group in parts.groups for e in group.entries}
        entries |= {id(parameter) for parameter in parts.division.removed.values()}
        if not any(id(each) in entries for params in self._original for each in params):
            raise EngineError(
                f"This {type(optimizer).__name__} holds no parameter of the prepared model, so its "
                f"steps would change nothing. Make it from model.parameters() of the same model."
            )
        streams = any(group.streams for group in parts.groups)
        if streams or any(group.axes.gather.size > 1 for group in parts.groups):
            require_elementwise(optimizer, stage=parts.config.stage)
        pieces = _pieces_by_parameter(parts)
        repoint(optimizer, pieces, {each: parts.whole_shape(each) for each in pieces})
        self._updates = parts.tiers.updates_for(optimizer, parts.groups) if streams else None
        parts.stepper.watch(optimizer, self._updates)

    def release(self) -> None:
        """Give the optimizer its whole parameters and whole states back. Collective."""
        self._restore_states()
        self._parts.stepper.unwatch()
        if self._updates is not None:
            self._updates.close()
        for group, params in zip(self.optimizer.param_groups, self._original, strict=True):
            group["params"][:] = params

    def _restore_states(self) -> None:
        """Turn the states of pieces into states of whole parameters, kind by kind."""
        kinds = self._kinds()
        division = self._parts.division
        places = {
            slot.name: (group, index)
            for group in self._parts.groups
            for index, slot in enumerate(group.layout.slots)
        }
        for name, record in self._parts.catalogue.records.items():
            group, index = places.get(name, (None, 0))
            if not record.trainable or (
                not division.is_divided and group is not None and group.whole
            ):
                continue
            parameter = division.removed[name] if group is None else group.entries[index].parameter
            states = {kind: self._whole_state(name, kind, group, index) for kind in kinds}
            whole = {kind: value for kind, value in states.items() if value is not None}
            scalars = self._scalars(None if group is None else _piece_of(group, index))
            if whole or scalars:
                self.optimizer.state[parameter] = {**scalars, **whole}
        for group in self._parts.groups:
            for piece in () if group.whole else group.pieces:
                self.optimizer.state.pop(piece, None)

    def _whole_state(
        self, name: str, kind: str, group: FlatGroup | None, index: int
    ) -> Tensor | None:
        """One state of one whole parameter. Collective."""
        local, dtype = None, self._parts.catalogue.record(name).dtype
        if group is not None:
            with self._parts.stepper.exposed(group):
                local = whole_tensor(
                    group,
                    group.layout.slots[index],
                    lambda piece: tensor_states(self.optimizer, piece).get(kind),
                    dtype=group.dtypes.master,
                    journal=self._parts.mesh.journal,
                )
            dtype = local.dtype
        return self._wholes.assemble(name, local, dtype=dtype)

    def _kinds(self) -> list[str]:
        """Kinds of tensor state that any rank keeps, in an order that all ranks share."""
        mine = {
            kind
            for group in self._parts.groups
            for piece in group.pieces
            for kind in tensor_states(self.optimizer, piece)
        }
        return sorted(_union(mine, self._parts))

    def _scalars(self, piece: nn.Parameter | None) -> dict[str, object]:
        """Counters of a piece; a rank without one takes them from another of its pieces."""
        candidates = [piece] if piece is not None else []
        candidates += [each for group in self._parts.groups for each in group.pieces]
        for each in candidates:
            state = self.optimizer.state.get(each, {})
            scalars = {k: v for k, v in state.items() if not (isinstance(v, Tensor) and v.dim())}
            if scalars:
                return {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}
        return {}


def _union(mine: set[str], parts: Parts) -> set[str]:
    world = parts.mesh.world
    if world.is_identity:
        return mine
    everyone: list[set[str]] = [set() for _ in range(world.size)]
    torch.distributed.all_gather_object(everyone, mine, group=world.group)
    return set().union(*everyone)


def _piece_of(group: FlatGroup, index: int) -> nn.Parameter | None:
    """This rank's piece of a parameter, if it has one."""
    slots = group.piece_slots()
    return next((p for p, s in zip(group.pieces, slots, strict=True) if s.index == index), None)


def _pieces_by_parameter(parts: Parts) -> dict[nn.Parameter, list]:
    """Parameter -> [(piece, function that cuts its part out of a whole tensor)] on this rank."""
    found: dict[nn.Parameter, list] = {
        entry.parameter: [] for group in parts.groups if group.trainable for entry in group.entries
    }
    # Of other pipeline ranks: they leave this rank's optimizer.
    found |= {parameter: [] for parameter in parts.division.removed.values()}
    for group in parts.groups:
        for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
            entry = group.entries[slot_piece.index]
            cut = partial(
                _cut,
                name=entry.name,
                catalogue=parts.catalogue,
                start=slot_piece.start,
                numel=slot_piece.numel,
                shape=tuple(piece.shape),
            )
            found[entry.parameter].append((piece, cut))
    return found


def _cut(
    whole: Tensor,
    *,
    name: str,
    catalogue: Catalogue,
    start: int,
    numel: int,
    shape: tuple[int, ...],
) -> Tensor:
    slicing = catalogue.record(name).slicing
    local = whole if slicing is None else slicing.cut(whole, catalogue.tp_rank)
    return local.reshape(-1)[start : start + numel].view(shape)
