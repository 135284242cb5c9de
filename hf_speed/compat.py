"""Versions: what is installed, what is needed. Every version check of the package lives here.

Where a behaviour can be probed instead, probe it: line numbers and names move between releases.
"""

from importlib import metadata
from typing import NamedTuple

from packaging.version import Version

from hf_speed.errors import ConfigError


class Requirement(NamedTuple):
    """A package, the oldest release that works, and whether hf_speed runs without it."""

    name: str
    minimum: str
    optional: bool


REQUIREMENTS = (
    Requirement("torch", "2.11", optional=False),
    Requirement("transformers", "5.17", optional=False),
    Requirement("accelerate", "1.15", optional=False),
    Requirement("safetensors", "0.8", optional=False),
    Requirement("datasets", "4.0", optional=True),
    Requirement("peft", "0.19", optional=True),
    Requirement("trl", "1.0", optional=True),
)


def installed(name: str) -> Version | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def complaint(requirement: Requirement) -> str:
    """What is wrong with the installed version, and what to run; empty if nothing is."""
    version = installed(requirement.name)
    wanted = f"{requirement.name}>={requirement.minimum}"
    if version is None:
        return "" if requirement.optional else f"not installed; run: pip install '{wanted}'"
    if version < Version(requirement.minimum):
        return f"{version} is too old; run: pip install '{wanted}'"
    return ""


def check_versions() -> None:
    """Raise a ConfigError naming every installed package that is missing or too old."""
    complaints = [f"{entry.name}: {text}" for entry in REQUIREMENTS if (text := complaint(entry))]
    if complaints:
        raise ConfigError("hf_speed cannot run with what is installed. " + "; ".join(complaints))
