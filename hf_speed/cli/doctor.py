"""`hf-speed doctor`: what is installed, what devices and backends there are, what is wrong."""

import argparse
import platform
import sys
from typing import Any

from hf_speed import __version__
from hf_speed.compat import REQUIREMENTS, complaint, installed
from hf_speed.config import env, load_config
from hf_speed.config.tree import GIB
from hf_speed.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Add `doctor` to the subcommands."""
    parser = commands.add_parser("doctor", help="report versions, devices and backends")
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    """Print the report; status 1 if anything in it is wrong."""
    rows = [*_versions(), *_devices(), *_backends(), *_environment()]
    width = max(len(name) for name, _, _ in rows)
    for name, value, wrong in rows:
        print(f"{'!!' if wrong else 'ok'}  {name:<{width}}  {wrong or value}")
    num_wrong = sum(bool(wrong) for _, _, wrong in rows)
    print(f"{num_wrong} problem(s) found" if num_wrong else "no problem found")
    return int(num_wrong > 0)


def _versions() -> list[tuple[str, str, str]]:
    rows = [
        ("python", f"{platform.python_version()} {sys.platform}", ""),
        ("hf_speed", __version__, ""),
    ]
    for requirement in REQUIREMENTS:
        version = installed(requirement.name)
        value = str(version) if version else "not installed (optional)"
        rows.append((requirement.name, value, complaint(requirement)))
    return rows


def _devices() -> list[tuple[str, str, str]]:
    import torch

    rows = [("cpu", f"{env.num_cores()} cores, {env.host_memory_bytes() / GIB:.1f} GiB", "")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (f"cuda:{index}", f"{properties.name}, {properties.total_memory / GIB:.1f} GiB", "")
        )
    return rows


def _backends() -> list[tuple[str, str, str]]:
    import torch
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    no_nccl = "missing, though there is a GPU: this torch build cannot train on several GPUs"
    return [
        (
            "gloo",
            "available",
            "" if gloo else "missing: this torch build cannot train on several CPU processes",
        ),
        (
            "nccl",
            "available" if nccl else "absent",
            no_nccl if torch.cuda.is_available() and not nccl else "",
        ),
    ]


def _environment() -> list[tuple[str, str, str]]:
    text = env.config_text()
    if text is None:
        return [(env.CONFIG_VARIABLE, "unset", "")]
    try:
        load_config(text)
    except ConfigError as error:
        return [(env.CONFIG_VARIABLE, text, str(error))]
    return [(env.CONFIG_VARIABLE, text, "")]
