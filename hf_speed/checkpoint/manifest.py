"""What a checkpoint's `hf_speed/manifest.json` says: pure values to and from JSON, checked.

A manifest lists every file with its size and checksum, and for each state tensor the boxes of which
it consists, where they lie, and their checksums. It ends with its own. Nothing in it is trusted:
types, paths, boxes and sizes are checked before any file is opened.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from hf_speed.checkpoint.digest import ALGORITHM, FileRecord, digest_of, is_digest
from hf_speed.checkpoint.header import DTYPE_CODES, DTYPE_OF_CODE
from hf_speed.checkpoint.strict_json import (
    dump_json,
    expect,
    expect_count,
    expect_sizes,
    expect_text,
    load_json,
)
from hf_speed.errors import CheckpointError
from hf_speed.shard.reshard import Box, cover_error

FORMAT_VERSION = 2
"""What is written. Version 1, which is still read, had no checksums."""

STATE_DIRECTORY = "hf_speed"
"""Within a checkpoint directory: what a Hub model has no place for."""

MANIFEST_PATH = f"{STATE_DIRECTORY}/manifest.json"

Scalar = float | int | bool | str

_ENDING = re.compile(r', "digest": "([0-9a-f]{32})"}\n?')
"""How a manifest ends: with the checksum of all that stands before."""

_RANK = re.compile(r"0|[1-9][0-9]{0,9}")


class Piece(NamedTuple):
    """A box of a tensor and the safetensors key that holds it; `file` is relative to the root.

    `digest` is the checksum of its bytes; None while they are not written, and in version 1.
    """

    file: str
    key: str
    offsets: tuple[int, ...]
    extents: tuple[int, ...]
    digest: str | None = None

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
        files: path relative to the checkpoint -> size and checksum; of weights those of each
            tensor too.
        entries: the state tensors.
        local: rank -> path of the safetensors file with that rank's own tensors, such as its RNG.
        package_version: of the hf_speed that wrote it.
    """

    world_size: int
    meta: Mapping[str, Any]
    scalars: Mapping[str, Mapping[str, Scalar]]
    files: Mapping[str, FileRecord]
    entries: tuple[Entry, ...]
    local: Mapping[int, str]
    package_version: str = ""

    @property
    def has_checksums(self) -> bool:
        """False of what a version of hf_speed without checksums has written."""
        return all(record.digest is not None for record in self.files.values())

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
            "checksums": ALGORITHM,
            "files": {path: record_to_json(record) for path, record in self.files.items()},
            "local": self.local,
            "entries": [entry_to_json(entry) for entry in self.entries],
        }
        text = dump_json(body, "The checkpoint's meta data").removesuffix("}")
        return f'{text}, "digest": "{digest_of(text.encode())}"}}\n'

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Manifest":
        """Read and check a manifest; `where` names its file in messages.

        Raises:
            CheckpointError: not a manifest, of another format version, or inconsistent.
        """
        body = expect(load_json(text, where), dict, where, "the manifest")
        version = body.get("format_version")
        if type(version) is not int or version not in (1, FORMAT_VERSION):
            raise CheckpointError(
                f"{where} has format_version {version!r}; this hf_speed reads 1 and "
                f"{FORMAT_VERSION}. It was written by hf_speed "
                f"{body.get('package_version', '?')}: use that."
            )
        _check_own_digest(text, body, where)
        entries = expect(body.get("entries"), list, where, "entries")
        manifest = cls(
            world_size=expect_count(body.get("world_size"), where, "world_size"),
            meta=expect(body.get("meta"), dict, where, "meta"),
            scalars=_scalars(body.get("scalars"), where),
            files={
                safe_path(path, where): record_from_json(record, version, f"{where}: {path!r}")
                for path, record in expect(body.get("files"), dict, where, "files").items()
            },
            entries=tuple(
                entry_from_json(entry, where=f"{where}: entries[{index}]", version=version)
                for index, entry in enumerate(entries)
            ),
            local=_local(body.get("local"), where),
            package_version=expect_text(body.get("package_version"), where, "package_version"),
        )
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Check what a single field cannot show.

        Raises:
            CheckpointError: an entry or a key twice, pieces that leave gaps or overlap, a file that
                is not listed or is too small for what it is said to hold.
        """
        keys: set[tuple[str, str]] = set()
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
                if (piece.file, piece.key) in keys:
                    raise CheckpointError(
                        f"{where}: two pieces are said to be {piece.key!r} in {piece.file}."
                    )
                keys.add((piece.file, piece.key))
                nbytes = prod(piece.extents) * entry.dtype.itemsize
                needed[piece.file] = needed.get(piece.file, 0) + nbytes
        for file in (*needed, *self.local.values()):
            listed = self.files[file].nbytes if file in self.files else -1
            if listed < needed.get(file, 0):
                raise CheckpointError(
                    f"{where} puts {needed.get(file, 0)} bytes in {file}, whose listed size is "
                    f"{listed if file in self.files else 'absent'}."
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


def entry_from_json(value: object, *, where: str, version: int = FORMAT_VERSION) -> Entry:
    """An entry from JSON values; without checksums in version 1.

    Raises:
        CheckpointError: a field of the wrong type, or a path that leaves the checkpoint.
    """
    body = expect(value, dict, where, "the entry")
    code = body.get("dtype")
    if not isinstance(code, str) or code not in DTYPE_OF_CODE:
        raise CheckpointError(f"{where}: dtype {code!r} is unknown.")
    pieces = []
    for item in expect(body.get("pieces"), list, where, "pieces"):
        fields = expect(item, list, where, "a piece")
        if version == 1:
            fields = [*fields, None]
        if len(fields) != len(Piece._fields):
            raise CheckpointError(f"{where}: a piece has {len(fields)} fields.")
        file, key, offsets, extents, digest = fields
        pieces.append(
            Piece(
                safe_path(file, where),
                expect_text(key, where, "a piece's key"),
                expect_sizes(offsets, where, "offsets"),
                expect_sizes(extents, where, "extents"),
                None if version == 1 else _digest(digest, where, "a piece's checksum"),
            )
        )
    return Entry(
        name=expect_text(body.get("name"), where, "name"),
        kind=expect_text(body.get("kind"), where, "kind"),
        shape=expect_sizes(body.get("shape"), where, "shape"),
        dtype=DTYPE_OF_CODE[code],
        pieces=tuple(pieces),
    )


def record_to_json(record: FileRecord) -> dict[str, Any]:
    """What is known of a file as JSON values."""
    tensors = {"tensors": dict(record.tensors)} if record.tensors else {}
    return {"bytes": record.nbytes, "digest": record.digest, **tensors}


def record_from_json(value: object, version: int, where: str) -> FileRecord:
    """What is known of a file; in version 1 its size alone.

    Raises:
        CheckpointError: a field of the wrong type.
    """
    if version == 1:
        return FileRecord(expect_count(value, where, "the size"))
    body = expect(value, dict, where, "the record")
    tensors = expect(body.get("tensors", {}), dict, where, "tensors")
    return FileRecord(
        expect_count(body.get("bytes"), where, "the size"),
        _digest(body.get("digest"), where, "the checksum"),
        {
            expect_text(name, where, "a tensor's name"): _digest(digest, where, f"that of {name!r}")
            for name, digest in tensors.items()
        },
    )


def safe_path(path: object, where: str) -> str:
    """A path of the manifest, if it stays within the checkpoint.

    Raises:
        CheckpointError: not a relative path of plain names.
    """
    if not isinstance(path, str) or not path or "\\" in path or "\0" in path or ":" in path:
        raise CheckpointError(f"{where}: {path!r} is not a file name.")
    expect_text(path, where, "a path")
    if any(part in {"", ".", ".."} for part in path.split("/")):
        raise CheckpointError(f"{where}: the path {path!r} leaves the checkpoint's directory.")
    return path


def _check_own_digest(text: str, body: Mapping[str, Any], where: str) -> None:
    if body["format_version"] == 1 and "digest" not in body:
        return
    ending = _ENDING.search(text, max(len(text) - 64, 0))
    if ending is None or ending.end() != len(text):
        raise CheckpointError(f"{where} is damaged: it does not end with its checksum.")
    found = digest_of(text[: ending.start()].encode(errors="surrogatepass"))
    if found != ending[1]:
        raise CheckpointError(
            f"{where} was changed after it was written, or is damaged: its checksum is {found}, it "
            f"says {ending[1]}. Copy it again, or use another checkpoint."
        )
    if body.get("checksums") != ALGORITHM:
        raise CheckpointError(
            f"{where} has checksums of the kind {body.get('checksums')!r}; known is {ALGORITHM!r}."
        )


def _digest(value: object, where: str, what: str) -> str:
    if not isinstance(value, str) or not is_digest(value):
        raise CheckpointError(f"{where}: {what} is {value!r}, not 32 hexadecimal digits.")
    return value


def _scalars(value: object, where: str) -> dict[str, dict[str, Scalar]]:
    scalars = expect(value, dict, where, "scalars")
    for name, kinds in scalars.items():
        for kind, scalar in expect(kinds, dict, where, f"scalars of {name!r}").items():
            if not isinstance(scalar, Scalar):
                raise CheckpointError(f"{where}: {kind} of {name} is not a number or a string.")
    return scalars


def _local(value: object, where: str) -> dict[int, str]:
    local = {}
    for rank, path in expect(value, dict, where, "local").items():
        if not _RANK.fullmatch(rank):
            raise CheckpointError(f"{where}: local has the rank {rank!r}.")
        local[int(rank)] = safe_path(path, where)
    return local
