"""`hf-speed export`: the plain Hub model of a checkpoint, in a directory or on the Hub."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `export` to the subcommands."""
    export = commands.add_parser("export", help="write the plain Hub model of a checkpoint")
    export.add_argument(
        "source", metavar="DIR", help="a checkpoint, as in out/checkpoint-100, or a URL of one"
    )
    export.add_argument(
        "destination",
        metavar="OUT",
        help="a directory that does not exist yet; with --push_to_hub as in my-org/my-model",
    )
    export.add_argument("--dtype", help="of the weights, as in bfloat16; default: as they are")
    export.add_argument("--max_shard_size", metavar="SIZE", help="as in 5GB; default: as they are")
    export.add_argument("--push_to_hub", action="store_true", help="commit to the Hub instead")
    export.add_argument("--revision", metavar="BRANCH", help="to commit to; default: main")
    export.add_argument(
        "--private",
        action="store_const",
        const=True,
        help="make the repository private, if it does not exist yet",
    )
    export.add_argument("--commit_message", metavar="TEXT", help="of the one commit")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from hf_speed.integrations.hub.publish import export

    done = export(
        arguments.source,
        arguments.destination,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        revision=arguments.revision,
        private=arguments.private,
        commit_message=arguments.commit_message,
    )
    where = done.directory if done.url is None else done.url
    print(f"wrote {len(done.files)} files to {where}: {', '.join(done.files)}")
    return 0
