"""An optimizer's part of a checkpoint: states and counters of its pieces, settings of its groups.

Saved under its class's name, and read by the same class, or by one to which the states mean the
same (`optim/families.py`): then one list says what was kept, what begins anew and what was dropped.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.checkpoint.manifest import Scalar
from hf_speed.checkpoint.reader import StateReader
from hf_speed.engine.assemble import Parts
from hf_speed.engine.catalogue import ParameterRecord
from hf_speed.engine.saved_run import (
    OPTIMIZER,
    PARAM_GROUPS,
    SavedRun,
    check_hyperparameter,
    counter,
)
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.optim.families import (
    STEP,
    OptimizerChange,
    counts_in_integers,
    counts_in_tensors,
    is_of_parameter_shape,
    mu_product,
    plan_change,
)
from hf_speed.zero.states import Holding, holdings, scalar_states

MASTER = "master"
"""The kind of stored tensor that is not the optimizer's."""

_log = get_logger(__name__)


# ---- out ----


def optimizer_meta(optimizer: Optimizer | None) -> dict[str, Any]:
    """What a manifest says of the optimizer as a whole. JSON."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        OPTIMIZER: None if optimizer is None else type(optimizer).__name__,
        PARAM_GROUPS: [
            {
                key: _plain(each)
                for key, each in group.items()
                if key != "params" and _is_plain(each)
            }
            for group in groups
        ],
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


def optimizer_tensors(
    optimizer: Optimizer, holding: Holding, *, sliced: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the optimizer keeps of a piece: of its shape, or of shapes of their own.

    Args:
        optimizer: bound.
        holding: the piece.
        sliced: whether this rank has a slice of the parameter.

    Raises:
        CheckpointError: one of another shape, of a parameter of which this rank holds a part only:
            it could not be put together again.
    """
    piece = holding.piece
    for key, value in sorted(optimizer.state.get(piece, {}).items()):
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != piece.shape and (sliced or not holding.group.whole):
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for "
                f"{holding.slot.name}, of which this rank holds {piece.numel()} elements: such a "
                f"state cannot be saved from parts. Use an optimizer whose states are of its "
                f"parameters' shapes, or zero.stage=0."
            )
        yield key, value


def optimizer_scalars(parts: Parts, optimizer: Optimizer | None) -> dict[str, dict[str, Scalar]]:
    """Counters of this rank's pieces, by the parameter's name."""
    found: dict[str, dict[str, Scalar]] = {}
    if optimizer is None:
        return found
    for _, slot, piece, _ in holdings(parts.groups):
        scalars = scalar_states(optimizer, piece)
        if scalars:
            found[parts.catalogue.record(slot.name).name] = dict(scalars)
    return found


# ---- in ----


class OptimizerLoader:
    """Brings what a checkpoint has of an optimizer into the one that an engine has bound.

    Args:
        optimizer: of the run that goes on.
        run: what the checkpoint says of the run that wrote it.
        reader: of the checkpoint.
        streams: whether states live on tiers, of which those in `optimizer.state` are views.

    Raises:
        CheckpointError: it was saved by an optimizer whose states mean something else, with another
            number of groups, or is of another model.
    """

    def __init__(
        self, optimizer: Optimizer, run: SavedRun, reader: StateReader, *, streams: bool
    ) -> None:
        self._optimizer = optimizer
        self._reader = reader
        self._streams = streams
        here = type(optimizer)
        stored = {entry.kind for entry in reader.manifest.entries} - {MASTER}
        stored |= {kind for scalars in reader.scalars.values() for kind in scalars}
        self.change: OptimizerChange = plan_change(
            here.__name__ if run.optimizer is None else run.optimizer,
            stored,
            here,
            optimizer.param_groups,
            where=str(reader.directory),
        )
        self._groups = run.param_groups
        if self._groups is not None and len(self._groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"{reader.directory} has {len(self._groups)} optimizer groups, this run has "
                f"{len(optimizer.param_groups)}. Make the optimizer with the same groups."
            )
        self._group_of = {
            id(piece): group for group in optimizer.param_groups for piece in group["params"]
        }
        self._integers, self._tensors = counts_in_integers(here), counts_in_tensors(here)

    def load_settings(self) -> None:
        """Give the groups the stored settings, where they mean the same; tell what has changed.

        Raises:
            CheckpointError: a stored setting is of another kind than this run's.
        """
        own: dict[str, str] = {}
        for group, values in zip(self._optimizer.param_groups, self._groups or (), strict=False):
            for key, value in values.items():
                now = group.get(key)
                if self.change.takes(key):
                    check_hyperparameter(key, value, now, self._reader.where)
                    _put(group, key, value)
                elif key in group and _plain(now) != value:
                    own.setdefault(key, f"{key}={now} ({value} there)")
        if self.change.is_same:
            return
        _log.warning(
            "%s goes on from the %s state in %s: %s. Settings of this run, not of the checkpoint: "
            "%s.",
            self.change.here,
            self.change.there,
            self._reader.directory,
            self.change.describe(),
            ", ".join(own.values()) or "none that differ",
        )

    def load(self, holding: Holding, record: ParameterRecord, tp_rank: int) -> None:
        """Replace the states of one piece by what is stored.

        Args:
            holding: the piece, its states in memory.
            record: its parameter.
            tp_rank: of this rank, whose slice the piece is of.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        piece = holding.piece
        self._forget(piece)
        for kind in self._reader.kinds(record.name):
            key = None if kind == MASTER else self.change.kept.get(kind)
            if key is not None:
                value = self._tensor(holding, record, kind, tp_rank)
                self._optimizer.state[piece][key] = value.to(device=piece.device, copy=True)
        self._load_counters(piece, record.name)

    def _tensor(self, holding: Holding, record: ParameterRecord, kind: str, tp_rank: int) -> Tensor:
        """One stored tensor, in the shape that the optimizer keeps it in."""
        reader, name, place = self._reader, record.name, holding.slot_piece
        shape = reader.shape(name, kind) or ()
        if shape == record.shape:
            value = reader.read(
                name, kind, place.start, place.numel, slicing=record.slicing, tp_rank=tp_rank
            )
            shape = tuple(holding.piece.shape)
        else:
            self._check_own_shape(holding, record, kind, shape)
            value = reader.read(name, kind, 0, prod(shape))
        if value is None:
            raise KeyError((name, kind))
        return value.view(shape)

    def _check_own_shape(
        self, holding: Holding, record: ParameterRecord, kind: str, shape: tuple[int, ...]
    ) -> None:
        if is_of_parameter_shape(self.change.there, kind):
            raise CheckpointError(
                f"{self._reader.directory} is of another model: its {kind} of {record.name} has "
                f"the shape {shape}, the parameter here has {record.shape}."
            )
        if record.slicing is not None or not holding.group.whole:
            raise CheckpointError(
                f"{self._reader.directory} has {kind} of {record.name} in a shape of its own, "
                f"{shape}: it goes with the whole parameter, of which this rank holds "
                f"{holding.piece.numel()} elements. Resume with zero.stage=0 and without mesh.tp."
            )

    def _forget(self, piece: nn.Parameter) -> None:
        """Put the states of a piece back to those before its first step."""
        state = self._optimizer.state.get(piece)
        if not state:
            return
        if not self._streams:
            del self._optimizer.state[piece]
            return
        # Their memory is on a tier and stays; zeros are what each of them begins with.
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            else:
                state[key] = 0

    def _load_counters(self, piece: nn.Parameter, name: str) -> None:
        """Take the counters of a parameter, and begin what the checkpoint does not have."""
        where, state = self._reader.where, self._optimizer.state
        stored = {
            kind: counter(number, f"{kind} of {name}", where)
            for kind, number in self._reader.scalars.get(name, {}).items()
        }
        for kind, number in stored.items():
            if kind in self.change.kept:
                key = self.change.kept[kind]
                state[piece][key] = self._counter(key, number, piece)
        if not state.get(piece):
            return
        for key in self.change.made:
            product = mu_product(stored.get(STEP, 0.0), self._group_of[id(piece)])
            state[piece][key] = self._counter(key, product, piece)
        for key in self.change.anew:
            state[piece][key] = torch.zeros_like(piece, memory_format=torch.preserve_format)

    def _counter(self, key: str, number: float, piece: nn.Parameter) -> float | Tensor:
        """A counter as the optimizer keeps it: torch's are 0-d fp32, on the device when fused."""
        if not self._tensors and key != STEP:
            return number
        if self._integers:
            return int(number)
        group = self._group_of[id(piece)]
        on_device = bool(group.get("fused") or group.get("capturable"))
        return torch.tensor(
            number, dtype=torch.float32, device=piece.device if on_device else torch.device("cpu")
        )


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    now = group.get(key)
    if isinstance(now, Tensor):
        now.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(now, tuple) else value
