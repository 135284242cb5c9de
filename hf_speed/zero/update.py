"""Who computes the new values of a chunk: our one-pass kernels, or the user's optimizer itself.

Both see a chunk of this rank's part as flat tensors and know which piece of which parameter each
element belongs to. The optimizer object stays the user's: hyperparameters are read from its
param_groups and counters kept in its state, where schedulers and loggers look for them.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.optim.rules import Chunk, Span, StateSpec, UpdateRule
from hf_speed.zero.group import FlatGroup

_STEP = "step"


class Part(NamedTuple):
    """A chunk of a group's part in memory.

    Attributes:
        group: whose part.
        start: first element, from the start of the part.
        values: "master", "gradient", maybe "working", and the optimizer's states by name.
        scale: factor on the gradient.
    """

    group: FlatGroup
    start: int
    values: Mapping[str, Tensor]
    scale: float


class Overlap(NamedTuple):
    """What a chunk holds of a piece: [first, last) of the chunk."""

    piece: nn.Parameter
    first: int
    last: int


class Updater(Protocol):
    """Turns gradients into new values, chunk by chunk."""

    def states(self, group: FlatGroup) -> tuple[StateSpec, ...] | None:
        """The states that it keeps for a group, or None: they show once it has taken a step."""
        ...

    def begin(self, pieces: Sequence[nn.Parameter]) -> None:
        """Start a step of these pieces: read their hyperparameters and counters."""
        ...

    def update(self, part: Part) -> Mapping[str, Tensor]:
        """Compute new values in place; returns states that it has made, of the chunk's size."""
        ...

    def end(self) -> None:
        """Finish the step: counters move on."""
        ...


def overlaps(group: FlatGroup, start: int, numel: int) -> Iterator[Overlap]:
    """The pieces of which [start, start + numel) of the part holds something, in order."""
    for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
        first = max(slot_piece.part_start, start)
        last = min(slot_piece.part_start + slot_piece.numel, start + numel)
        if first < last:
            yield Overlap(piece, first - start, last - start)


def settings_of(
    optimizer: Optimizer, pieces: Sequence[nn.Parameter]
) -> dict[nn.Parameter, dict[str, Any]]:
    """Piece -> a copy of the hyperparameters that it has now; one dict for each param_group."""
    wanted = set(pieces)
    found = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        found.update({piece: settings for piece in group["params"] if piece in wanted})
    return found


class FusedUpdate:
    """Updates by a rule of hf_speed.optim: one pass over memory.

    Args:
        optimizer: the user's; supplies hyperparameters, keeps counters.
        rule: what its class computes.
        moments: dtype that moments are kept in.
    """

    def __init__(self, optimizer: Optimizer, rule: UpdateRule, moments: torch.dtype) -> None:
        self._optimizer = optimizer
        self._specs = rule.states(moments)
        self._rule = rule
        self._settings: dict[nn.Parameter, dict[str, Any]] = {}
        self._stepped: dict[nn.Parameter, int] = {}

    def states(self, group: FlatGroup) -> tuple[StateSpec, ...]:  # noqa: ARG002
        """What the rule keeps."""
        return self._specs

    def begin(self, pieces: Sequence[nn.Parameter]) -> None:
        """Read hyperparameters; the pieces are at their next step."""
        self._settings = settings_of(self._optimizer, pieces)
        self._stepped = {
            piece: _steps_taken(self._optimizer.state.get(piece)) + 1 for piece in self._settings
        }

    def signature(self) -> tuple[Any, ...]:
        """What the update of each piece depends on besides the gradient, to be compared."""
        return tuple(
            (id(piece), step, repr(self._settings[piece])) for piece, step in self._stepped.items()
        )

    def update(self, part: Part) -> Mapping[str, Tensor]:
        """One native call."""
        values = part.values
        master = values["master"]
        group = part.group
        # Ranks round differently: what one rank holds is another stretch of the same parameters.
        place = f"{group.name}:{group.interval[0]}"
        step = max(self._stepped.values(), default=0)
        self._rule.apply(
            Chunk(
                master=master,
                grad=values["gradient"],
                states={spec.name: values[spec.name] for spec in self._specs},
                out=values.get("working"),
                spans=self._spans(group, part.start, master.numel()),
                grad_scale=part.scale,
                seed=zlib.crc32(f"{place}:{step}".encode()),
                offset=part.start,
            )
        )
        return {}

    def _spans(self, group: FlatGroup, start: int, numel: int) -> list[Span]:
        spans: list[Span] = []
        for piece, _, last in overlaps(group, start, numel):
            step = self._stepped.get(piece)
            span = Span(last, None, 0) if step is None else Span(last, self._settings[piece], step)
            # Padding between pieces is zeros, which every rule leaves zeros: it joins either side.
            if spans and spans[-1].settings is span.settings and spans[-1].step == span.step:
                spans.pop()
            spans.append(span)
        if not spans:
            return [Span(numel, None, 0)]
        return [*spans[:-1], spans[-1]._replace(stop=numel)]

    def end(self) -> None:
        """Counters as torch keeps them."""
        for piece, step in self._stepped.items():
            self._optimizer.state[piece][_STEP] = torch.tensor(float(step))
        self._stepped = {}


class TorchUpdate:
    """Updates by the user's own optimizer, any that treats each element on its own.

    Its step runs on parameters that exist for one chunk, with that chunk's states.

    Args:
        optimizer: the user's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Without the hooks, of which one has led here.
        step = type(optimizer).step
        self._step = getattr(step, "__wrapped__", step)
        self._group_of: dict[nn.Parameter, int] = {}
        self._before: dict[nn.Parameter, dict[str, Any] | None] = {}
        self._after: dict[nn.Parameter, dict[str, Any]] = {}

    def states(self, group: FlatGroup) -> None:  # noqa: ARG002
        """Known once it has stepped."""
        return

    def begin(self, pieces: Sequence[nn.Parameter]) -> None:
        """Every chunk of a piece starts from the counters that the piece has now."""
        wanted = set(pieces)
        self._group_of = {
            piece: index
            for index, group in enumerate(self._optimizer.param_groups)
            for piece in group["params"]
            if piece in wanted
        }
        self._before = {
            piece: _scalars(self._optimizer.state.get(piece)) for piece in self._group_of
        }
        self._after = {}

    def update(self, part: Part) -> Mapping[str, Tensor]:
        """One step of the optimizer over parameters that are views of the chunk."""
        master = part.values["master"]
        parameters: dict[nn.Parameter, Overlap] = {}
        members: dict[int, list[nn.Parameter]] = {}
        for overlap in overlaps(part.group, part.start, master.numel()):
            if overlap.piece in self._before:
                parameter = self._stand_in(part, overlap)
                parameters[parameter] = overlap
                members.setdefault(self._group_of[overlap.piece], []).append(parameter)
        made = self._step_over(part, parameters, members)
        working = part.values.get("working")
        if working is not None:
            working.copy_(master)
        return made

    def _stand_in(self, part: Part, overlap: Overlap) -> nn.Parameter:
        """A parameter for one step: the chunk's share of a piece, with its gradient and states."""
        here = slice(overlap.first, overlap.last)
        parameter = nn.Parameter(part.values["master"][here])
        gradient = part.values["gradient"][here].to(parameter.dtype, copy=True)
        parameter.grad = gradient if part.scale == 1.0 else gradient.mul_(part.scale)
        scalars = self._before[overlap.piece]
        if scalars is not None:
            kinds = part.values.keys() - {"master", "gradient", "working"}
            states = {kind: part.values[kind][here] for kind in kinds}
            self._optimizer.state[parameter] = {**_copied(scalars), **states}
        return parameter

    def _step_over(
        self,
        part: Part,
        parameters: Mapping[nn.Parameter, Overlap],
        members: Mapping[int, list[nn.Parameter]],
    ) -> dict[str, Tensor]:
        optimizer, master = self._optimizer, part.values["master"]
        originals = [group["params"] for group in optimizer.param_groups]
        made: dict[str, Tensor] = {}
        try:
            for index, group in enumerate(optimizer.param_groups):
                group["params"] = members.get(index, [])
            self._step(optimizer)
        finally:
            for group, params in zip(optimizer.param_groups, originals, strict=True):
                group["params"] = params
            for parameter, (piece, first, last) in parameters.items():
                state = optimizer.state.pop(parameter, {})
                self._after[piece] = _scalars(state) or {}
                for kind, value in _tensors(state, parameter.numel()).items():
                    whole = part.values.get(kind)
                    if whole is None:
                        whole = made.setdefault(kind, torch.zeros_like(master, dtype=value.dtype))
                    if whole[first:last].data_ptr() != value.data_ptr():
                        whole[first:last].copy_(value)
        return made

    def end(self) -> None:
        """Counters move on once all chunks have."""
        for piece, scalars in self._after.items():
            self._optimizer.state[piece].update(scalars)
        self._before, self._after = {}, {}


def _tensors(state: Mapping[str, Any], numel: int) -> dict[str, Tensor]:
    """The states that have an element for each of the parameter's."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel
    }


def _steps_taken(state: Mapping[str, Any] | None) -> int:
    """Torch's SGD counts no steps: with a momentum, there has been one at least."""
    return int(state.get(_STEP, 1)) if state else 0


def _scalars(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Counters and their like; None where there is no state yet."""
    if not state:
        return None
    return {k: v for k, v in state.items() if not (isinstance(v, Tensor) and v.dim() > 0)}


def _copied(scalars: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in scalars.items()}
