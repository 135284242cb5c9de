"""`hf-speed plan`: what a config comes to for a model and a world, without loading or launching.

model config -> meta model -> units of each rank -> bytes per rank, stage and tier -> the resolved
table, the bytes, what a step sends, and the largest models that would fit
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_speed.cli.plan_mesh import render_mesh
from hf_speed.config import (
    Memory,
    OffloadConfig,
    ResolvedPipe,
    SpeedConfig,
    Tiers,
    check_world,
    load_config,
    resolve,
)
from hf_speed.config.tree import GIB
from hf_speed.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from hf_speed.engine.capacity import Capacity
    from hf_speed.engine.estimate import StateBytes
    from hf_speed.engine.workload import Workload

DEFAULT_TOKENS = 2048
"""Of a row, where --sequence is left out."""

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
        help="of one rank's GPU, as in 80GiB; default: this machine's GPU or CPU",
    )
    parser.add_argument(
        "--host",
        metavar="SIZE",
        help="host memory that one rank may fill, as in 128GiB; default: offload.host_bytes, or "
        "a rank's share of what is free here",
    )
    parser.add_argument(
        "--disk",
        metavar="SIZE",
        help="of one rank's disk, as in 2TiB; default: what is free in offload.paths",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="bfloat16",
        help="that computes",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="ROWS",
        help="of a data-parallel rank in a step, default: one a microbatch",
    )
    parser.add_argument(
        "--sequence", type=int, metavar="TOKENS", help=f"of a row, default {DEFAULT_TOKENS}"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="blocks are recomputed (gradient_checkpointing)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from hf_speed.engine.capacity import what_fits
    from hf_speed.engine.estimate import Estimator
    from hf_speed.engine.mesh_plan import plan_mesh
    from hf_speed.engine.pipeline import check_schedule
    from hf_speed.engine.planning import sizes_of
    from hf_speed.engine.shares import shares_of
    from hf_speed.engine.workload import plan_of
    from hf_speed.integrations.transformers.describe import meta_model
    from hf_speed.integrations.transformers.slice_plan import plan_for

    config = load_config(arguments.config)
    memory = _memory(arguments, config.offload)
    config = _with_room_on_disk(config, memory)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    world_size: int = arguments.num_processes
    check_world(config, world_size)
    model = meta_model(arguments.model)
    whole = sizes_of(model, config, compute_dtype=dtype)
    slices = plan_for(model, config.mesh.tp) if config.mesh.tp > 1 else None
    shares = shares_of(model, config, compute_dtype=dtype, slice_plan=slices)
    units = shares.largest.units
    device_type = "cpu" if memory.shared else "cuda"
    estimator = Estimator(units, config, world_size=world_size, device_type=device_type)
    resolved = resolve(
        config,
        world_size=world_size,
        param_dtype=dtype,
        needed=estimator.needed,
        memory=memory,
        device_type=device_type,
    )
    check_schedule(resolved.pipe, stage=resolved.stage)
    chosen = Tiers(*resolved.offload.tiers[:3])
    num_parameters = sum(group.numel for unit in whole for group in unit)
    print(f"{num_parameters / 1e6:,.1f} M parameters in {len(whole)} units\n")
    print(resolved.table(), end="\n\n")
    asked = arguments.batch is not None or arguments.sequence is not None
    if config.mesh.pp * config.mesh.tp > 1 or asked:
        work = _workload(arguments, model, resolved.pipe, num_ranks=config.mesh.pp)
        plan = plan_of(resolved.pipe, work, num_ranks=config.mesh.pp)
        found = plan_mesh(shares, config, resolved, work, plan=plan, device_type=device_type)
        print(render_mesh(found, work, resolved), end="\n\n")
    states = [estimator.at(stage, chosen) for stage in range(4)]
    print(
        render_states(states, chosen=resolved.stage, memory=memory, is_pipeline=config.mesh.pp > 1),
        end="\n\n",
    )
    copied = estimator.copied_by_save(resolved.stage, num_elements=num_parameters)
    print(render_save(copied, is_behind=config.checkpoint.asynchronous), end="\n\n")
    fits = what_fits(units, config, world_size=world_size, memory=memory, whole=whole)
    print(render_fits(fits))
    return 0


def _workload(
    arguments: argparse.Namespace, model: "nn.Module", pipe: ResolvedPipe, *, num_ranks: int
) -> "Workload":
    """A step, as the arguments say."""
    import torch

    from hf_speed.engine.workload import Workload
    from hf_speed.pipe.batch import PER_RANK

    config: Any = model.config
    text = config.get_text_config()
    for option in ("batch", "sequence"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} leaves nothing to compute. Give at least 1.")
    return Workload(
        num_rows=arguments.batch or pipe.microbatches or PER_RANK * num_ranks,
        num_tokens=arguments.sequence or DEFAULT_TOKENS,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=getattr(torch, arguments.dtype).itemsize,
        recomputes=arguments.recompute,
    )


def _memory(arguments: argparse.Namespace, offload: OffloadConfig) -> Memory:
    """What one rank has: as the arguments say, and else as this machine has."""
    import torch

    from hf_speed.engine.report import memory_of_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = memory_of_machine(
        # A disk that is given need not be this machine's.
        replace(offload, paths=()) if arguments.disk else offload,
        device=device,
        num_ranks=arguments.num_processes,
    )
    if arguments.memory:
        host = 0 if here.shared else here.host
        here = Memory(parse_bytes(arguments.memory), offload.host_bytes or host, here.disk)
    if arguments.host:
        if here.shared:
            raise ConfigError(
                "--host is the memory beside a GPU, but here the CPU computes, whose memory is one "
                "with the host's. Give the GPU's with --memory, or remove --host."
            )
        here = here._replace(host=parse_bytes(arguments.host, option="--host"))
    if arguments.disk:
        here = here._replace(disk=parse_bytes(arguments.disk, option="--disk"))
    return here


def _with_room_on_disk(config: SpeedConfig, memory: Memory) -> SpeedConfig:
    """A config whose paths are still to be named, where a disk was given without them."""
    if memory.disk and not config.offload.paths:
        return replace(config, offload=replace(config.offload, paths=("(to be set)",)))
    return config


def parse_bytes(text: str, *, option: str = "--memory") -> int:
    """`80GiB`, `80G` or `1024` in bytes; units are powers of 1024.

    Raises:
        ConfigError: the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(
            f"{option} {text!r} is not a size: write it as 80GiB, 500MiB or in bytes."
        )
    return size


def render_states(
    states: "Sequence[StateBytes]", *, chosen: int, memory: Memory, is_pipeline: bool
) -> str:
    """The estimates as a table, the chosen stage marked: what there is, then where it is."""
    names = ("parameters", "gradients", "optimizer", "in flight", "staging")
    tiers = ("device", "host", "disk")
    head = "  ".join(f"{name:>10}" for name in (*names, *tiers))
    lines = [f"GiB per rank  {head}"]
    for state in states:
        kinds = (state.parameters, state.gradients, state.optimizer, state.in_flight, state.staging)
        numbers = "  ".join(f"{value / GIB:10.3f}" for value in (*kinds, *state.by_tier))
        mark = "->" if state.stage == chosen else "  "
        lines.append(f"{mark} stage {state.stage}    {numbers}")
    there = f"{memory.device / GIB:.1f} GiB on the device"
    if memory.shared:
        there += ", which is the host"
    elif memory.host:
        there += f", {memory.host / GIB:.1f} on the host"
    if memory.disk:
        there += f", {memory.disk / GIB:.1f} on disk"
    if is_pipeline:
        lines.append(f"There are {there}. Activations come on top. Of the fullest pipeline rank;")
        lines.append("whole sums of its gradients are in flight at every stage.")
    else:
        lines.append(f"There are {there}. Activations come on top; with accumulation over")
        lines.append("micro-steps at stages 0 and 1, so do the gradients of the whole model.")
    return "\n".join(lines)


def render_save(copied: int, *, is_behind: bool) -> str:
    """What a save behind the training costs."""
    return (
        f"checkpoint.asynchronous ({'on' if is_behind else 'off'}): a save copies up to "
        f"{copied / GIB:.3f} GiB per rank to host memory, freed as it is\nwritten; of a model that "
        f"is in host memory, only what is not written by the next step."
    )


def render_fits(rows: "Sequence[Capacity]") -> str:
    """Largest models as a table: one row a choice of tiers, one column a stage."""
    lines = [
        "What fits where: parameters, in billions, of the largest model with blocks like these",
        "optimizer  gradients  parameters     stage 0   stage 1   stage 2   stage 3",
    ]
    for row in rows:
        numbers = " ".join(f"{billions(numel):>9}" for numel in row.numels)
        optimizer, gradients, parameters = row.tiers
        lines.append(f"{optimizer:<9}  {gradients:<9}  {parameters:<10}  {numbers}")
    return "\n".join(lines)


def billions(numel: int) -> str:
    """Three digits of a number of elements; a dash for none."""
    return f"{numel / 1e9:.3g}" if numel else "-"
