"""The user's optimizer while an engine serves it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import Catalogue
from hf_speed.engine.whole import Wholes
from hf_speed.errors import EngineError
from hf_speed.zero.elementwise import require_elementwise
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.states import holdings, tensor_states, whole_tensor
from hf_speed.zero.step import repoint


class OptimizerBinding:
    """Re-points an optimizer's param_groups at this rank's pieces, and back.

    Args:
        optimizer: the user's.
        parts: of the engine.
        before_step: called before anything else of every step.

    Raises:
        ConfigError: the optimizer needs whole tensors and parameters are divided.
        EngineError: it holds none of the model's parameters.
    """

    def __init__(
        self, optimizer: Optimizer, parts: Parts, *, before_step: Callable[[], None]
    ) -> None:
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
        num_slices = parts.mesh.sizes["tp"]
        if streams or num_slices > 1 or any(g.axes.gather.size > 1 for g in parts.groups):
            require_elementwise(optimizer, stage=parts.config.stage, num_slices=num_slices)
        pieces = _pieces_by_parameter(parts)
        repoint(optimizer, pieces, {each: parts.whole_shape(each) for each in pieces})
        self._updates = parts.tiers.updates_for(optimizer, parts.groups) if streams else None
        # Before the stepper's: what raises here leaves the step undone.
        self._check = optimizer.register_step_pre_hook(lambda *_: before_step())
        parts.stepper.watch(optimizer, self._updates)

    def release(self) -> None:
        """Give the optimizer its whole parameters and whole states back. Collective."""
        self._restore_states()
        self._check.remove()
        self._parts.stepper.unwatch()
        if self._updates is not None:
            self._updates.close()
        for group, params in zip(self.optimizer.param_groups, self._original, strict=True):
            group["params"][:] = params

    def _restore_states(self) -> None:
        """Turn the states of pieces into states of whole parameters, kind by kind. Collective."""
        kept = self._kept()
        division = self._parts.division
        places = {
            slot.name: (group, index)
            for group in self._parts.groups
            for index, slot in enumerate(group.layout.slots)
        }
        for name in self._parts.catalogue.records:
            group, index = places.get(name, (None, 0))
            if name not in kept or (not division.is_divided and group is not None and group.whole):
                continue
            parameter = division.removed[name] if group is None else group.entries[index].parameter
            whole = {kind: self._whole_state(name, kind, group, index) for kind in kept[name].kinds}
            self.optimizer.state[parameter] = {**self._counters(kept[name]), **whole}
        for group in self._parts.groups:
            for piece in () if group.whole else group.pieces:
                self.optimizer.state.pop(piece, None)

    def _whole_state(self, name: str, kind: str, group: FlatGroup | None, index: int) -> Tensor:
        """One state of one whole parameter. Collective."""
        local = None
        if group is not None:
            with self._parts.stepper.exposed(group):
                local = whole_tensor(
                    group,
                    group.layout.slots[index],
                    lambda piece: tensor_states(self.optimizer, piece).get(kind),
                    dtype=group.dtypes.master,
                    journal=self._parts.mesh.journal,
                )
        return self._wholes.assemble(name, local, dtype=self._parts.dtypes_of(name).master)

    def _kept(self) -> "dict[str, _Kept]":
        """What any rank's optimizer keeps of each parameter, alike on all ranks. Collective."""
        mine: dict[str, _Kept] = {}
        for holding in holdings(self._parts.groups):
            state = self.optimizer.state.get(holding.piece, {})
            kinds = sorted(tensor_states(self.optimizer, holding.piece))
            counters = {
                key: _Counter.of(value)
                for key, value in state.items()
                if not (isinstance(value, Tensor) and value.dim())
            }
            if kinds or counters:
                mine[holding.slot.name] = _Kept(tuple(kinds), counters)
        world = self._parts.mesh.world
        everyone = [mine] * world.size
        if not world.is_identity:
            torch.distributed.all_gather_object(everyone, mine, group=world.group)
        # Of a parameter with pieces on several ranks the first one's count.
        return {name: each for kept in everyone[::-1] for name, each in kept.items()}

    def _counters(self, kept: "_Kept") -> dict[str, object]:
        device = self._parts.mesh.device
        return {key: counter.there(device) for key, counter in kept.counters.items()}


class _Counter(NamedTuple):
    """A state of no size, like Adam's `step`; tensors travel on the CPU."""

    value: object
    on_device: bool

    @classmethod
    def of(cls, value: object) -> "_Counter":
        if not isinstance(value, Tensor):
            return cls(value, on_device=False)
        return cls(value.detach().cpu().clone(), on_device=value.device.type != "cpu")

    def there(self, device: torch.device) -> object:
        """The value on a rank whose modules compute on `device`."""
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value.to(device) if self.on_device else self.value.clone()


class _Kept(NamedTuple):
    """What an optimizer keeps of a parameter: names of tensors of its size, and counters."""

    kinds: tuple[str, ...]
    counters: dict[str, _Counter]


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
