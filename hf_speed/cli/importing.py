"""`hf-speed import`: a checkpoint of hf_speed from one of DeepSpeed, FSDP or the Hub."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `import` to the subcommands."""
    parser = commands.add_parser(
        "import", help="make a checkpoint of hf_speed from one of DeepSpeed, FSDP or the Hub"
    )
    parser.add_argument("source", metavar="SRC", help="as in out/checkpoint-100")
    parser.add_argument("destination", metavar="DST", help="a directory that does not exist yet")
    parser.add_argument(
        "--config", metavar="MODEL_DIR", help="with the model's config.json; default: SRC"
    )
    parser.add_argument(
        "--kind",
        default="auto",
        help="auto (default), deepspeed, universal, dcp (torch.distributed, FSDP) or hub",
    )
    parser.add_argument(
        "--dtype", help="of the weights, as in bfloat16; default: as the model computed"
    )
    parser.add_argument("--max_shard_size", metavar="SIZE", help="as in 2GB; default: 5GB")
    parser.add_argument(
        "--optimizer", metavar="CLASS", help="that goes on, as in Adam; default: found out"
    )
    parser.add_argument("--step", type=int, help="steps taken, where SRC does not say")
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    from hf_speed.integrations.importing import import_checkpoint

    imported = import_checkpoint(
        arguments.source,
        arguments.destination,
        config=arguments.config,
        kind=arguments.kind,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        optimizer=arguments.optimizer,
        step=arguments.step,
    )
    print(f"{imported.origin} -> {imported.directory}")
    print(
        f"{imported.num_parameters} tensors, optimizer state of {imported.num_states} parameters, "
        f"step {'unknown' if imported.step is None else imported.step}"
    )
    return 0
