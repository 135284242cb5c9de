"""What is asked of a Transformers model before its layers are dealt out or divided.

The engine cuts modules; which of a model's answers need all layers at once, and how its layers are
divided, is known here.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_speed.config.tree import SpeedConfig
from hf_speed.engine.assemble import make_mesh
from hf_speed.errors import ConfigError
from hf_speed.nn.sliced import SlicePlan

_OF_ALL_LAYERS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Switches of a model's config by which it collects something of every layer."""


def check_dividable(model: nn.Module, config: SpeedConfig) -> None:
    """Refuse what would be wrong, without an error, of a model that is taken apart.

    Raises:
        ConfigError: adapters; a head that another library has fused; or, in a pipeline, an answer
            that is made of all layers.
    """
    pp, tp = config.mesh.pp, config.mesh.tp
    if pp == 1 and tp == 1:
        return
    sizes = f"mesh.pp={pp} x mesh.tp={tp}"
    if getattr(model, "peft_config", None):
        raise ConfigError(
            f"{type(model).__name__} carries PEFT adapters, which hf_speed can neither deal out "
            f"nor divide ({sizes}). Set mesh.pp=1 and mesh.tp=1: zero.stage=3 spreads the frozen "
            f"base over the ranks as well."
        )
    # TRL's function wears the signature of the forward that it stands for.
    if "fused_lm_head" in inspect.signature(model.forward, follow_wrapped=False).parameters:
        raise ConfigError(
            f"TRL gave {type(model).__name__} a fused head that reads lm_head.weight by itself, "
            f"which is on the last stage or in slices ({sizes}). Set mesh.pp=1 and mesh.tp=1, or "
            f"train with hf_speed.Trainer."
        )
    told: Any = getattr(model, "config", None)
    text = told.get_text_config() if hasattr(told, "get_text_config") else told
    for name in _OF_ALL_LAYERS if pp > 1 else ():
        if getattr(told, name, None) or getattr(text, name, None):
            raise ConfigError(
                f"{type(model).__name__}'s config has {name}=True, which collects something of "
                f"every layer, but in a pipeline (mesh.pp={pp}) each rank has some of the layers "
                f"only. Set model.config.{name}=False, or mesh.pp=1."
            )


def slice_planner(
    config: SpeedConfig, device: torch.device
) -> Callable[[nn.Module, int], SlicePlan]:
    """The planner that an engine of `config` is given: a plan that was guessed is tried first."""

    def planned(model: nn.Module, num_ranks: int) -> SlicePlan:
        from hf_speed.integrations.transformers.slice_plan import plan_for
        from hf_speed.integrations.transformers.slice_verify import verify

        plan = plan_for(model, num_ranks)
        if plan.source == "structure" and isinstance(model, PreTrainedModel):
            mesh = make_mesh(config, device)
            try:
                verify(
                    model,
                    plan,
                    tp=mesh.axis("tp"),
                    journal=mesh.journal,
                    device=device,
                    sequence_parallel=config.tensor.sequence_parallel,
                )
            finally:
                mesh.close()
        return plan

    return planned
