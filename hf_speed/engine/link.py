"""From a model to its engine.

The link hangs on the model itself, so that there is no table of engines in the process. Copies of
the model are plain models: a link copies to an empty one.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine

_ATTRIBUTE = "_hf_speed_engine"


class EngineLink:
    """Points from a module to the engine that serves it."""

    def __init__(self, engine: "Engine | None") -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, object]) -> "EngineLink":
        return EngineLink(None)

    def __reduce__(self) -> tuple[type["EngineLink"], tuple[None]]:
        return EngineLink, (None,)


def attach_link(model: nn.Module, engine: "Engine") -> EngineLink:
    """Let `engine_of` find `engine` from `model` and from modules around it."""
    link = EngineLink(engine)
    model.__dict__[_ATTRIBUTE] = link
    return link


def remove_link(model: nn.Module, link: EngineLink) -> None:
    """The inverse of attach_link."""
    link.engine = None
    model.__dict__.pop(_ATTRIBUTE, None)


def engine_of(model: nn.Module) -> "Engine | None":
    """The engine that serves `model` or a module inside it (a PEFT model's base, say), or None."""
    for module in model.modules():
        link = module.__dict__.get(_ATTRIBUTE)
        if isinstance(link, EngineLink) and link.engine is not None:
            return link.engine
    return None
