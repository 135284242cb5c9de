"""`hf-speed launch`: accelerate's launcher, with the world that was asked for.

command line + config file -> LaunchPlan (a value: command, environment, file for accelerate) -> run

Why not `accelerate launch` itself: with `--cpu --num_processes 2` it starts one process, silently.
On CPU its multi-GPU launcher with ACCELERATE_USE_CPU=1 starts as many as asked for, over gloo.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import yaml

from hf_speed.config import SpeedConfig, env, load_config
from hf_speed.config.parallel import check_world
from hf_speed.errors import ConfigError

SECTION = "hf_speed_config"
"""The section of an accelerate config file that holds ours."""

_BARE: Mapping[str, Any] = MappingProxyType(
    {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "mixed_precision": "no",
        "dynamo_config": {"dynamo_backend": "NO"},
    }
)


class LaunchPlan(NamedTuple):
    """What to run."""

    command: tuple[str, ...]
    """Without `--config_file`, which needs a file."""
    variables: dict[str, str]
    """Set in every process."""
    accelerate_config: dict[str, Any]
    """For accelerate's `--config_file`: the given one without our section, or a bare one."""
    summary: str
    """One line for the user."""


class Machine(NamedTuple):
    """What the plan depends on besides the command line."""

    num_cores: int
    num_gpus: int


def add_parser(commands: Any) -> None:
    """Add `launch` to the subcommands."""
    parser = commands.add_parser(
        "launch",
        help="run a training script on several processes",
        usage="hf-speed launch [--cpu] [-n N] [--config FILE] [-m] SCRIPT [ARGUMENTS ...]",
    )
    parser.add_argument("--cpu", action="store_true", help="train on CPU, over gloo")
    parser.add_argument(
        "-n", "--num_processes", type=int, metavar="N", help="all processes, of all machines"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"an hf_speed config, or an accelerate config with a section {SECTION}",
    )
    parser.add_argument("--num_machines", type=int, default=1, metavar="M", help="default 1")
    parser.add_argument(
        "--machine_rank", type=int, default=0, metavar="R", help="of this machine, from 0"
    )
    parser.add_argument(
        "--main_process_ip", metavar="IP", help="of machine 0; needed with several machines"
    )
    parser.add_argument("--main_process_port", type=int, metavar="PORT", help="default: a free one")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], help="for accelerate")
    parser.add_argument(
        "-m", "--module", action="store_true", help="SCRIPT is a module, as in python -m"
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    plan = plan_launch(arguments, machine=_this_machine(), environment=env.launch_environment())
    print(plan.summary, flush=True)
    with tempfile.TemporaryDirectory(prefix="hf-speed-") as directory:
        # Always given: accelerate would otherwise take what an earlier `accelerate config` left.
        path = Path(directory) / "accelerate.yaml"
        path.write_text(yaml.safe_dump(plan.accelerate_config), encoding="utf-8")
        command = [*plan.command[:3], "--config_file", str(path), *plan.command[3:]]
        return _supervise(command, {**env.launch_environment(), **plan.variables})


def plan_launch(
    arguments: argparse.Namespace, *, machine: Machine, environment: Mapping[str, str]
) -> LaunchPlan:
    """Decide what to run; starts nothing.

    Raises:
        ConfigError: the config is wrong, asks for another world than `-n`, or the machine lacks the
            GPUs.
    """
    config, accelerate_config = read_config_file(arguments.config)
    num_processes = _num_processes(arguments, accelerate_config, machine)
    if config is not None:
        check_world(config, num_processes)
    use_cpu = arguments.cpu or bool((accelerate_config or {}).get("use_cpu", False))
    num_local = _num_local(num_processes, arguments.num_machines)
    if not use_cpu and num_local > machine.num_gpus:
        raise ConfigError(
            f"{num_local} processes on this machine need as many GPUs, but torch finds "
            f"{machine.num_gpus}. Launch fewer (-n), or train on CPU with --cpu."
        )
    variables = {env.WORLD_VARIABLE: str(num_processes)}
    if config is not None:
        variables[env.CONFIG_VARIABLE] = json.dumps(config.to_dict())
    if use_cpu:
        variables["ACCELERATE_USE_CPU"] = "1"
    # Each process would otherwise take every core for itself, and N of them fight over them.
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, machine.num_cores // num_local))
    variables["OMP_NUM_THREADS"] = threads
    device = "cpu" if use_cpu else "cuda"
    return LaunchPlan(
        command=_command(arguments, num_processes=num_processes, use_cpu=use_cpu),
        variables=variables,
        accelerate_config=accelerate_config or {**_BARE, "num_processes": num_processes},
        summary=f"hf-speed: {num_processes} process(es) on {device}, {threads} thread(s) each",
    )


def read_config_file(path: str | None) -> tuple[SpeedConfig | None, dict[str, Any] | None]:
    """(our config, the rest for accelerate) of a file of either kind; None for what it lacks."""
    if path is None:
        text = env.config_text()
        return (load_config(text) if text else None), None
    if Path(path).suffix in {".yaml", ".yml"} and Path(path).is_file():
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if (
            isinstance(content, dict)
            and {SECTION, "compute_environment", "distributed_type"} & content.keys()
        ):
            ours = content.pop(SECTION, None)
            return (None if ours is None else load_config(ours)), content
    return load_config(path), None


def _num_processes(
    arguments: argparse.Namespace, accelerate_config: Mapping[str, Any] | None, machine: Machine
) -> int:
    """The world: of the command line, the accelerate config, or one process per GPU."""
    given, filed = arguments.num_processes, (accelerate_config or {}).get("num_processes")
    if given is not None and filed is not None and given != filed:
        raise ConfigError(
            f"-n {given} contradicts num_processes: {filed} in {arguments.config}. Give one."
        )
    number = given if given is not None else filed
    if number is None:
        number = 1 if arguments.cpu else max(1, machine.num_gpus) * arguments.num_machines
    if number < 1:
        raise ConfigError(f"-n {number} is out of range: at least 1 process is needed.")
    return int(number)


def _num_local(num_processes: int, num_machines: int) -> int:
    if num_machines < 1 or num_processes % num_machines:
        raise ConfigError(
            f"{num_processes} processes do not divide over --num_machines {num_machines}. Choose a "
            "multiple."
        )
    return num_processes // num_machines


def _command(
    arguments: argparse.Namespace, *, num_processes: int, use_cpu: bool
) -> tuple[str, ...]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(num_processes),
    ]
    command += [
        "--num_machines",
        str(arguments.num_machines),
        "--machine_rank",
        str(arguments.machine_rank),
    ]
    command += ["--mixed_precision", arguments.mixed_precision] if arguments.mixed_precision else []
    if num_processes > 1:
        command += ["--multi_gpu"]
    elif use_cpu:
        command += ["--cpu"]
    if arguments.main_process_ip:
        command += ["--main_process_ip", arguments.main_process_ip]
    port = arguments.main_process_port
    if port is None and arguments.num_machines == 1:
        port = 0  # accelerate picks a free one: two runs on one machine do not collide.
    command += ["--main_process_port", str(port)] if port is not None else []
    command += ["-m"] if arguments.module else []
    return (*command, arguments.script, *arguments.arguments)


def _this_machine() -> Machine:
    import torch

    return Machine(num_cores=env.num_cores(), num_gpus=torch.cuda.device_count())


def _supervise(command: list[str], environment: Mapping[str, str]) -> int:
    """Run `command`, hand it SIGTERM and SIGINT, and return its status."""
    process = subprocess.Popen(command, env=dict(environment))

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A child ended by a signal has a negative status; a shell would say 128 + the signal.
    return status if status >= 0 else 128 - status
