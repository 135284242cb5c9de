"""Writing the `hf_speed/` half of a checkpoint: every rank its own pieces, the manifest last.

    hf_speed/state-001-rank00000-00000.safetensors     pieces of masters, moments, ...
    hf_speed/local-001-rank00000.safetensors           this rank's own tensors: RNG
    hf_speed/manifest.json                             what is where; names the save 001

Each is hashed while it is written, and the manifest lists its checksum, and those of the model.

A save numbers its files anew, so those of the save before stay as they are until the rename of the
manifest, which is the one moment at which the new save takes its place.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import hf_speed
from hf_speed.checkpoint.digest import FileRecord, digest_file
from hf_speed.checkpoint.held import Held
from hf_speed.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_PATH,
    STATE_DIRECTORY,
    Entry,
    Manifest,
    Piece,
    Scalar,
    entry_from_json,
    entry_to_json,
    merge_entries,
    record_from_json,
    record_to_json,
)
from hf_speed.checkpoint.paths import Home
from hf_speed.checkpoint.staging import agreed, check_visible, publish, staged
from hf_speed.checkpoint.strict_json import dump_json, load_json
from hf_speed.checkpoint.tensorfile import (
    TensorFile,
    TensorSpec,
    sync_directory,
    write_tensors,
    write_text,
)
from hf_speed.checkpoint.written import WrittenFiles
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup
from hf_speed.shard.reshard import flat_start
from hf_speed.shard.slicing import Run, Slicing, interval_runs

STAGING_NAME = ".staging"
GIB = 1 << 30

_OWN_FILE = re.compile(r"(state|local)-(\d+)-rank\d+(-\d+)?\.safetensors")
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)
"""What a Hub model or adapter consists of."""

_log = get_logger(__name__)


class _Staged(NamedTuple):
    """What one rank has written, as it tells rank 0."""

    entries: list[Entry]
    records: dict[str, FileRecord]


class LocalState(NamedTuple):
    """What this rank holds of one state tensor: an interval of it, or of this rank's slice of it.

    Attributes:
        name: fully qualified name of the parameter.
        kind: "master", "exp_avg", ...
        shape: of the full tensor.
        start: first element held, counted from the start of the flattened slice.
        numel: number of elements held.
        value: (numel,), on any device.
        slicing: how tensor-parallel ranks divide the full tensor; None: the slice is all of it.
        tp_rank: whose slice it is. Of stretches that several ranks hold, only the first holder's
            are written.
        held: of `value`, where that may change before it is written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    numel: int
    value: Tensor
    slicing: Slicing | None = None
    tp_rank: int = 0
    held: Held | None = None

    @contextmanager
    def reading(self) -> Iterator[Tensor]:
        """The value that the save began with; once."""
        with nullcontext(self.value) if self.held is None else self.held.reading() as value:
            yield value.contiguous()

    def runs(self) -> list[Run]:
        """Which boxes of the full tensor are written, and where their values stand in `value`.

        Raises:
            ValueError: the interval is not within the slice, or the slicing is of another shape.
        """
        return list(
            interval_runs(
                self.shape,
                self.start,
                self.numel,
                slicing=self.slicing,
                rank=self.tp_rank,
                counted_only=True,
            )
        )


class _Cut(NamedTuple):
    """A state, the boxes in which it is written, and the record of them: a piece for each run."""

    state: LocalState
    runs: list[Run]
    entry: Entry


def write_states(
    directory: str | Path,
    states: Iterable[LocalState],
    meta: Mapping[str, Any],
    *,
    world: AxisGroup,
    scalars: Mapping[str, Mapping[str, Scalar]] | None = None,
    local: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5 * GIB,
    written: WrittenFiles | None = None,
) -> None:
    """Write what a Hub model has no place for, as `directory`/hf_speed.

    Collective: every rank of `world` calls it. Three object all-gathers. The model's files in
    `directory` are listed in the manifest with their sizes and checksums, so save the model first.

    Args:
        directory: the checkpoint, on storage that all ranks share.
        states: this rank's intervals; over all ranks each state tensor exactly once. Consumed
            without collectives; values may be made as they are asked for, and at most
            `max_shard_bytes` of them (or one) are alive at once.
        meta: JSON of the run as a whole, taken from rank 0.
        world: the ranks that write.
        scalars: parameter name -> kind -> value, e.g. {"lm_head.weight": {"step": 7.0}}; of the
            parameters that this rank knows. Ranks that know one parameter must agree.
        local: this rank's own tensors, e.g. {"cpu_rng": uint8}.
        max_shard_bytes: size of a state file; a larger state gets one of its own.
        written: what `write_model` noted; the model's other files are read by rank 0.

    Raises:
        CheckpointError: on every rank; a rank could not write, or the states leave gaps, overlap or
            contradict each other. What was saved before is untouched.
    """
    directory = Path(directory)
    home = directory / STATE_DIRECTORY
    staging = home / STAGING_NAME
    what = f"Saving the training state to {home}"
    with staged(staging, world, what):
        with agreed(world, what):
            part = _stage_states(staging, states, world.rank, max_shard_bytes)
            local_name = None
            if local is not None:
                local_name = f"local-rank{world.rank:05d}.safetensors"
                record = write_tensors(staging / local_name, local)
                part.records[local_name] = record._replace(tensors={})
            body = {
                "entries": [entry_to_json(entry) for entry in part.entries],
                "scalars": scalars or {},
                "local": local_name,
                "files": _to_json(part.records),
                "model": _to_json(_known_files(directory, written)),
            }
            write_text(staging / _part_name(world.rank), dump_json(body, "Optimizer scalars"))
        with agreed(world, what):
            if world.rank == 0:
                _commit(directory, staging, meta, world.size)


def _stage_states(
    staging: Path, states: Iterable[LocalState], rank: int, max_shard_bytes: int
) -> _Staged:
    """Write this rank's pieces into files of at most max_shard_bytes; what is where."""
    done = _Staged([], {})
    pending: list[_Cut] = []
    keys: set[str] = set()
    nbytes = 0

    def file_name() -> str:
        return f"state-rank{rank:05d}-{len(done.records):05d}.safetensors"

    def write() -> None:
        # The file knows the digests of its own tensors, not of those in others.
        record = _write_file(staging / file_name(), pending)
        done.entries.extend(_with_digests(cut.entry, record) for cut in pending)
        done.records[file_name()] = record._replace(tensors={})

    for state in states:
        if keys and nbytes + state.value.nbytes > max_shard_bytes:
            write()
            pending, keys, nbytes = [], set(), 0
        cut = _cut(state, file_name())
        new = {piece.key for piece in cut.entry.pieces}
        if new & keys:
            label = cut.entry.label
            raise CheckpointError(f"Rank {rank} holds the same piece of the {label} twice.")
        pending.append(cut)
        keys |= new
        nbytes += state.value.nbytes
    if keys:
        write()
    else:
        done.entries.extend(cut.entry for cut in pending)
    return done


def _write_file(path: Path, cuts: list[_Cut]) -> FileRecord:
    """Write one state file; of values on other devices one at a time is on the host."""
    specs = [
        TensorSpec(piece.key, piece.extents, cut.entry.dtype)
        for cut in cuts
        for piece in cut.entry.pieces
    ]
    with TensorFile(path, specs) as file:
        for cut in cuts:
            with cut.state.reading() as value:
                for piece, run in zip(cut.entry.pieces, cut.runs, strict=True):
                    file.write(piece.key, run.view(value).cpu())
    return file.record


def _with_digests(entry: Entry, record: FileRecord) -> Entry:
    pieces = (piece._replace(digest=record.tensors[piece.key]) for piece in entry.pieces)
    return entry._replace(pieces=tuple(pieces))


def _cut(state: LocalState, file: str) -> _Cut:
    """The boxes of one interval, and the record of them."""
    label = f"{state.kind} of {state.name}"
    if state.value.dim() != 1 or state.value.numel() != state.numel:
        raise CheckpointError(
            f"The {label} has a value of shape {tuple(state.value.shape)}, not ({state.numel},)."
        )
    try:
        runs = state.runs()
    except ValueError as error:
        raise CheckpointError(f"The {label} does not fit: {error}") from error
    pieces = tuple(
        Piece(file, f"{state.kind}/{state.name}@{flat_start(state.shape, run.box)}", *run.box)
        for run in runs
    )
    entry = Entry(state.name, state.kind, state.shape, state.value.dtype, pieces)
    return _Cut(state, runs, entry)


def _commit(directory: Path, staging: Path, meta: Mapping[str, Any], world_size: int) -> None:
    """On rank 0: join the ranks' parts, publish the files, then the manifest, then clear up."""
    home = directory / STATE_DIRECTORY
    where = str(home)
    save = 1 + max((int(match[2]) for match in _own_files(home).values()), default=0)
    entries: list[Entry] = []
    scalars: dict[str, dict[str, Scalar]] = {}
    local: dict[int, str] = {}
    staged_files: dict[str, FileRecord] = {}
    model: dict[str, FileRecord] = {}
    for rank in range(world_size):
        check_visible(staging, [_part_name(rank)])
        part = load_json((staging / _part_name(rank)).read_text(encoding="utf-8"), where)
        for value in part["entries"]:
            entry = entry_from_json(value, where=where)
            pieces = (piece._replace(file=_final_path(piece.file, save)) for piece in entry.pieces)
            entries.append(entry._replace(pieces=tuple(pieces)))
        _merge_scalars(scalars, part["scalars"], rank)
        staged_files |= _from_json(part["files"], where)
        model |= _from_json(part["model"], where)
        if part["local"] is not None:
            local[rank] = _final_path(part["local"], save)
    check_visible(staging, staged_files)
    files = {
        path.name: model[path.name] if path.name in model else digest_file(path)
        for path in _model_files(directory)
    }
    files |= {_final_path(name, save): record for name, record in staged_files.items()}
    merged = merge_entries(entries, where=where)
    manifest = Manifest(
        world_size, meta, scalars, files, merged, local, package_version=hf_speed.__version__
    )
    text = manifest.to_json()
    # What could not be read again must not take the place of what can.
    Manifest.from_json(text, where=where)
    write_text(staging / "manifest.json", text)
    publish(staging, home, {name: _numbered(name, save) for name in staged_files})
    (staging / "manifest.json").replace(directory / MANIFEST_PATH)
    sync_directory(home)
    for path, match in _own_files(home).items():
        if int(match[2]) != save:
            path.unlink()


def _to_json(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: record_to_json(record) for name, record in records.items()}


def _from_json(value: Mapping[str, Any], where: str) -> dict[str, FileRecord]:
    return {name: record_from_json(each, FORMAT_VERSION, where) for name, each in value.items()}


def _known_files(directory: Path, written: WrittenFiles | None) -> dict[str, FileRecord]:
    """The model's files that this rank wrote itself."""
    found = {} if written is None else {p.name: written.record(p) for p in _model_files(directory)}
    return {name: record for name, record in found.items() if record is not None}


def _merge_scalars(
    into: dict[str, dict[str, Scalar]], part: Mapping[str, Mapping[str, Scalar]], rank: int
) -> None:
    for name, kinds in part.items():
        known = into.setdefault(name, {})
        for kind, value in kinds.items():
            if known.setdefault(kind, value) != value:
                raise CheckpointError(
                    f"Rank {rank} has {kind}={value} for {name} where another has {known[kind]}."
                )


def _part_name(rank: int) -> str:
    return f"part-rank{rank:05d}.json"


def _final_path(staged_name: str, save: int) -> str:
    return f"{STATE_DIRECTORY}/{_numbered(staged_name, save)}"


def _numbered(staged_name: str, save: int) -> str:
    """A staged name with the number of the save: state-rank00000 -> state-003-rank00000."""
    kind, rest = staged_name.split("-", 1)
    return f"{kind}-{save:03d}-{rest}"


def _own_files(home: Path) -> dict[Path, re.Match[str]]:
    """The state files of all saves in a directory."""
    matches = ((path, _OWN_FILE.fullmatch(path.name)) for path in home.iterdir())
    return {path: match for path, match in matches if match is not None}


def _model_files(directory: Path) -> list[Path]:
    """The model's files, without links to files elsewhere, for which nobody can vouch."""
    home = Home(directory)
    found = {path for pattern in _MODEL_FILES for path in directory.glob(pattern)}
    links = {path for path in found if not home.owns(path.name)}
    for path in sorted(links):
        _log.warning(
            "%s is a link out of the checkpoint: the manifest does not list it, so nothing will "
            "notice if what it points to is changed. Copy the file in its place.",
            path,
        )
    return sorted(found - links)
