"""The errors that hf_speed raises.

Every message says what happened, why, and how to fix it, with the values and the config path. A
mistake in what the user gave is a `ConfigError`; what goes wrong in a run is one of the others. All
share `HfSpeedError`.
"""


class HfSpeedError(Exception):
    """Base of every error that hf_speed raises on purpose."""


class ConfigError(HfSpeedError, ValueError):
    """A config, an argument or a combination of them that cannot take effect."""


class MeshError(HfSpeedError, RuntimeError):
    """The processes, the axes over them, or a collective between them do not fit."""


class ShardedParameterError(HfSpeedError, RuntimeError):
    """A parameter or gradient was read while its full value lives on no single rank."""


class CheckpointError(HfSpeedError, RuntimeError):
    """A checkpoint could not be written, or cannot be read here."""


class OffloadError(HfSpeedError, RuntimeError):
    """A memory tier cannot hold, read or write what it was asked to."""


class EngineError(HfSpeedError, RuntimeError):
    """An engine was used in an order or a place that it cannot serve."""


class DivergenceError(HfSpeedError, RuntimeError):
    """The ranks issued different collectives: names the rank, the operation and the caller."""
