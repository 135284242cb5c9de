"""torch's distributed checkpoints, and what accelerate and the Trainer write of FSDP runs.

    pytorch_model_fsdp_0/.metadata      a pickle: which tensor has which boxes, and where they lie
                         __R_0.distcp   archives of torch.save, one a box, one after the other
    optimizer_0/...                     likewise: moments by parameter name, hyperparameters
    pytorch_model_fsdp.bin, optimizer.bin      the same as one file each (FULL_STATE_DICT)

A single directory that holds both model and optimizer is read as well: {"model": ..., "optimizer":
...}, with the optimizer's state nested by name, or flattened ("state.NAME.KIND").
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.checkpoint.imports.foreign import (
    Boxes,
    Foreign,
    ForeignTensor,
    Strips,
    grad_scaler,
    hyperparameters,
    integer,
    mapping,
    number,
    optimizer_name,
    plain_name,
    sequence,
    shape_of,
    text,
)
from hf_speed.checkpoint.imports.pickles import BytesOf, ChunkKey, ChunkOf, Record, load_pickle
from hf_speed.errors import CheckpointError
from hf_speed.shard.reshard import Box

METADATA = ".metadata"
MODEL_DIRECTORY = "pytorch_model_fsdp_0"
OPTIMIZER_DIRECTORY = "optimizer_0"
MODEL_FILE = "pytorch_model_fsdp.bin"
OPTIMIZER_FILE = "optimizer.bin"

_MODEL_ROOTS = ("model", "module", "state_dict")
_OPTIMIZER_ROOTS = ("optimizer", "optim", "optimizers")
_OPTIMIZER_KEYS = ("state", "param_groups")

Path_ = tuple[str | int, ...]
"""Where a value stands in the nested dicts that were saved."""


def is_dcp(directory: Path) -> bool:
    """Whether a directory holds such a checkpoint, in any of its forms."""
    return (
        (directory / METADATA).is_file()
        or (directory / MODEL_DIRECTORY / METADATA).is_file()
        or (directory / MODEL_FILE).is_file()
    )


def open_dcp(directory: Path, *, home: Path) -> Foreign:
    """A checkpoint of FSDP, or of torch.distributed.checkpoint.

    Args:
        directory: see the module.
        home: where config.json and the like are.

    Raises:
        CheckpointError: not such a checkpoint, damaged, or of several models.
    """
    several = directory / "pytorch_model_fsdp_1"
    if several.exists() or (directory / "pytorch_model_fsdp_1.bin").exists():
        raise CheckpointError(
            f"{directory} holds several models ({several.name} is there). Import each from a "
            f"directory of its own, with {MODEL_DIRECTORY} and {OPTIMIZER_DIRECTORY} in it."
        )
    found = _Collected()
    num_ranks = 1
    if (directory / METADATA).is_file():
        num_ranks = found.add_distributed(directory)
    elif (directory / MODEL_DIRECTORY / METADATA).is_file():
        num_ranks = found.add_distributed(directory / MODEL_DIRECTORY)
        if (directory / OPTIMIZER_DIRECTORY / METADATA).is_file():
            found.add_distributed(directory / OPTIMIZER_DIRECTORY)
    elif (directory / MODEL_FILE).is_file():
        found.add_file(directory / MODEL_FILE, "model")
        if (directory / OPTIMIZER_FILE).is_file():
            found.add_file(directory / OPTIMIZER_FILE, "optimizer")
    else:
        raise CheckpointError(
            f"{directory} has neither {METADATA} nor {MODEL_DIRECTORY}/{METADATA} nor {MODEL_FILE}."
        )
    return found.foreign(directory, home=home, num_ranks=num_ranks)


class _Collected:
    """What the files say, sorted by what it is of."""

    def __init__(self) -> None:
        self.weights: dict[str, ForeignTensor] = {}
        # Where there is no dict of the model's own, they are its weights.
        self.bare: dict[str, ForeignTensor] = {}
        self.states: dict[str, dict[str, ForeignTensor]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self.groups: dict[int, dict[str, Any]] = {}
        self.flat_groups: dict[str, dict[str, Any]] = {}

    def add_distributed(self, directory: Path) -> int:
        """A directory of torch.distributed.checkpoint; the number of ranks that wrote it."""
        stored = _Distributed.load(directory)
        for path, key in stored.paths():
            self._add(path, lambda key=key: stored.value(key), str(directory))
        return stored.num_ranks

    def add_file(self, path: Path, root: str) -> None:
        """One file of torch.save with a nested dict."""
        tree = mapping(load_archive(path), "the file", str(path))
        for where, value in _leaves((root,), tree):
            self._add(where, lambda value=value: value, str(path))

    def _add(self, path: Path_, value: Any, where: str) -> None:
        """Put one value where it belongs; `value` is called if it is wanted."""
        place = _place(path)
        if place is None:
            return
        kind, name, key = place
        if kind == "group":
            self.groups.setdefault(int(name), {})[key] = value()
        elif kind == "flat group":
            self.flat_groups.setdefault(plain_name(name), {})[key] = value()
        else:
            self._add_tensor(kind, plain_name(name), key, value(), where)

    def _add_tensor(self, kind: str, name: str, key: str, value: object, where: str) -> None:
        tensor = Strips.whole(value) if isinstance(value, StoredTensor) else value
        if kind in ("weight", "bare"):
            if isinstance(tensor, (Strips, Boxes)):
                (self.weights if kind == "weight" else self.bare)[name] = tensor
        elif isinstance(tensor, (Strips, Boxes)) and tensor.shape:
            self.states.setdefault(name, {})[key] = tensor
        else:
            counter = number(tensor)
            if isinstance(tensor, (Strips, Boxes)):
                counter = float(tensor.read().item())
            if counter is None:
                raise CheckpointError(f"{where}: {key} of {name} is neither a tensor nor a number.")
            self.scalars.setdefault(name, {})[key] = counter

    def foreign(self, directory: Path, *, home: Path, num_ranks: int) -> Foreign:
        """All of it as one checkpoint.

        Raises:
            CheckpointError: there are no weights, or the optimizer's state is of another model.
        """
        self.weights = self.weights or self.bare
        if not self.weights:
            raise CheckpointError(
                f"{directory} holds no weights: keys begin neither with 'model' nor with a "
                f"parameter's name."
            )
        strange = sorted(self.states.keys() - self.weights.keys())
        if strange:
            raise CheckpointError(
                f"{directory} holds the optimizer's state of {strange[0]}, which is no weight of "
                f"its model."
            )
        groups, members = self._groups(str(directory))
        kinds = {kind for values in self.states.values() for kind in values}
        steps = {values["step"] for values in self.scalars.values() if "step" in values}
        has_optimizer = bool(groups or self.states)
        return Foreign(
            origin=f"torch FSDP / distributed checkpoint, {num_ranks} rank(s)",
            weights=self.weights,
            dtypes={name: value.dtype for name, value in self.weights.items()},
            home=home,
            states=self.states,
            scalars=self.scalars,
            trained=(members or frozenset(self.states)) if has_optimizer else None,
            param_groups=groups if has_optimizer else None,
            optimizer=optimizer_name(kinds, groups) if has_optimizer else None,
            loss_scale=grad_scaler(directory / "scaler.pt"),
            step=int(max(steps)) if steps else None,
            stage=3,
            num_ranks=num_ranks,
        )

    def _groups(self, where: str) -> tuple[tuple[dict[str, Any], ...], frozenset[str]]:
        """Hyperparameters by group, and the parameters that are in any."""
        members: set[str] = set()
        if self.groups:
            for group in self.groups.values():
                names = sequence(group.get("params", []), "the parameters of a group", where)
                members |= {plain_name(text(name, "a parameter", where)) for name in names}
            ordered = [self.groups[index] for index in sorted(self.groups)]
            return tuple(hyperparameters(group) for group in ordered), frozenset(members)
        # Flattened, each parameter repeats the settings of its group: equal ones are one group.
        distinct: list[dict[str, Any]] = []
        for settings in self.flat_groups.values():
            known = hyperparameters(settings)
            if known not in distinct:
                distinct.append(known)
        return tuple(distinct), frozenset(self.flat_groups)


def _place(path: Path_) -> tuple[str, str, str] | None:
    """(kind, name, key) of a value; None: not wanted.

    Kinds: "weight", "bare" (which may be one), "state", "group", "flat group".
    """
    words = [str(part) for part in path]
    root, rest = (words[0], words[1:]) if len(words) > 1 else ("", words)
    if root in _MODEL_ROOTS and len(words) > 1:
        return "weight", ".".join(rest), ""
    if root not in (*_OPTIMIZER_ROOTS, *_OPTIMIZER_KEYS):
        if len(words) > 1:
            return None
        if words[0].split(".", 1)[0] not in _OPTIMIZER_KEYS:
            return "bare", words[0], ""
    parts = rest if root in _OPTIMIZER_ROOTS else words
    if parts and parts[0].isdecimal():  # A list of optimizers of which there is one.
        parts = parts[1:]
    if len(parts) == 1:
        parts = _split_flat(parts[0])
    if len(parts) == 3 and parts[0] == "state":
        return "state", parts[1], parts[2]
    if len(parts) == 3 and parts[0] == "param_groups":
        return ("group" if parts[1].isdecimal() else "flat group"), parts[1], parts[2]
    return None


def _split_flat(key: str) -> list[str]:
    """Cut "state.NAME.KIND" and "param_groups.NAME.KEY", where NAME has dots."""
    for root in _OPTIMIZER_KEYS:
        name, _, last = key.removeprefix(f"{root}.").rpartition(".")
        if key.startswith(f"{root}.") and name:
            return [root, name, last]
    return [key]


def _leaves(path: Path_, value: object) -> Iterator[tuple[Path_, object]]:
    """Every value of nested dicts, and of lists of dicts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, index), inner)
    else:
        yield path, value


class _Distributed(NamedTuple):
    """A directory of torch.distributed.checkpoint and what its metadata says."""

    directory: Path
    described: Mapping[Any, Any]
    nested: Mapping[Any, Any]
    places: Mapping[Any, Any]

    @classmethod
    def load(cls, directory: Path) -> "_Distributed":
        """Read the metadata.

        Raises:
            CheckpointError: damaged, or of another layout of files.
        """
        path = directory / METADATA
        where = str(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        metadata = load_pickle(data, where)
        if not isinstance(metadata, Record):
            raise CheckpointError(f"{path} is {type(metadata).__name__}, no metadata of torch.")
        nested = metadata.get("planner_data")
        return cls(
            directory,
            mapping(metadata.get("state_dict_metadata"), "state_dict_metadata", where),
            nested if isinstance(nested, dict) else {},
            mapping(metadata.get("storage_data"), "storage_data", where),
        )

    @property
    def num_ranks(self) -> int:
        """Ranks that have written a file."""
        names = {str(place.get("relative_path")) for place in self._records()}
        return max(1, len({name.split("_")[2] for name in names if name.count("_") >= 3}))

    def _records(self) -> Iterable[Record]:
        return (place for place in self.places.values() if isinstance(place, Record))

    def paths(self) -> Iterator[tuple[Path_, str]]:
        """(where it stood in the state dict, its key) of every value."""
        for key in self.described:
            known = text(key, "a key", str(self.directory / METADATA))
            path = self.nested.get(known)
            is_path = isinstance(path, tuple) and all(isinstance(each, (str, int)) for each in path)
            yield (path if is_path and path else (known,)), known

    def value(self, key: str) -> object:
        """A tensor's handle, or another value, read."""
        record = self.described[key]
        where = str(self.directory / METADATA)
        if isinstance(record, BytesOf):
            return self._load(key, None)
        if not isinstance(record, ChunkOf):
            raise CheckpointError(f"{where}: {key} is of an unknown kind.")
        shape = shape_of(record.get("size"), key, where)
        dtype = _dtype_of(record.get("properties"), key, where)
        pieces = []
        for chunk in sequence(record.get("chunks"), f"the pieces of {key}", where):
            fields = chunk.fields if isinstance(chunk, Record) else {}
            box = Box(
                shape_of(fields.get("offsets"), key, where),
                shape_of(fields.get("sizes"), key, where),
            )
            if box.numel:
                pieces.append((box, self._chunk(key, box, dtype)))
        return Boxes.join(shape, dtype, pieces, what=f"{key} in {self.directory}")

    def _chunk(self, key: str, box: Box, dtype: torch.dtype) -> "_Chunk":
        path, offset, nbytes = self._place(key, box.offsets)
        return _Chunk(path, offset, nbytes, box.extents, dtype, key)

    def _load(self, key: str, offsets: tuple[int, ...] | None) -> object:
        path, offset, nbytes = self._place(key, offsets)
        return load_archive(path, offset=offset, nbytes=nbytes)

    def _place(self, key: str, offsets: tuple[int, ...] | None) -> tuple[Path, int, int]:
        """Where a piece lies."""
        wanted = ChunkKey()
        wanted.fields = {"fqn": key, "offset": None if offsets is None else torch.Size(offsets)}
        place = self.places.get(wanted)
        where = str(self.directory / METADATA)
        if not isinstance(place, Record):
            raise CheckpointError(f"{where} does not say where {key} lies.")
        name = text(place.get("relative_path"), "a file's name", where)
        offset, nbytes = integer(place.get("offset")), integer(place.get("length"))
        if Path(name).name != name or offset is None or nbytes is None or min(offset, nbytes) < 0:
            raise CheckpointError(f"{where} puts {key} in {name!r:.80}, bytes {offset}+{nbytes}.")
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: {key} was stored through {place.get('transform_descriptors')!r:.60}. "
                f"Save it without extensions."
            )
        if not (self.directory / name).is_file():
            raise CheckpointError(f"{self.directory / name}, which holds {key}, is missing.")
        return self.directory / name, offset, nbytes


class _Chunk(NamedTuple):
    """One box of a tensor, an archive within a file; opened when it is read."""

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str

    def read(self) -> torch.Tensor:
        """The box.

        Raises:
            CheckpointError: the archive holds something else.
        """
        stored = load_archive(self.path, offset=self.offset, nbytes=self.nbytes)
        if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (
            self.shape,
            self.dtype,
        ):
            raise CheckpointError(
                f"{self.path} holds something else than the {self.shape} {self.dtype} of "
                f"{self.key}."
            )
        return stored.read()


def _dtype_of(properties: object, key: str, where: str) -> torch.dtype:
    """The first of what torch's TensorProperties keeps."""
    if isinstance(properties, Record):
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
        if isinstance(dtype, torch.dtype):
            return dtype
    raise CheckpointError(f"{where} does not say the dtype of {key}.")
