"""`hf-speed inspect` and `hf-speed export`: checkpoints, read without a model."""

import argparse
import json
import math
from typing import Any

WIDTH = 100
"""Characters of a value that `inspect` shows."""


def add_parsers(commands: Any) -> None:
    """Add `inspect` and `export` to the subcommands."""
    inspect = commands.add_parser("inspect", help="verify a checkpoint and say what is in it")
    inspect.add_argument("directory", metavar="DIR", help="a checkpoint, as in out/checkpoint-100")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write the plain Hub model of a checkpoint")
    export.add_argument("source", metavar="DIR", help="a checkpoint, as in out/checkpoint-100")
    export.add_argument("destination", metavar="OUT", help="a directory that does not exist yet")
    export.add_argument("--dtype", help="of the weights, as in bfloat16; default: as they are")
    export.add_argument("--max_shard_size", metavar="SIZE", help="as in 5GB; default: as they are")
    export.set_defaults(run=_export)


def _inspect(arguments: argparse.Namespace) -> int:
    """Print what the manifest says; reading it verifies that every file is there, in its size."""
    from hf_speed.checkpoint.reader import read_manifest

    manifest = read_manifest(arguments.directory)
    kinds: dict[str, tuple[int, int]] = {}
    for entry in manifest.entries:
        count, num_bytes = kinds.get(entry.kind, (0, 0))
        kinds[entry.kind] = count + 1, num_bytes + math.prod(entry.shape) * entry.dtype.itemsize
    total = sum(manifest.files.values())
    print(f"{arguments.directory}: whole; {len(manifest.files)} files, {total:,} bytes")
    print(f"written by {manifest.world_size} rank(s), hf_speed {manifest.package_version}")
    for key, value in sorted(manifest.meta.items()):
        text = json.dumps(value)
        print(f"  {key}: {text if len(text) <= WIDTH else text[:WIDTH] + ' ...'}")
    for kind, (count, num_bytes) in sorted(kinds.items()):
        print(f"  {kind}: {count} tensors, {num_bytes:,} bytes")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from hf_speed.checkpoint.export import export

    exported = export(
        arguments.source,
        arguments.destination,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
    )
    print(f"wrote {len(exported.files)} files to {exported.directory}: {', '.join(exported.files)}")
    return 0
