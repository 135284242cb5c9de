"""`hf-speed plan`: what a config comes to for a model and a world, without loading or launching.

model config -> meta model -> units -> bytes per rank at each stage -> the resolved table
"""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_speed.config import SpeedConfig, env, load_config, resolve
from hf_speed.config.tree import GIB
from hf_speed.errors import ConfigError

if TYPE_CHECKING:
    from hf_speed.engine.estimate import ParameterSize, StateBytes

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_parser(commands: Any) -> None:
    """Add `plan` to the subcommands."""
    parser = commands.add_parser("plan", help="print the resolved config and the bytes per rank")
    parser.add_argument(
        "model", metavar="MODEL", help="a config.json, a model directory, or a name on the Hub"
    )
    parser.add_argument(
        "-n", "--num_processes", type=int, default=1, metavar="N", help="world size, default 1"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="hf_speed config; default: everything left open"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of one rank's device, as in 80GiB; default: this machine's",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="bfloat16",
        help="that computes",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    config = load_config(arguments.config)
    memory = (
        parse_bytes(arguments.memory) if arguments.memory else _memory_here(arguments.num_processes)
    )
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    units = _units(arguments.model, config, itemsize=dtype.itemsize)
    states = _estimate(units, config, num_processes=arguments.num_processes)
    resolved = resolve(
        config,
        world_size=arguments.num_processes,
        param_dtype=dtype,
        state_bytes=[state.total for state in states],
        memory_bytes=memory,
    )
    num_parameters = sum(size.numel for unit in units for size in unit)
    print(f"{num_parameters / 1e6:,.1f} M parameters in {len(units)} units\n")
    print(resolved.table(), end="\n\n")
    print(render(states, chosen=resolved.stage, memory_bytes=memory))
    return 0


def parse_bytes(text: str) -> int:
    """`80GiB`, `80G` or `1024` in bytes; units are powers of 1024.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(
            f"--memory {text!r} is not a size: write it as 80GiB, 500MiB or in bytes."
        )
    return size


def render(states: "Sequence[StateBytes]", *, chosen: int, memory_bytes: int) -> str:
    """The estimates as a table, the chosen stage marked."""
    lines = ["GiB per rank  parameters  gradients  optimizer  in flight    total"]
    for state in states:
        columns = [state.parameters, state.gradients, state.optimizer, state.in_flight, state.total]
        numbers = "  ".join(f"{value / GIB:9.3f}" for value in columns)
        lines.append(f"{'->' if state.stage == chosen else '  '} stage {state.stage}     {numbers}")
    lines.append(f"of {memory_bytes / GIB:.1f} GiB per rank; activations come on top")
    return "\n".join(lines)


def _units(model: str, config: SpeedConfig, *, itemsize: int) -> "list[list[ParameterSize]]":
    """Sizes of the parameters of each unit of a model that is never allocated."""
    from hf_speed.engine.estimate import ParameterSize
    from hf_speed.integrations.transformers.describe import meta_model
    from hf_speed.zero.units import plan_units

    classes = None if isinstance(config.zero.units, str) else config.zero.units
    return [
        [
            ParameterSize(entry.parameter.numel(), itemsize, entry.parameter.requires_grad)
            for entry in unit.entries
        ]
        for unit in plan_units(meta_model(model), classes)
    ]


def _estimate(
    units: "Sequence[Sequence[ParameterSize]]", config: SpeedConfig, *, num_processes: int
) -> "tuple[StateBytes, ...]":
    from hf_speed.engine.estimate import estimate_states

    return estimate_states(
        units,
        num_shards=config.mesh.dp_shard or max(1, num_processes // config.mesh.dp_replicate),
        masters=config.precision.master_dtype == "float32",
        prefetch_units=config.zero.prefetch_units,
    )


def _memory_here(num_processes: int) -> int:
    """Bytes of one rank's device here: a GPU, or an equal part of the host's memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return env.host_memory_bytes() // num_processes
