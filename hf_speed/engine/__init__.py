"""One run: engines, and whole tensors by name."""

from hf_speed.engine.engine import Engine, StepStats
from hf_speed.engine.link import engine_of
from hf_speed.engine.names import (
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

__all__ = [
    "Engine",
    "StepStats",
    "engine_of",
    "gathered",
    "get_full_grad",
    "get_full_optimizer_state",
    "get_full_parameter",
    "offload_states",
    "reload_states",
    "set_full_grad",
    "set_full_optimizer_state",
    "set_full_parameter",
]
