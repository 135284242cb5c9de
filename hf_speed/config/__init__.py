"""The one config tree of hf_speed, and the only reader of the environment.

what the user gives -> `load_config` -> SpeedConfig -> `resolve` (world, dtypes, bytes) ->
ResolvedConfig
"""

from hf_speed.config.load import known_paths, load_config
from hf_speed.config.offload import ResolvedOffload
from hf_speed.config.parallel import MeshSizes, ResolvedPipe, check_world
from hf_speed.config.planner import Memory, Needed, TierBytes, Tiers
from hf_speed.config.resolve import ResolvedConfig, resolve
from hf_speed.config.tree import (
    CheckpointConfig,
    DebugConfig,
    LossScaleConfig,
    MeshConfig,
    OffloadConfig,
    PipeConfig,
    PrecisionConfig,
    SpeedConfig,
    TensorConfig,
    Tier,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig",
    "DebugConfig",
    "LossScaleConfig",
    "Memory",
    "MeshConfig",
    "MeshSizes",
    "Needed",
    "OffloadConfig",
    "PipeConfig",
    "PrecisionConfig",
    "ResolvedConfig",
    "ResolvedOffload",
    "ResolvedPipe",
    "SpeedConfig",
    "TensorConfig",
    "Tier",
    "TierBytes",
    "Tiers",
    "ZeroConfig",
    "check_world",
    "known_paths",
    "load_config",
    "resolve",
]
