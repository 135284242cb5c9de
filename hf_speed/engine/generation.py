"""`generate()` of a model whose parameters, or layers, are spread over the ranks.

Ranks stop at different lengths, so gathering unit by unit at every token would leave the longest
one waiting for the others for ever. By default every unit is gathered once, on entry; from then on
each rank decodes on its own. `zero.generate: streamed` gathers at every token instead and keeps
finished ranks taking part (`synced_gpus`), for models that do not fit a rank whole.

Ranks that see one batch, along the pipeline or with slices of the layers, choose each token by
themselves, from the same logits. They start with one random state, so that sampled ones agree.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, Literal

from torch import nn


class ShardedGenerate:
    """Stands in front of one module's `generate`."""

    def __init__(
        self,
        module: nn.Module,
        gathered: Callable[[], AbstractContextManager[None]],
        mode: Literal["gathered", "streamed", "resident"],
        share_rng: Callable[[], None],
    ) -> None:
        self._module = module
        self._gathered = gathered
        self._mode = mode
        self._share_rng = share_rng

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own generate. Collective: every rank calls it."""
        generate = self._class_method()
        self._share_rng()
        if self._mode == "resident":
            return generate(self._module, *args, **kwargs)
        if self._mode == "streamed":
            kwargs.setdefault("synced_gpus", True)
            return generate(self._module, *args, **kwargs)
        with self._gathered():
            return generate(self._module, *args, **kwargs)

    def _class_method(self) -> Callable[..., Any]:
        # From the class: the instance's own attribute is this object.
        return getattr(type(self._module), "generate")  # noqa: B009

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the model is a plain model, with its class's method."""
        copied = memo[id(self._module)]
        return MethodType(type(copied).generate, copied)


def wrap_generate(
    model: nn.Module,
    gathered: Callable[[], AbstractContextManager[None]],
    mode: Literal["gathered", "streamed", "resident"],
    *,
    share_rng: Callable[[], None],
) -> list[nn.Module]:
    """Put a ShardedGenerate on every module that has a `generate`; returns those modules.

    Args:
        model: of an engine.
        gathered: holds whole parameters.
        mode: zero.generate; "resident" where parameters are never away.
        share_rng: gives ranks that see one batch one random state. Collective over them.
    """
    wrapped = [m for m in model.modules() if callable(getattr(type(m), "generate", None))]
    for module in wrapped:
        module.__dict__["generate"] = ShardedGenerate(module, gathered, mode, share_rng)
    return wrapped


def unwrap_generate(modules: list[nn.Module]) -> None:
    """The inverse of wrap_generate."""
    for module in modules:
        module.__dict__.pop("generate", None)
