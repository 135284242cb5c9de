"""A model that is never allocated, for planning: its class, names, shapes and blocks, on `meta`."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_speed.errors import ConfigError


def meta_model(source: str) -> PreTrainedModel:
    """The model of a config on the meta device.

    Args:
        source: a config.json, a directory with one, or a name on the Hub.

    Raises:
        ConfigError: there is no such config, or transformers does not know its model.
    """
    path = Path(source)
    try:
        config = AutoConfig.from_pretrained(path.parent if path.is_file() else source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No model config can be read from {source!r}: {error}") from error
    name = (config.architectures or [""])[0]
    with torch.device("meta"):
        known = getattr(transformers, name, None) if name else None
        model: PreTrainedModel = AutoModel.from_config(config) if known is None else known(config)
    return model
