"""How a config reaches an integrated class: from the user, or else in HF_SPEED_CONFIG."""

import json
import os
from collections.abc import Mapping
from typing import Any

from hf_speed.config import env
from hf_speed.config.load import load_config
from hf_speed.config.tree import SpeedConfig

SpeedConfigLike = str | os.PathLike[str] | Mapping[str, Any] | SpeedConfig
"""What a user may pass as `hf_speed=`."""


def carried_config(value: SpeedConfigLike | None) -> SpeedConfig | None:
    """The config in force; None where neither the user nor the launcher asks for hf_speed.

    Args:
        value: what the user passed; wins over HF_SPEED_CONFIG.

    Raises:
        ConfigError: the config cannot be read or holds a wrong key or value.
    """
    chosen = value if value is not None else env.config_text()
    return None if chosen is None else load_config(chosen)


def plain_config(value: SpeedConfigLike | None) -> dict[str, Any] | str | None:
    """The same config as JSON can hold it: a path stays a path, the rest becomes a dict."""
    if isinstance(value, SpeedConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return dict(json.loads(value))
    return None if value is None else os.fspath(value)
