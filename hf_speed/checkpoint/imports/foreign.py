"""What a checkpoint of another framework says, whichever framework it was.

Tensors stay where they are: a `Foreign` holds handles, each of which knows in which files its
pieces lie and reads one whole tensor when asked. So an import holds one tensor at a time.

    DeepSpeed   flat intervals, one per rank     Strips
    torch DCP   boxes, one or more per rank      Boxes
    Hub, files  whole tensors                    Strips of one, or a safetensors key
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.errors import CheckpointError
from hf_speed.shard.reshard import Box, cover_error

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Modules that compilers, FSDP and activation checkpointing put around others."""

_HYPERPARAMETERS = frozenset(
    (
        *("lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "momentum"),
        *("dampening", "nesterov", "alpha", "centered", "rho", "lr_decay", "lambd"),
        *("initial_accumulator_value", "decoupled_weight_decay"),
    )
)
"""Of an optimizer's group: what says how it updates, and not how it is implemented."""


class ForeignTensor(Protocol):
    """A whole tensor that lies in pieces in another framework's files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        ...

    def read(self) -> Tensor:
        """All of it, of `shape` and `dtype`, on the CPU."""
        ...


class Strip(NamedTuple):
    """The interval of a flattened tensor that some rank holds, as elements of its own tensor."""

    source: StoredTensor
    start: int
    numel: int


class Strips(NamedTuple):
    """A tensor that flat intervals make up, in their order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strips: tuple[Strip, ...]

    @classmethod
    def whole(cls, stored: StoredTensor) -> "Strips":
        """One stored tensor."""
        return cls(stored.shape, stored.dtype, (Strip(stored, 0, stored.numel),))

    @classmethod
    def join(cls, shape: tuple[int, ...], strips: Iterable[Strip], *, what: str) -> "Strips":
        """Strips in order.

        Raises:
            CheckpointError: they are more or fewer elements than `shape` has, differ in dtype, or
                are not within their sources.
        """
        parts = tuple(strip for strip in strips if strip.numel)
        total = sum(strip.numel for strip in parts)
        if total != prod(shape):
            raise CheckpointError(
                f"{what} has {total} elements in the files where its shape {shape} needs "
                f"{prod(shape)}: some rank's file is missing or of another save."
            )
        dtypes = {strip.source.dtype for strip in parts} or {torch.float32}
        beyond = any(
            strip.start < 0 or strip.start + strip.numel > strip.source.numel for strip in parts
        )
        if len(dtypes) > 1 or beyond:
            raise CheckpointError(
                f"{what} is described by pieces of dtypes {sorted(map(str, dtypes))}"
                f"{' that reach beyond their files' if beyond else ''}."
            )
        return cls(shape, next(iter(dtypes)), parts)

    def read(self) -> Tensor:
        """All of it."""
        out = torch.empty(prod(self.shape), dtype=self.dtype)
        begin = 0
        for strip in self.strips:
            out[begin : begin + strip.numel] = strip.source.read_flat(strip.start, strip.numel)
            begin += strip.numel
        return out.view(self.shape)

    def head(self, numel: int) -> Tensor:
        """(numel,): its first elements."""
        out = torch.empty(numel, dtype=self.dtype)
        begin = 0
        for strip in self.strips:
            count = min(strip.numel, numel - begin)
            out[begin : begin + count] = strip.source.read_flat(strip.start, count)
            begin += count
        return out


class Boxes(NamedTuple):
    """A tensor that boxes make up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[Box, "ForeignTensor"], ...]

    @classmethod
    def join(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        pieces: Iterable[tuple[Box, "ForeignTensor"]],
        *,
        what: str,
    ) -> "Boxes":
        """Pieces of a tensor.

        Raises:
            CheckpointError: they leave gaps or overlap.
        """
        parts = tuple(pieces)
        problem = cover_error(shape, tuple(box for box, _ in parts))
        if problem is not None:
            raise CheckpointError(f"The pieces of {what} are bad: {problem}.")
        return cls(shape, dtype, parts)

    def read(self) -> Tensor:
        """All of it."""
        out = torch.empty(self.shape, dtype=self.dtype)
        origin = (0,) * len(self.shape)
        for box, piece in self.pieces:
            out[box.slices(origin)] = piece.read()
        return out


class Numbered(NamedTuple):
    """The state of an optimizer whose parameters have numbers.

    Attributes:
        path: of the file.
        groups: numbers by group, in the order of the optimizer.
        settings: hyperparameters by group.
        states: number -> kind -> moment.
        scalars: number -> kind -> counter, such as "step".
    """

    path: Path
    groups: tuple[tuple[int, ...], ...]
    settings: tuple[Mapping[str, Any], ...]
    states: Mapping[int, Mapping[str, ForeignTensor]]
    scalars: Mapping[int, Mapping[str, float]]


class Foreign(NamedTuple):
    """A checkpoint of another framework.

    Attributes:
        origin: what wrote it, as in "DeepSpeed 0.19.8, ZeRO stage 3, 2 ranks".
        weights: name -> parameter or buffer, in the best precision that there is.
        dtypes: name -> the dtype that it had in the model that computed, for those of `weights`.
        states: name -> kind -> moment, of what was trained.
        scalars: name -> kind -> counter, such as "step".
        aliases: other names of a tied weight -> the name in `weights`.
        trained: names of what was trained; None where the files do not say.
        param_groups: hyperparameters by optimizer group; None where there was no optimizer.
        optimizer: its class name, as torch has it; None where unknown.
        loss_scale: of fp16, as the engine keeps it.
        step: optimizer steps taken; None where unknown.
        stage: of ZeRO; 3 for fully sharded data parallel.
        num_ranks: that wrote it.
        home: directory of what belongs to the model: config.json, tokenizer, trainer_state.json.
        scheduler_step: steps that the learning rate's schedule has taken; None where unknown.
        numbered: the optimizer's state where it has numbers and no names.
    """

    origin: str
    weights: Mapping[str, ForeignTensor]
    dtypes: Mapping[str, torch.dtype]
    home: Path
    states: Mapping[str, Mapping[str, ForeignTensor]] = {}
    scalars: Mapping[str, Mapping[str, float]] = {}
    aliases: Mapping[str, str] = {}
    trained: frozenset[str] | None = None
    param_groups: tuple[Mapping[str, Any], ...] | None = None
    optimizer: str | None = None
    loss_scale: Mapping[str, float] | None = None
    step: int | None = None
    stage: int | None = None
    num_ranks: int = 1
    scheduler_step: int | None = None
    numbered: Numbered | None = None


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that training put around its modules."""
    return _WRAPPERS.sub("", name)


def text(value: object, what: str, where: str) -> str:
    """A string of a foreign file.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, str):
        raise CheckpointError(f"{where}: {what} is {type(value).__name__}, not a name.")
    return value


def mapping(value: object, what: str, where: str) -> Mapping[Any, Any]:
    """A dict of a foreign file.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {what} is {type(value).__name__} where a dict belongs.")
    return value


def sequence(value: object, what: str, where: str) -> list[Any]:
    """A list or tuple of a foreign file.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"{where}: {what} is {type(value).__name__} where a list belongs.")
    return list(value)


def shape_of(value: object, what: str, where: str) -> tuple[int, ...]:
    """A shape of a foreign file.

    Raises:
        CheckpointError: it is none.
    """
    sizes = sequence(value, f"the shape of {what}", where)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{where}: {what} has the shape {sizes!r:.80}.")
    return tuple(sizes)


def integer(value: object) -> int | None:
    """A count of a foreign file; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """A number of a foreign file, also one in a tensor of one element; None for anything else."""
    if isinstance(value, StoredTensor) and value.numel == 1:
        return float(value.read_flat(0, 1).item())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def hyperparameters(group: Mapping[Any, Any]) -> dict[str, Any]:
    """Of an optimizer's group: the settings of its update rule, as JSON values."""
    kept: dict[str, Any] = {}
    for key, value in group.items():
        if key not in _HYPERPARAMETERS:
            continue
        if isinstance(value, (list, tuple)):
            kept[key] = [number(each) for each in value]
        elif isinstance(value, bool) or value is None:
            kept[key] = value
        else:
            kept[key] = number(value)
    return {
        key: value
        for key, value in kept.items()
        if value is not None and not (isinstance(value, list) and None in value)
    }


def optimizer_name(
    kinds: Iterable[str], groups: Iterable[Mapping[Any, Any]], named: object = None
) -> str | None:
    """The optimizer whose state these are, as torch calls it.

    Adam and AdamW keep the same moments. Where neither the config nor the groups say which it was,
    it is taken for AdamW, which transformers uses.

    Args:
        kinds: of its moments.
        groups: its hyperparameters.
        named: what a config calls it.
    """
    present = set(kinds)
    if {"exp_avg", "exp_avg_sq"} <= present:
        decoupled = [group.get("decoupled_weight_decay") for group in groups]
        if isinstance(named, str) and named.lower() in ("adam", "adamw"):
            return "AdamW" if named.lower() == "adamw" else "Adam"
        return "Adam" if decoupled and all(value is False for value in decoupled) else "AdamW"
    if present == {"exp_avg"}:
        return "Lion"
    if present == {"momentum_buffer"}:
        return "SGD"
    return "Adagrad" if present == {"sum"} else None


def grad_scaler(path: Path) -> dict[str, float] | None:
    """What a GradScaler saved beside an fp16 run, in the terms of ours; None without the file."""
    if not path.is_file():
        return None
    state = mapping(load_archive(path), "the file", str(path))
    scale, good = number(state.get("scale")), number(state.get("_growth_tracker"))
    if scale is None:
        return None
    return {"scale": scale, "good_steps": good or 0.0, "tolerance": 1.0}
