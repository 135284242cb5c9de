"""`hf-speed inspect`: whether a checkpoint is what was saved, and what is in it.

Status 0: whole. 1: damaged; every bad file is named. 2: there is no checkpoint.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_speed.checkpoint.inspection import Inspection
    from hf_speed.checkpoint.manifest import Manifest

WIDTH = 100
"""Characters of a value that are shown."""

_LARGE_BYTES = 1 << 30
_EVERY_S = 2.0


def add_parser(commands: Any) -> None:
    """Add `inspect` to the subcommands."""
    parser = commands.add_parser("inspect", help="verify a checkpoint and say what is in it")
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="a checkpoint, as in out/checkpoint-100, or one of several; or a URL, as in s3://b/run",
    )
    parser.add_argument(
        "--fast", action="store_true", help="compare sizes and headers, read no tensors"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    found = []
    for each in _inspections(arguments.directory, fast=arguments.fast):
        found.append(each)
        if not arguments.json:
            _print(each)
    if arguments.json:
        print(json.dumps({"checkpoints": [_as_json(each) for each in found]}, indent=2))
    return int(any(not each.is_whole for each in found))


def _inspections(place: str, *, fast: bool) -> "Iterator[Inspection]":
    from hf_speed.checkpoint.inspection import find_checkpoints, inspect_checkpoint
    from hf_speed.checkpoint.stores import is_url

    if is_url(place):
        from hf_speed.checkpoint.remote import inspect_remote, newest_url

        yield inspect_remote(newest_url(place), fast=fast)
        return
    paths = find_checkpoints(place)
    progress = None if fast else _Progress(sum(map(_bytes_in, paths)))
    for path in paths:
        yield inspect_checkpoint(path, fast=fast, progress=progress)


class _Progress:
    """Says on stderr how much has been read, where that takes long."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._done = 0
        self._next_s = time.monotonic() + _EVERY_S

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._total >= _LARGE_BYTES and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            share = min(self._done / self._total, 1.0)
            print(f"verified {self._done:,} bytes, {share:.0%}", file=sys.stderr)


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors") if path.is_file())


def _print(found: "Inspection") -> None:
    manifest = found.manifest
    bad = {problem.file for problem in found.problems}
    state = f"DAMAGED, {len(bad)} bad files" if bad else "whole"
    print(f"{found.directory}: {state}", end="")
    if manifest is not None:
        total = sum(record.nbytes for record in manifest.files.values())
        checked = "checksums compared" if found.has_checksums else "sizes compared, not contents"
        print(f"; {len(manifest.files)} files, {total:,} bytes, {checked}")
    else:
        print()
    for problem in found.problems:
        print(f"  !! {problem.file}: {problem.text}")
    for note in found.notes:
        print(f"  note: {note}")
    if manifest is not None:
        _print_manifest(manifest)


def _print_manifest(manifest: "Manifest") -> None:
    steps = _steps(manifest)
    step = "" if steps is None else f", after {steps:,} steps of the optimizer"
    print(f"written by {manifest.world_size} rank(s), hf_speed {manifest.package_version}{step}")
    for key, value in sorted(manifest.meta.items()):
        text = json.dumps(value)
        print(f"  {key}: {text if len(text) <= WIDTH else text[:WIDTH] + ' ...'}")
    for kind, (count, num_bytes) in _states(manifest).items():
        print(f"  {kind}: {count} tensors, {num_bytes:,} bytes")


def _states(manifest: "Manifest") -> dict[str, tuple[int, int]]:
    """Kind -> number of tensors, bytes."""
    kinds: dict[str, tuple[int, int]] = {}
    for entry in manifest.entries:
        count, num_bytes = kinds.get(entry.kind, (0, 0))
        kinds[entry.kind] = count + 1, num_bytes + math.prod(entry.shape) * entry.dtype.itemsize
    return dict(sorted(kinds.items()))


def _steps(manifest: "Manifest") -> int | None:
    """The optimizer's counter; parameters that came later have smaller ones."""
    counts = (kinds.get("step") for kinds in manifest.scalars.values())
    return max((int(count) for count in counts if isinstance(count, (int, float))), default=None)


def _as_json(found: "Inspection") -> dict[str, Any]:
    body: dict[str, Any] = {
        "directory": str(found.directory),
        "whole": found.is_whole,
        "verified": "checksums" if found.has_checksums else "sizes",
        "problems": [problem._asdict() for problem in found.problems],
        "notes": list(found.notes),
    }
    manifest = found.manifest
    if manifest is not None:
        body |= {
            "world_size": manifest.world_size,
            "package_version": manifest.package_version,
            "optimizer_steps": _steps(manifest),
            "files": {name: record.nbytes for name, record in manifest.files.items()},
            "states": {
                kind: {"tensors": count, "bytes": num_bytes}
                for kind, (count, num_bytes) in _states(manifest).items()
            },
            "meta": dict(manifest.meta),
        }
    return body
