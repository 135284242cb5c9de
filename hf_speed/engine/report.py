"""Figures of a run and of the machine, read from the process and the devices."""

import platform
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_speed import __version__
from hf_speed.compat import REQUIREMENTS, installed
from hf_speed.config import Memory, OffloadConfig, env
from hf_speed.errors import ConfigError

KIB = 1024

HOST_SHARE = 0.8
"""Share of the free host memory that a plan may fill; the rest is for data and Python."""


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Highest use so far of each memory tier of this process: "host", on CUDA also "device"."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def package_versions() -> dict[str, str]:
    """What a run's numbers depend on: Python, this package and those that it needs."""
    found = {"python": platform.python_version(), "hf_speed": __version__}
    for requirement in REQUIREMENTS:
        version = installed(requirement.name)
        if version is not None:
            found[requirement.name] = str(version)
    return found


def memory_of_machine(offload: OffloadConfig, *, device: torch.device, num_ranks: int) -> Memory:
    """What there is for one rank of this machine.

    Args:
        offload: names the directories of the disk tier; may bound the host's memory.
        device: where the rank computes.
        num_ranks: that share the machine.

    Raises:
        ConfigError: a directory cannot be read.
    """
    disk = free_disk_bytes(offload.paths) // num_ranks
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        free = int(HOST_SHARE * env.free_host_bytes()) // num_ranks
        return Memory(total, offload.host_bytes or free, disk)
    return Memory(env.host_memory_bytes() // num_ranks, 0, disk, shared=True)


def free_disk_bytes(paths: Sequence[str]) -> int:
    """What equal stripes over `paths` can hold; several of them may be on one disk.

    Raises:
        ConfigError: one cannot be read.
    """
    on_disk: dict[int, list[str]] = {}
    for path in paths:
        try:
            on_disk.setdefault(Path(path).stat().st_dev, []).append(path)
        except OSError as error:
            raise ConfigError(
                f"offload.paths names {path!r}, which cannot be read: {error.strerror}. Make the "
                "directory on every machine, or name another."
            ) from error
    stripes = [shutil.disk_usage(each[0]).free // len(each) for each in on_disk.values()]
    return len(paths) * min(stripes, default=0)
