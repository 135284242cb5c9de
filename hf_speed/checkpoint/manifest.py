"""What a checkpoint's `hf_speed/manifest.json` says: pure values to and from JSON, checked.

A manifest lists every file with its size, and for each state tensor the boxes of which it consists
and where they lie. Nothing in it is trusted: types, paths, boxes and sizes are checked before any
file is opened.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import torch

from hf_speed.checkpoint.tensorfile import DTYPE_CODES, DTYPE_OF_CODE
from hf_speed.errors import CheckpointError
from hf_speed.shard.reshard import Box, cover_error

FORMAT_VERSION = 1

STATE_DIRECTORY = "hf_speed"
"""Within a checkpoint directory: what a Hub model has no place for."""

MANIFEST_PATH = f"{STATE_DIRECTORY}/manifest.json"

Scalar = float | int | bool | str

T = TypeVar("T")


class Piece(NamedTuple):
    """A box of a tensor and the safetensors key that holds it; `file` is relative to the root."""

    file: str
    key: str
    offsets: tuple[int, ...]
    extents: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Where the piece lies in its tensor."""
        return Box(self.offsets, self.extents)


class Entry(NamedTuple):
    """One state tensor: `kind` ("master", "exp_avg", ...) of parameter `name`, full shape."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def label(self) -> str:
        """The entry as messages name it."""
        return f"{self.kind} of {self.name}"


class Manifest(NamedTuple):
    """Everything that the `hf_speed/` half of a checkpoint holds.

    Attributes:
        world_size: number of ranks that wrote it.
        meta: what the engine said of the run: mesh, stage, param groups, loss scale.
        scalars: parameter name -> kind -> value, such as an optimizer's "step".
        files: path relative to the checkpoint -> bytes.
        entries: the state tensors.
        local: rank -> path of the safetensors file with that rank's own tensors, such as its RNG.
        package_version: of the hf_speed that wrote it.
    """

    world_size: int
    meta: Mapping[str, Any]
    scalars: Mapping[str, Mapping[str, Scalar]]
    files: Mapping[str, int]
    entries: tuple[Entry, ...]
    local: Mapping[int, str]
    package_version: str = ""

    def to_json(self) -> str:
        """The manifest as strict JSON.

        Raises:
            CheckpointError: a value of `meta` or `scalars` that JSON cannot hold.
        """
        body = {
            "format_version": FORMAT_VERSION,
            "package_version": self.package_version,
            "world_size": self.world_size,
            "meta": self.meta,
            "scalars": self.scalars,
            "files": self.files,
            "local": self.local,
            "entries": [entry_to_json(entry) for entry in self.entries],
        }
        return dump_json(body, "The checkpoint's meta data")

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Manifest":
        """Read and check a manifest; `where` names its file in messages.

        Raises:
            CheckpointError: not a manifest, of another format version, or inconsistent.
        """
        body = _expect(load_json(text, where), dict, where, "the manifest")
        version = body.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format_version {version!r}; this hf_speed reads {FORMAT_VERSION}. "
                f"It was written by hf_speed {body.get('package_version', '?')}: use that."
            )
        entries = _expect(body.get("entries"), list, where, "entries")
        manifest = cls(
            world_size=_count(body.get("world_size"), where, "world_size"),
            meta=_expect(body.get("meta"), dict, where, "meta"),
            scalars=_scalars(body.get("scalars"), where),
            files={
                safe_path(path, where): _count(size, where, f"the size of {path}")
                for path, size in _expect(body.get("files"), dict, where, "files").items()
            },
            entries=tuple(
                entry_from_json(entry, where=f"{where}: entries[{index}]")
                for index, entry in enumerate(entries)
            ),
            local=_local(body.get("local"), where),
            package_version=_expect(body.get("package_version"), str, where, "package_version"),
        )
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Check what a single field cannot show.

        Raises:
            CheckpointError: an entry twice, pieces that leave gaps or overlap, a file that is not
                listed or is too small for what it is said to hold.
        """
        seen: set[tuple[str, str]] = set()
        needed: dict[str, int] = {}
        for entry in self.entries:
            if (entry.name, entry.kind) in seen:
                raise CheckpointError(f"{where} lists the {entry.label} twice.")
            seen.add((entry.name, entry.kind))
            problem = cover_error(entry.shape, tuple(piece.box for piece in entry.pieces))
            if problem is not None:
                raise CheckpointError(
                    f"{where}: the pieces of the {entry.label} are bad: {problem}."
                )
            for piece in entry.pieces:
                nbytes = prod(piece.extents) * entry.dtype.itemsize
                needed[piece.file] = needed.get(piece.file, 0) + nbytes
        for file in (*needed, *self.local.values()):
            if self.files.get(file, -1) < needed.get(file, 0):
                raise CheckpointError(
                    f"{where} puts {needed.get(file, 0)} bytes in {file}, whose listed size is "
                    f"{self.files.get(file, 'absent')}."
                )


def merge_entries(entries: Iterable[Entry], *, where: str) -> tuple[Entry, ...]:
    """Join what the ranks hold of each state tensor, sorted by name and kind.

    Raises:
        CheckpointError: ranks differ in the shape or dtype of one.
    """
    merged: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        known = merged.setdefault((entry.name, entry.kind), entry._replace(pieces=()))
        if (known.shape, known.dtype) != (entry.shape, entry.dtype):
            raise CheckpointError(
                f"{where}: ranks disagree on the {entry.label}: {known.shape} {known.dtype} and "
                f"{entry.shape} {entry.dtype}."
            )
        merged[entry.name, entry.kind] = known._replace(pieces=known.pieces + entry.pieces)
    return tuple(merged[key] for key in sorted(merged))


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry as JSON values."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "shape": entry.shape,
        "dtype": DTYPE_CODES[entry.dtype],
        "pieces": [list(piece) for piece in entry.pieces],
    }


def entry_from_json(value: object, *, where: str) -> Entry:
    """An entry from JSON values.

    Raises:
        CheckpointError: a field of the wrong type, or a path that leaves the checkpoint.
    """
    body = _expect(value, dict, where, "the entry")
    code = body.get("dtype")
    if not isinstance(code, str) or code not in DTYPE_OF_CODE:
        raise CheckpointError(f"{where}: dtype {code!r} is unknown.")
    pieces = []
    for item in _expect(body.get("pieces"), list, where, "pieces"):
        fields = _expect(item, list, where, "a piece")
        if len(fields) != len(Piece._fields):
            raise CheckpointError(f"{where}: a piece has {len(fields)} fields.")
        file, key, offsets, extents = fields
        pieces.append(
            Piece(
                safe_path(file, where),
                _expect(key, str, where, "a piece's key"),
                _sizes(offsets, where, "offsets"),
                _sizes(extents, where, "extents"),
            )
        )
    return Entry(
        name=_expect(body.get("name"), str, where, "name"),
        kind=_expect(body.get("kind"), str, where, "kind"),
        shape=_sizes(body.get("shape"), where, "shape"),
        dtype=DTYPE_OF_CODE[code],
        pieces=tuple(pieces),
    )


def safe_path(path: object, where: str) -> str:
    """A path of the manifest, if it stays within the checkpoint.

    Raises:
        CheckpointError: not a relative path of plain names.
    """
    if not isinstance(path, str) or not path or "\\" in path or "\0" in path or ":" in path:
        raise CheckpointError(f"{where}: {path!r} is not a file name.")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise CheckpointError(f"{where}: the path {path!r} leaves the checkpoint's directory.")
    return path


def dump_json(value: object, what: str, *, indent: int | None = None) -> str:
    """Strict JSON: no NaN, no infinity, no object that would come back as something else.

    Raises:
        CheckpointError: names the value and why.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be stored as JSON: {error}. Give plain numbers, strings, lists and "
            f"dicts; tensors belong in the states."
        ) from error


def load_json(text: str, where: str) -> Any:
    """Parse strict JSON.

    Raises:
        CheckpointError: not JSON, or it holds NaN or infinities.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}.") from error


def _expect(value: object, kind: type[T], where: str, what: str) -> T:
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{where}: {what} is {type(value).__name__} where {kind.__name__} is expected."
        )
    return value


def _count(value: object, where: str, what: str) -> int:
    number = _expect(value, int, where, what)
    if isinstance(value, bool) or number < 0:
        raise CheckpointError(f"{where}: {what} is {value!r} where a count is expected.")
    return number


def _sizes(value: object, where: str, what: str) -> tuple[int, ...]:
    return tuple(_count(size, where, what) for size in _expect(value, list, where, what))


def _scalars(value: object, where: str) -> dict[str, dict[str, Scalar]]:
    scalars = _expect(value, dict, where, "scalars")
    for name, kinds in scalars.items():
        for kind, scalar in _expect(kinds, dict, where, f"scalars of {name}").items():
            if not isinstance(scalar, Scalar):
                raise CheckpointError(f"{where}: {kind} of {name} is not a number or a string.")
    return scalars


def _local(value: object, where: str) -> dict[int, str]:
    local = {}
    for rank, path in _expect(value, dict, where, "local").items():
        if not rank.isdecimal():
            raise CheckpointError(f"{where}: local has the rank {rank!r}.")
        local[int(rank)] = safe_path(path, where)
    return local
