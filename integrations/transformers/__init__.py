"""hf_speed behind transformers' Trainer and TrainingArguments, and loading in slices.

Names are loaded on first use: what belongs to the Accelerator needs the Hub layout from here, but
not the Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_speed.integrations.transformers.arguments import TrainingArguments, integrate_args
    from hf_speed.integrations.transformers.loading import from_config, from_pretrained
    from hf_speed.integrations.transformers.switch import disable, enable
    from hf_speed.integrations.transformers.trainer import Trainer, integrate_trainer

__all__ = [
    "Trainer",
    "TrainingArguments",
    "disable",
    "enable",
    "from_config",
    "from_pretrained",
    "integrate_args",
    "integrate_trainer",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    homes = {
        "arguments": ("TrainingArguments", "integrate_args"),
        "switch": ("disable", "enable"),
        "loading": ("from_config", "from_pretrained"),
        "trainer": ("Trainer", "integrate_trainer"),
    }
    for home, names in homes.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
