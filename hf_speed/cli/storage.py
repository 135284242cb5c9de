"""`hf-speed export`: the plain Hub model of a checkpoint."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `export` to the subcommands."""
    export = commands.add_parser("export", help="write the plain Hub model of a checkpoint")
    export.add_argument("source", metavar="DIR", help="a checkpoint, as in out/checkpoint-100")
    export.add_argument("destination", metavar="OUT", help="a directory that does not exist yet")
    export.add_argument("--dtype", help="of the weights, as in bfloat16; default: as they are")
    export.add_argument("--max_shard_size", metavar="SIZE", help="as in 5GB; default: as they are")
    export.set_defaults(run=_export)


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
