"""`hf-speed`, also `python -m hf_speed`: launch, doctor, plan, inspect, export, import.

A mistake of the user's ends with its message on stderr and status 2, without a traceback.
"""

import argparse
import sys
from collections.abc import Sequence

from hf_speed.cli import doctor, importing, inspecting, launch, plan, storage
from hf_speed.errors import HfSpeedError


def build_parser() -> argparse.ArgumentParser:
    """The parser; every subcommand sets `run`, a function from the parsed arguments to a status."""
    parser = argparse.ArgumentParser(prog="hf-speed", description="Train and serve with hf_speed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    launch.add_parser(commands)
    doctor.add_parser(commands)
    plan.add_parser(commands)
    inspecting.add_parser(commands)
    storage.add_parser(commands)
    importing.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `arguments` default to the command line's."""
    parsed = build_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except HfSpeedError as error:
        print(f"hf-speed: {error}", file=sys.stderr)
        return 2
    return status
