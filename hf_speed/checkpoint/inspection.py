"""Everything that can be found wrong with a checkpoint on disk: `hf-speed inspect`.

    manifest        its own checksum, types, paths, boxes (manifest.py)
    each file       there, of its size; header; the tensors that the manifest says, and no others
    each tensor     dtype, shape, checksum
    the index       every weight in the file that it names, every file listed

Nothing stops at the first fault: all bad files are named.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_speed.checkpoint.digest import Progress
from hf_speed.checkpoint.header import DTYPE_CODES
from hf_speed.checkpoint.manifest import MANIFEST_PATH, STATE_DIRECTORY, Entry, Manifest, Piece
from hf_speed.checkpoint.paths import Home
from hf_speed.checkpoint.plan import INDEX_NAME
from hf_speed.checkpoint.reader import contents, file_problem, no_manifest_reason, parse_manifest
from hf_speed.checkpoint.strict_json import load_json
from hf_speed.checkpoint.verify import OpenFile
from hf_speed.errors import CheckpointError

Expected = dict[str, tuple[Entry, Piece]]
"""Key -> what the manifest says is under it."""


SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class Problem(NamedTuple):
    """A file that is not what was saved, relative to the checkpoint, and why."""

    file: str
    text: str


class Inspection(NamedTuple):
    """What was found.

    Attributes:
        directory: of the checkpoint, or its address.
        manifest: what it says of itself; None where that cannot be read.
        problems: in the order of the manifest; none: it is whole.
        notes: files that do not belong to it, and what could not be checked.
        has_checksums: False where only sizes and headers were compared.
    """

    directory: Path | str
    manifest: Manifest | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    has_checksums: bool

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def find_checkpoints(directory: str | Path) -> list[Path]:
    """`directory` itself, or the checkpoints in it: those of a run, or of several models.

    Raises:
        CheckpointError: there is none.
    """
    home = Path(directory)
    if (home / STATE_DIRECTORY).is_dir():
        return [home]
    children = home.iterdir() if home.is_dir() else ()
    found = [path for path in children if (path / STATE_DIRECTORY).is_dir()]
    if not found:
        raise CheckpointError(no_manifest_reason(home))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def inspect_checkpoint(
    directory: str | Path, *, fast: bool = False, progress: Progress | None = None
) -> Inspection:
    """Compare a checkpoint with its manifest.

    Args:
        directory: with hf_speed/ in it.
        fast: compare sizes and headers; read no tensor.
        progress: told of every 8 MiB that have been read.
    """
    home = Home(Path(directory))
    try:
        manifest = parse_manifest(home.directory)
    except CheckpointError as error:
        first = Problem(MANIFEST_PATH, _about(home, MANIFEST_PATH, str(error)))
        return Inspection(
            home.directory,
            manifest=None,
            problems=(first, *_index_problems(home, None)),
            notes=tuple(_notes(home, None)),
            has_checksums=False,
        )
    reads = not fast and manifest.has_checksums
    inspector = _Inspector(home, manifest, progress if reads else None, reads=reads)
    problems = tuple(
        Problem(name, _about(home, name, text))
        for name in manifest.files
        for text in inspector.problems_of(name)
    )
    # A damaged index accuses files that are as they were.
    if all(problem.file != INDEX_NAME for problem in problems):
        problems += tuple(_index_problems(home, manifest))
    return Inspection(home.directory, manifest, problems, tuple(_notes(home, manifest)), reads)


class _Inspector:
    def __init__(
        self, home: Home, manifest: Manifest, progress: Progress | None, *, reads: bool
    ) -> None:
        self._home = home
        self._manifest = manifest
        self._progress = progress
        self._reads = reads
        self._pieces: dict[str, Expected] = {}
        for entry in manifest.entries:
            for piece in entry.pieces:
                self._pieces.setdefault(piece.file, {})[piece.key] = entry, piece

    def problems_of(self, name: str) -> Iterator[str]:
        """Everything that is wrong with one file."""
        try:
            problem = file_problem(self._home, self._manifest, name)
            if problem is not None:
                yield problem
            elif name.endswith(".safetensors"):
                with OpenFile(self._home.directory / name) as file:
                    yield from self._problems_in(name, file)
        except CheckpointError as error:
            yield f"{error} It holds {contents(self._manifest, name)}."

    def _problems_in(self, name: str, file: OpenFile) -> Iterator[str]:
        record = self._manifest.files[name]
        pieces = self._pieces.get(name, {})
        digests = {key: piece.digest for key, (_, piece) in pieces.items()} | dict(record.tensors)
        is_local = name in self._manifest.local.values()
        # A rank's own tensors are listed by the checksum of their file alone.
        wanted = file.header.spans.keys() if is_local or not digests else digests.keys()
        for key in sorted(wanted - file.header.spans.keys()):
            yield f"it lacks {_label(key, pieces)}."
        for key in sorted(file.header.spans.keys() - wanted):
            yield f"it has {key!r}, which the manifest does not know."
        for key in sorted(wanted & file.header.spans.keys()):
            yield from self._problems_with(key, file, pieces)
        if self._reads:
            yield from self._wrong_bytes(name, file, digests, pieces)

    def _problems_with(self, key: str, file: OpenFile, pieces: Expected) -> Iterator[str]:
        span = file.header.spans[key]
        if key in pieces:
            entry, piece = pieces[key]
            code = DTYPE_CODES[entry.dtype]
            if (span.shape, span.code) != (piece.extents, code):
                yield (
                    f"it has {_label(key, pieces)} as {span.shape} {span.code}; the manifest says "
                    f"{piece.extents} {code}."
                )

    def _wrong_bytes(
        self, name: str, file: OpenFile, digests: dict[str, str | None], pieces: Expected
    ) -> Iterator[str]:
        found = file.digests(self._progress)
        wrong = [key for key in found.tensors if found.tensors[key] != digests.get(key)]
        for key in wrong if digests else ():
            if key in digests:
                span = file.header.spans[key]
                yield (
                    f"{_label(key, pieces)} is damaged (bytes {span.begin} to {span.end}): its "
                    f"checksum is {found.tensors[key]}, that of the save was {digests[key]}."
                )
        expected = self._manifest.files[name].digest
        if found.digest != expected and not (wrong and digests):
            part = "its header" if digests else "it"
            yield f"{part} is damaged: its checksum is {found.digest}, not {expected}."


def _about(home: Home, name: str, text: str) -> str:
    """A message without the path with which it begins."""
    path = str(home.directory / name)
    return text.removeprefix(path).lstrip(": ") if text.startswith(path) else text


def _label(key: str, pieces: Expected) -> str:
    return f"the {pieces[key][0].label} ({key!r})" if key in pieces else repr(key)


def _index_problems(home: Home, manifest: Manifest | None) -> Iterator[Problem]:
    """Whether the weights that the index promises are there, and no file is without its index."""
    listed = None if manifest is None else manifest.files
    shards = {path.name for path in home.directory.glob("model-*-of-*.safetensors")}
    index = home.directory / INDEX_NAME
    if not index.is_file():
        if shards:
            yield Problem(INDEX_NAME, f"it is missing; {len(shards)} files of weights need it.")
        return
    try:
        weight_map = _weight_map(index)
    except CheckpointError as error:
        yield Problem(INDEX_NAME, _about(home, INDEX_NAME, str(error)))
        return
    for file in sorted(set(weight_map.values())):
        try:
            yield from _file_of_index(home, file, weight_map, listed)
        except CheckpointError as error:
            if listed is None:  # Else it has been named before.
                yield Problem(file, _about(home, file, str(error)))
    if listed is not None:
        for file in sorted(listed):
            if SHARD_NAME.fullmatch(file) and file not in weight_map.values():
                yield Problem(file, "the index puts no weight there.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        body: Any = load_json(index.read_text(encoding="utf-8"), str(index))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}.") from error
    weight_map = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("it has no weight_map.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"it names the file {file!r}, which is not beside it.")
    return weight_map


def _file_of_index(
    home: Home, file: str, weight_map: dict[str, str], listed: Any
) -> Iterator[Problem]:
    if listed is not None and file not in listed:
        yield Problem(file, "the index names it, but the manifest does not list it.")
    if home.size_of(file) is None:
        if listed is None or file not in listed:
            yield Problem(file, "it is missing; the index names it.")
        return
    with OpenFile(home.directory / file) as opened:
        there = opened.header.spans.keys()
    promised = {name for name, each in weight_map.items() if each == file}
    for name in sorted(promised - there):
        yield Problem(file, f"it lacks {name!r}, which the index puts there.")
    for name in sorted(there - promised):
        yield Problem(file, f"it has {name!r}, which the index does not put there.")


def _notes(home: Home, manifest: Manifest | None) -> Iterator[str]:
    """Files of saves that were cut short, which nobody reads, and what cannot be checked."""
    if manifest is not None and not manifest.has_checksums:
        yield "it was written before checkpoints had checksums, so contents cannot be verified."
    for name in _names_in(home.directory / STATE_DIRECTORY):
        path = f"{STATE_DIRECTORY}/{name}"
        if manifest is not None and path != MANIFEST_PATH and path not in manifest.files:
            yield f"{path} does not belong to it: left by a save that was cut short."


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError:
        return []
