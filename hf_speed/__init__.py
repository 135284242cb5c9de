"""ZeRO for Hugging Face Transformers, without leaving the Trainer or Accelerate.

    from hf_speed import Trainer, TrainingArguments
    args = TrainingArguments("out", hf_speed={"zero": {"stage": 3}})

Every public name is loaded on first use (PEP 562): `import hf_speed` imports neither torch nor
transformers, patches nothing, prints nothing and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_speed.config import SpeedConfig
    from hf_speed.engine import (
        engine_of,
        gathered,
        get_full_grad,
        get_full_optimizer_state,
        get_full_parameter,
        offload_states,
        reload_states,
        set_full_grad,
        set_full_optimizer_state,
        set_full_parameter,
    )
    from hf_speed.integrations.accelerate import Accelerator
    from hf_speed.integrations.hub.publish import export
    from hf_speed.integrations.importing import import_checkpoint
    from hf_speed.integrations.transformers import (
        Trainer,
        TrainingArguments,
        disable,
        enable,
        from_config,
        from_pretrained,
        integrate_args,
        integrate_trainer,
    )

__version__ = "0.1.0"

__all__ = [
    "Accelerator",
    "SpeedConfig",
    "Trainer",
    "TrainingArguments",
    "disable",
    "enable",
    "engine_of",
    "export",
    "from_config",
    "from_pretrained",
    "gathered",
    "get_full_grad",
    "get_full_optimizer_state",
    "get_full_parameter",
    "import_checkpoint",
    "integrate_args",
    "integrate_trainer",
    "offload_states",
    "reload_states",
    "set_full_grad",
    "set_full_optimizer_state",
    "set_full_parameter",
]


_OF_TRAINER = frozenset(
    {"Trainer", "TrainingArguments", "disable", "enable", "from_config", "from_pretrained"}
)


def _home_of(name: str) -> str:
    """The module that defines public name `name`."""
    match name:
        case "SpeedConfig":
            return "hf_speed.config"
        case "Accelerator":
            return "hf_speed.integrations.accelerate"
        case "export":
            return "hf_speed.integrations.hub.publish"
        case "import_checkpoint":
            return "hf_speed.integrations.importing"
    if name in _OF_TRAINER or name.startswith("integrate_"):
        return "hf_speed.integrations.transformers"
    return "hf_speed.engine"


def __getattr__(name: str) -> object:
    """Load a public name on first use, and keep it."""
    if name not in __all__:
        raise AttributeError(f"module 'hf_speed' has no attribute {name!r}")
    value = getattr(import_module(_home_of(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted([*__all__, "__version__"])
