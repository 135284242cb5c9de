"""Reading the `hf_speed/` half of a checkpoint from any mesh.

A reader asks for an interval of a flattened tensor, or of its own slice of one; it comes from
whichever pieces hold it, through memory maps, so nothing but what is asked for is copied. A piece
is read through once, when it is first touched, to see that it has the checksum of the manifest.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from hf_speed.checkpoint.digest import digest_file, digest_of, tree_digest
from hf_speed.checkpoint.header import DTYPE_CODES
from hf_speed.checkpoint.manifest import MANIFEST_PATH, Entry, Manifest, Piece, Scalar
from hf_speed.checkpoint.mapped import MappedFile
from hf_speed.checkpoint.paths import Home
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.shard.reshard import Box, intersect
from hf_speed.shard.slicing import Slicing, interval_runs

_MAX_OPEN_FILES = 64

_MAX_MANIFEST_BYTES = 2 << 30
"""Some ten times what a model of 10^12 parameters on 1000 ranks needs."""

_HUB_TEXTS = frozenset(("config.json", "generation_config.json", "adapter_config.json"))
"""What describes the Hub model to its users. People edit these, and no state is read by them."""

_log = get_logger(__name__)


def read_manifest(directory: str | Path, *, is_strict: bool = False) -> Manifest:
    """The manifest of a whole checkpoint.

    Sizes of all files are checked, and the contents of those that are not tensors (config.json, the
    index), which are small. Tensors are checked where they are read.

    Args:
        directory: of the checkpoint.
        is_strict: refuse also a config.json (generation_config.json, adapter_config.json) that
            somebody has edited; otherwise a warning names it. One that is no JSON is damaged.

    Raises:
        CheckpointError: there is none (an unfinished save, or no checkpoint), it is damaged, or a
            file that it lists is missing or has another size or content.
    """
    directory = Path(directory)
    manifest = parse_manifest(directory)
    home = Home(directory)
    for name in manifest.files:
        problem = file_problem(home, manifest, name)
        if problem is None:
            continue
        is_edited = Path(name).name in _HUB_TEXTS and _is_object(directory / name)
        if is_strict or not is_edited:
            raise CheckpointError(
                f"{problem} The checkpoint is not whole: copy the file again, or use another "
                f"checkpoint."
            )
        _log.log_once(
            logging.WARNING,
            "%s The training goes on, since its state is as it was saved. Copy the file again if "
            "nobody has edited it.",
            problem,
        )
    return manifest


def _is_object(path: Path) -> bool:
    """Whether a file holds a JSON object. Some models' configs hold infinities."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def parse_manifest(directory: Path) -> Manifest:
    """The manifest alone, whatever has become of the files that it lists.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / MANIFEST_PATH
    try:
        size = Home(directory).size_of(MANIFEST_PATH)
        if size is None:
            raise CheckpointError(no_manifest_reason(directory))
        if size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes, more than any manifest ({_MAX_MANIFEST_BYTES})."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read: {error}.") from error
    manifest = Manifest.from_json(text, where=str(path))
    if not manifest.has_checksums:
        _log.log_once(
            logging.INFO,
            "%s was written by hf_speed %s, before checkpoints had checksums: sizes are checked, "
            "contents are not. The next save has them.",
            path,
            manifest.package_version,
        )
    return manifest


def file_problem(home: Home, manifest: Manifest, name: str) -> str | None:
    """Why a listed file is not what was saved, as far as that shows without reading tensors.

    None where all is well.
    """
    record, file = manifest.files[name], home.directory / name
    found = home.size_of(name)
    if found != record.nbytes:
        state = "is missing" if found is None else f"has {found} bytes instead of {record.nbytes}"
    elif record.digest is None or file.suffix == ".safetensors":
        return None
    elif (digest := digest_file(file).digest) != record.digest:
        state = f"was changed: its checksum is {digest}, that of the save was {record.digest}"
    else:
        return None
    return f"{file} {state}; it holds {contents(manifest, name)}."


class StateReader:
    """The training state in a checkpoint. Use as a context manager, or `close()`."""

    def __init__(self, directory: str | Path) -> None:
        """Check that the checkpoint is whole.

        Raises:
            CheckpointError: see `read_manifest`.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self._entries = {(entry.name, entry.kind): entry for entry in self.manifest.entries}
        self._kinds: dict[str, tuple[str, ...]] = {}
        self._piece_digests: dict[str, dict[str, str | None]] = {}
        for entry in self.manifest.entries:
            self._kinds[entry.name] = (*self._kinds.get(entry.name, ()), entry.kind)
            for piece in entry.pieces:
                self._piece_digests.setdefault(piece.file, {})[piece.key] = piece.digest
        self._whole_headers: set[str] = set()
        self._open: OrderedDict[str, MappedFile] = OrderedDict()

    @property
    def where(self) -> str:
        """The manifest's path, for messages."""
        return str(self.directory / MANIFEST_PATH)

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the engine said of the run."""
        return self.manifest.meta

    @property
    def scalars(self) -> Mapping[str, Mapping[str, Scalar]]:
        """Parameter name -> kind -> value."""
        return self.manifest.scalars

    def shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Full shape of one tensor; None where nothing is stored."""
        entry = self._entries.get((name, kind))
        return None if entry is None else entry.shape

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor of one kind, by parameter name."""
        return {entry.name: entry.shape for entry in self.manifest.entries if entry.kind == kind}

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is stored for one parameter, sorted; empty where nothing is."""
        return self._kinds.get(name, ())

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, kind: str) -> None:
        """Check that the checkpoint is of a model whose `kind` tensors have these names and shapes.

        Raises:
            CheckpointError: of another model; names the first differences.
        """
        stored = self.shapes(kind)
        absent = sorted(shapes.keys() - stored.keys())
        extra = sorted(stored.keys() - shapes.keys())
        differing = [
            f"{name} is {stored[name]} there and {tuple(shapes[name])} here"
            for name in sorted(shapes.keys() & stored.keys())
            if stored[name] != tuple(shapes[name])
        ]
        problems = differing[:3]
        if absent:
            close = get_close_matches(absent[0], extra, n=1)
            hint = f" (nearest there: {close[0]})" if close else ""
            problems.append(f"{len(absent)} are not there, first {absent[0]}{hint}")
        if extra:
            problems.append(f"{len(extra)} are only there, first {extra[0]}")
        if problems:
            raise CheckpointError(
                f"{self.directory / MANIFEST_PATH} is of another model. Of its {len(stored)} "
                f"{kind} tensors: {'; '.join(problems)}. Resume with the model and the trainable "
                f"parameters that it was saved from."
            )

    def read(
        self,
        name: str,
        kind: str,
        start: int,
        numel: int,
        *,
        slicing: Slicing | None = None,
        tp_rank: int = 0,
    ) -> Tensor | None:
        """[start, start + numel) of the flattened tensor, on the CPU, in the stored dtype.

        Args:
            name: of the parameter.
            kind: "master", "exp_avg", ...
            start: first element.
            numel: number of elements.
            slicing: how tensor-parallel ranks divide the tensor here, however it was divided when
                it was written. Then the interval is of the slice that `tp_rank` holds, flattened.
            tp_rank: whose slice it is.

        Returns:
            (numel,), owned by the caller; None where nothing is stored under this name and kind.

        Raises:
            CheckpointError: the interval is not within the stored tensor, the slicing is of another
                shape, or a file is damaged.
        """
        entry = self._entries.get((name, kind))
        if entry is None:
            return None
        try:
            runs = list(interval_runs(entry.shape, start, numel, slicing=slicing, rank=tp_rank))
        except ValueError as error:
            raise CheckpointError(
                f"{self.directory / MANIFEST_PATH} is of another model: the {entry.label}: {error}"
            ) from error
        out = torch.empty(numel, dtype=entry.dtype)
        for run in runs:
            self._fill(run.view(out), run.box, entry)
        return out

    def local(self, rank: int) -> dict[str, Tensor]:
        """The tensors that `rank` stored for itself; empty where it stored none.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self.manifest.local.get(rank)
        if file is None:
            return {}
        holds = f"what rank {rank} stored for itself"
        expected = self.manifest.files[file].digest
        if expected is not None:
            found = digest_file(self.directory / file).digest
            if found != expected:
                raise CheckpointError(
                    f"{self.directory / file} is damaged; it holds {holds}: its checksum is "
                    f"{found}, that of the save was {expected}. Copy the file again, or use "
                    f"another checkpoint."
                )
        mapped = self._file(file, holds)
        return {key: mapped.tensor(key, holds, None).clone() for key in mapped.header.spans}

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def __enter__(self) -> Self:
        """Nothing to do: files are opened as they are needed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _fill(self, view: Tensor, wanted: Box, entry: Entry) -> None:
        """Copy the box `wanted` of the entry from its pieces into `view`."""
        for piece in entry.pieces:
            common = intersect(wanted, piece.box)
            if common is not None:
                value = self._slice(piece, common, entry)
                view[common.slices(wanted.offsets)].copy_(value)

    def _slice(self, piece: Piece, box: Box, entry: Entry) -> Tensor:
        holds = f"the {entry.label}"
        file = self._file(piece.file, holds)
        span = file.span(piece.key, holds)
        expected = piece.extents, DTYPE_CODES[entry.dtype]
        if (span.shape, span.code) != expected:
            raise CheckpointError(
                f"{file.path} holds {holds} as {span.shape} {span.code}; the manifest says "
                f"{expected[0]} {expected[1]}."
            )
        value = file.tensor(piece.key, holds, piece.digest)
        self._check_header(piece.file, file, holds)
        return value[box.slices(piece.offsets)]

    def _file(self, file: str, holds: str) -> MappedFile:
        """A mapped file; the least recently used is unmapped when there are many."""
        if file not in self._open:
            try:
                self._open[file] = MappedFile(self.directory / file)
            except CheckpointError as error:
                raise CheckpointError(f"{error} It holds {holds}.") from error
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]

    def _check_header(self, file: str, mapped: MappedFile, holds: str) -> None:
        """Compare a header with its file's checksum, which those of the pieces make up with it."""
        expected = self.manifest.files[file].digest
        if expected is None or file in self._whole_headers:
            return
        known = self._piece_digests[file]
        digests = [known.get(key) for key in mapped.header.spans]
        whole = [each for each in digests if each is not None]
        header = digest_of(mapped.header.raw)
        if len(whole) < len(digests) or tree_digest(header, whole) != expected:
            raise CheckpointError(
                f"{mapped.path} is damaged in its header; it holds {holds}. Copy the file again, "
                f"or use another checkpoint."
            )
        self._whole_headers.add(file)


def no_manifest_reason(directory: Path) -> str:
    """Why there is no manifest, for messages."""
    if not directory.is_dir():
        return f"{directory} is not a directory, so there is no checkpoint to read."
    if (directory / MANIFEST_PATH).parent.is_dir():
        return (
            f"{directory} was not saved to the end: {MANIFEST_PATH}, which is written last, is not "
            f"there. Use an earlier checkpoint."
        )
    return (
        f"{directory} holds no hf_speed training state ({MANIFEST_PATH} is not there): it is a "
        f"model, not a checkpoint to resume from, or was saved by another backend."
    )


def contents(manifest: Manifest, file: str) -> str:
    """What a file holds, for messages."""
    labels = [
        entry.label
        for entry in manifest.entries
        if any(piece.file == file for piece in entry.pieces)
    ]
    if labels:
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        return f"the {labels[0]}{more}"
    ranks = [rank for rank, path in manifest.local.items() if path == file]
    if ranks:
        return f"what rank {ranks[0]} stored for itself"
    return "weights of the model" if file.endswith(".safetensors") else "what describes the model"
