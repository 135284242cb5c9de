"""The environment: the one file that reads `os.environ`.

Everything that a launcher tells its processes arrives here and leaves as typed values. Nothing is
cached: a test or a launcher may change the environment between two reads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hf_speed.errors import ConfigError

CONFIG_VARIABLE = "HF_SPEED_CONFIG"
"""Carries a config (a path, or JSON text beginning with `{`) from a launcher into its processes."""

WORLD_VARIABLE = "HF_SPEED_WORLD_SIZE"
"""The number of processes that `hf-speed launch` promised: a process that finds another world
raises."""


class LaunchedWorld(NamedTuple):
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool
    """True if a launcher set WORLD_SIZE, False for a process started by hand."""


def _integer(name: str, *, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"The environment variable {name}={text!r} is not a whole number. A launcher sets it; "
            "unset it, or start the script with `hf-speed launch -n N`, `accelerate launch` or "
            "`torchrun`."
        ) from None


def launched_world() -> LaunchedWorld:
    """What the launcher says about this process: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE.

    Raises:
        ConfigError: a variable is not a whole number, or RANK is not below WORLD_SIZE.
    """
    world_size = _integer("WORLD_SIZE", default=1)
    rank = _integer("RANK", default=0)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"RANK={rank} does not lie in 0..{world_size - 1} (WORLD_SIZE={world_size}). The "
            "launcher's variables contradict each other; start the script with `hf-speed launch "
            "-n N`."
        )
    return LaunchedWorld(
        rank=rank,
        world_size=world_size,
        local_rank=_integer("LOCAL_RANK", default=0),
        local_world_size=_integer("LOCAL_WORLD_SIZE", default=world_size),
        launched=bool(os.environ.get("WORLD_SIZE")),
    )


def current_rank() -> int:
    """RANK, or 0 where it is unset or unreadable: what logging goes by, so it never raises."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def config_text() -> str | None:
    """The config that a launcher carried here in HF_SPEED_CONFIG; None if unset or empty."""
    return os.environ.get(CONFIG_VARIABLE) or None


def check_promised_world() -> None:
    """Compare the world with the one that `hf-speed launch` promised.

    Raises:
        ConfigError: HF_SPEED_WORLD_SIZE is set and WORLD_SIZE differs.
    """
    world = launched_world()
    promised = _integer(WORLD_VARIABLE, default=world.world_size)
    if promised != world.world_size:
        raise ConfigError(
            f"{WORLD_VARIABLE}={promised} processes were asked for, but this process belongs to a "
            f"world of WORLD_SIZE={world.world_size}. The launcher started fewer or more; start "
            f"with `hf-speed launch -n {promised}`."
        )


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container's limits stand."""


def host_memory_bytes() -> int:
    """Bytes of host memory that this machine has, or that its control group allows, if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group_bytes("max")
    return total if limit is None else min(total, limit)


def free_host_bytes() -> int:
    """Bytes of host memory that can still be had: of the machine, and of the control group."""
    free = _listed(Path("/proc/meminfo"), "MemAvailable:", scale=1 << 10)
    free = host_memory_bytes() if free is None else free
    limit, used = _control_group_bytes("max"), _control_group_bytes("current")
    if limit is not None and used is not None:
        # Cached files count as used, but give way.
        cached = _listed(CONTROL_GROUP / "memory.stat", "inactive_file") or 0
        free = min(free, limit - used + cached)
    return max(free, 0)


def _control_group_bytes(name: str) -> int | None:
    """A limit or a use of memory; None where there is none."""
    path = CONTROL_GROUP / f"memory.{name}"
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _listed(path: Path, name: str, *, scale: int = 1) -> int | None:
    """The number beside `name` in a file of such lines; None where it is not."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (int(line.split()[1]) * scale for line in lines if line.split()[:1] == [name]), None
    )


def launch_environment() -> dict[str, str]:
    """A copy of the environment, for a launcher to extend and hand to its children."""
    return dict(os.environ)


@contextmanager
def overridden(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the length of a block, then put the old ones back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
