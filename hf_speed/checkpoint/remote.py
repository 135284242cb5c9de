"""Checkpoints in remote stores.

    up      files, by all ranks -> hf_speed/mirror.json -> hf_speed/manifest.json -> latest
    down    manifest -> files, by all ranks, each against its checksum -> rename

A store has no rename, so the order is the proof: a checkpoint without what is uploaded last is
refused. mirror.json lists what the manifest does not: the Trainer's own files.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hf_speed.checkpoint.digest import FileRecord, digest_file
from hf_speed.checkpoint.inspection import Inspection, Problem
from hf_speed.checkpoint.manifest import (
    MANIFEST_PATH,
    STATE_DIRECTORY,
    Manifest,
    record_from_json,
    record_to_json,
    safe_path,
)
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.stores import Store, is_url, join_url, shown
from hf_speed.checkpoint.strict_json import dump_json, expect, load_json
from hf_speed.config import ResolvedConfig
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import gather_objects

MIRROR_PATH = f"{STATE_DIRECTORY}/mirror.json"
LATEST_NAME = "latest"

_FORMAT_VERSION = 2
_REFUSED = "What is in the store is refused until it is uploaded again."


class RemoteFiles(NamedTuple):
    """What is to be downloaded.

    Attributes:
        records: name -> size and checksum (None where nobody has noted it).
        closing: texts that come last, in order.
        sizes: of what is there.
    """

    records: Mapping[str, FileRecord]
    closing: Mapping[str, str]
    sizes: Mapping[str, int]

    def problem(self, name: str) -> str | None:
        """Why a file cannot be what was saved; None where its size is right."""
        size, wanted = self.sizes.get(name), self.records[name].nbytes
        if size == wanted:
            return None
        return f"{'is missing' if size is None else f'has {size} bytes'}; {wanted} were saved"


# ---- up ----


def mirror_of(
    config: ResolvedConfig, world: AxisGroup, *, name: str | None = None
) -> Callable[[Path], object] | None:
    """What copies a finished checkpoint where `checkpoint.mirror` says; None where it says nothing.

    Args:
        config: of the run.
        world: the ranks that will call it together.
        name: of the checkpoint there; None: that of its directory.
    """
    if config.mirror is None:
        return None
    return partial(mirror_checkpoint, url=config.mirror, world=world, name=name)


def mirror_checkpoint(
    directory: Path, *, url: str, world: AxisGroup, name: str | None = None
) -> None:
    """Upload a finished checkpoint as `url`/`name`, then let `url`/latest name it. Collective.

    Args:
        directory: of the checkpoint, on storage that all ranks share.
        url: of the run.
        world: the ranks that upload.
        name: of the checkpoint there; None: that of its directory.

    Raises:
        CheckpointError: on every rank; see `upload`. `latest` names what it named before.
    """
    name = directory.name if name is None else name
    upload(directory, join_url(url, name), world=world)
    with agreed(world, f"Naming the newest checkpoint in {shown(url)}"):
        if world.rank == 0:
            Store(url).write(LATEST_NAME, f"{name}\n")


def upload(directory: Path, url: str, *, world: AxisGroup) -> None:
    """Upload a checkpoint from all ranks, what makes it whole last. Collective.

    Every file is compared with the manifest's checksum before it leaves. Files that the store has
    under other names stay there.

    Args:
        directory: a whole checkpoint, on storage that all ranks share.
        url: of the checkpoint, not of its run.
        world: the ranks that upload.

    Raises:
        CheckpointError: on every rank; one could not read or upload. The checkpoint in the store is
            refused then.
    """
    what = f"Uploading {directory} to {shown(url)}"
    mine: dict[str, FileRecord] = {}
    with agreed(world, what, left=_REFUSED):
        store = Store(url)
        manifest = _local_manifest(directory)
        if world.rank == 0:
            # What is there stops being a checkpoint before the first of its files changes.
            store.remove(MANIFEST_PATH)
            store.write(MIRROR_PATH, _mirror_json({}, has_manifest=True))
    names = gather_objects(_files_of(directory) if world.rank == 0 else [], group=world)[0]
    with agreed(world, what, left=_REFUSED):
        for name in share(names, world):
            mine[name] = _send(store, directory, name, manifest)
    records: dict[str, FileRecord] = {}
    for part in gather_objects(mine, group=world):
        records |= part
    with agreed(world, what, left=_REFUSED):
        if world.rank == 0:
            listed = {} if manifest is None else manifest.files
            others = {name: record for name, record in records.items() if name not in listed}
            store.write(MIRROR_PATH, _mirror_json(others, has_manifest=manifest is not None))
            if manifest is not None:
                store.put(directory / MANIFEST_PATH, MANIFEST_PATH)


def share(sizes: list[tuple[str, int]], world: AxisGroup) -> list[str]:
    """Which files are this rank's: the largest first, each to the rank with the fewest bytes."""
    loads = [0] * world.size
    mine = []
    for name, size in sorted(sizes, key=lambda each: (-each[1], each[0])):
        rank = loads.index(min(loads))
        # One more: small files cost a request each.
        loads[rank] += size + (1 << 16)
        if rank == world.rank:
            mine.append(name)
    return mine


def _local_manifest(directory: Path) -> Manifest | None:
    path = directory / MANIFEST_PATH
    if not path.is_file():
        return None
    return Manifest.from_json(path.read_text(encoding="utf-8"), where=str(path))


def _files_of(directory: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what is uploaded before the closing files; nothing hidden."""
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if path.is_file() and not hidden and name not in (MANIFEST_PATH, MIRROR_PATH):
            found.append((name, path.stat().st_size))
    return found


def _send(store: Store, directory: Path, name: str, manifest: Manifest | None) -> FileRecord:
    record = digest_file(directory / name)
    known = None if manifest is None else manifest.files.get(name)
    if known is not None and known.digest not in (None, record.digest):
        raise CheckpointError(
            f"{directory / name} is damaged: it has another checksum than the manifest says. It "
            f"is not uploaded; save again."
        )
    store.put(directory / name, name)
    return FileRecord(record.nbytes, record.digest)


def _mirror_json(records: Mapping[str, FileRecord], *, has_manifest: bool) -> str:
    body = {
        "format_version": _FORMAT_VERSION,
        "has_manifest": has_manifest,
        "files": {name: record_to_json(records[name]) for name in sorted(records)},
    }
    return dump_json(body, "The list of uploaded files", indent=2) + "\n"


# ---- down ----


def newest_url(url: str) -> str:
    """The checkpoint in the store that an address means: itself, or the newest of a run.

    Raises:
        CheckpointError: `latest` there names no checkpoint of this run.
        ConfigError: no address, or its backend is not installed.
    """
    store = Store(url)
    text = store.read(LATEST_NAME)
    if text is None or store.read(MANIFEST_PATH) is not None:
        return url
    name = text.strip()
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise CheckpointError(f"{store.shown}/{LATEST_NAME} names no checkpoint: {name[:100]!r}.")
    return join_url(url, name)


def download(url: str, directory: Path, *, world: AxisGroup) -> None:
    """Download a checkpoint, or a plain model, from all ranks; it appears whole. Collective.

    Every file is compared with its checksum, where one was noted. Nothing is downloaded where
    `directory` is the same checkpoint already.

    Args:
        url: of the checkpoint, see `newest_url`.
        directory: where to, on storage that all ranks share; absent, or the same checkpoint.
        world: the ranks that download.

    Raises:
        CheckpointError: on every rank; it was not uploaded to the end, is damaged, or `directory`
            is something else. `directory` is as it was.
    """
    what = f"Downloading {shown(url)} to {directory}"
    staging = directory.with_name(f".{directory.name}.download")
    files = RemoteFiles({}, {}, {})
    with agreed(world, what, left=f"{directory} is as it was."):
        store = Store(url)
        if world.rank == 0:
            files = remote_files(store)
            _require_whole(files, store)
            _require_absent(directory, files, store)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    # Checksums of single tensors are many, and each file has its own.
    records = {name: each._replace(tensors={}) for name, each in files.records.items()}
    records, is_there = gather_objects((records, directory.exists()), group=world)[0]
    try:
        with agreed(world, what, left=f"{directory} is as it was."):
            sizes = [(name, record.nbytes) for name, record in records.items()]
            for name in share([] if is_there else sizes, world):
                fetch_file(store, name, records[name], staging / name)
        with agreed(world, what, left=f"{directory} is as it was."):
            if world.rank == 0 and not is_there:
                for name, text in files.closing.items():
                    (staging / name).parent.mkdir(parents=True, exist_ok=True)
                    (staging / name).write_text(text, encoding="utf-8")
                staging.replace(directory)
    finally:
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def localized(place: str, room: Path | None = None) -> Iterator[Path]:
    """A directory with what is at an address, while the block runs; a path is given as it is.

    Args:
        place: a path, or an address of a checkpoint, a run or a plain model.
        room: the directory in which a temporary one is made; None: the system's.

    Raises:
        CheckpointError: see `download`.
    """
    if not is_url(place):
        yield Path(place)
        return
    if room is not None:
        room.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".hf_speed-", dir=room) as scratch:
        url = newest_url(place)
        home = Path(scratch) / (PurePosixPath(url).name or "model")
        download(url, home, world=IDENTITY)
        yield home


def remote_files(store: Store) -> RemoteFiles:
    """What a checkpoint or a plain model in a store consists of.

    Raises:
        CheckpointError: it was not uploaded to the end, or there is nothing.
    """
    manifest_text, mirror_text = store.read(MANIFEST_PATH), store.read(MIRROR_PATH)
    records: dict[str, FileRecord] = {}
    closing = {}
    expects_manifest = False
    if mirror_text is not None:
        others, expects_manifest = _read_mirror(mirror_text, f"{store.shown}/{MIRROR_PATH}")
        records |= others
    if manifest_text is not None:
        where = f"{store.shown}/{MANIFEST_PATH}"
        records |= Manifest.from_json(manifest_text, where=where).files
        closing[MANIFEST_PATH] = manifest_text
    sizes = store.sizes()
    begun = any(name.startswith(f"{STATE_DIRECTORY}/") for name in sizes)
    if manifest_text is None and (expects_manifest or (begun and mirror_text is None)):
        raise CheckpointError(
            f"{store.shown} was not uploaded to the end: what is uploaded last is not there. Use "
            f"an earlier checkpoint."
        )
    if not sizes:
        raise CheckpointError(f"{store.shown} holds no file: there is no checkpoint to read.")
    if mirror_text is None:
        # Copied there by other means: what nobody has listed is taken as it is.
        records = {
            safe_path(name, store.shown): FileRecord(size)
            for name, size in sizes.items()
            if name not in (MANIFEST_PATH, LATEST_NAME)
        } | records
    return RemoteFiles(records, closing, sizes)


def inspect_remote(url: str, *, fast: bool) -> Inspection:
    """Compare a checkpoint in a store with its manifest, file by file.

    Args:
        url: of the checkpoint.
        fast: compare sizes; download nothing but the manifest.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: no address, or its backend is not installed.
    """
    store = Store(url)
    if not any(name.startswith(f"{STATE_DIRECTORY}/") for name in store.sizes()):
        raise CheckpointError(f"{store.shown} holds no {MANIFEST_PATH}: it is no checkpoint.")
    try:
        files = remote_files(store)
    except CheckpointError as error:
        problem = Problem(MANIFEST_PATH, str(error))
        return Inspection(store.shown, None, (problem,), (), has_checksums=False)
    problems = []
    with TemporaryDirectory(prefix="hf_speed-") as scratch:
        local = Path(scratch) / "file"
        for name, record in files.records.items():
            text = files.problem(name)
            if text is None and not fast:
                try:
                    fetch_file(store, name, record, local.with_suffix(Path(name).suffix))
                except CheckpointError as error:
                    text = str(error).removeprefix(f"{store.shown}/{name} ")
            if text is not None:
                problems.append(Problem(name, text))
    manifest = None
    if MANIFEST_PATH in files.closing:
        manifest = Manifest.from_json(files.closing[MANIFEST_PATH], where=store.shown)
    return Inspection(store.shown, manifest, tuple(problems), (), has_checksums=not fast)


def fetch_file(store: Store, name: str, record: FileRecord, local: Path) -> None:
    """Download one file and compare it with what is known of it.

    Raises:
        CheckpointError: it is another.
    """
    store.get(name, local)
    if local.stat().st_size != record.nbytes:
        raise CheckpointError(
            f"{store.shown}/{name} came with {local.stat().st_size} bytes of {record.nbytes}."
        )
    if record.digest is not None and digest_file(local).digest != record.digest:
        raise CheckpointError(
            f"{store.shown}/{name} is damaged: it has another checksum than what was saved. Upload "
            f"the file again, or use another checkpoint."
        )


def _read_mirror(text: str, where: str) -> tuple[dict[str, FileRecord], bool]:
    body = expect(load_json(text, where), dict, where, "the list")
    if body.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format_version {body.get('format_version')!r}; this hf_speed reads "
            f"{_FORMAT_VERSION}."
        )
    listed = expect(body.get("files"), dict, where, "files")
    records = {
        safe_path(name, where): record_from_json(value, _FORMAT_VERSION, f"{where}: {name!r}")
        for name, value in listed.items()
    }
    return records, expect(body.get("has_manifest"), bool, where, "has_manifest")


def _require_whole(files: RemoteFiles, store: Store) -> None:
    for name in files.records:
        problem = files.problem(name)
        if problem is not None:
            raise CheckpointError(
                f"{store.shown}/{name} {problem}. The checkpoint there is not whole: upload it "
                f"again, or use another."
            )


def _require_absent(directory: Path, files: RemoteFiles, store: Store) -> None:
    """Refuse to mix what is downloaded with something else."""
    if not directory.exists():
        return
    here = directory / MANIFEST_PATH
    there = files.closing.get(MANIFEST_PATH)
    is_same = there is not None and here.is_file() and here.read_text(encoding="utf-8") == there
    is_whole = all(
        (directory / name).is_file() and (directory / name).stat().st_size == record.nbytes
        for name, record in files.records.items()
    )
    if not (is_same and is_whole):
        raise CheckpointError(
            f"{directory} exists already and is not the checkpoint that {store.shown} holds. "
            f"Remove it, or resume from it."
        )
