"""Changes of a model's structure inside `gathered(modify=True)`.

Of a model that every rank sees whole, the engine finds what was replaced, resized or frozen, and
takes it over anew. Where each rank has a part only, such changes are refused, on all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from hf_speed.engine.assemble import Parts
from hf_speed.errors import EngineError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import agree

_RESIZE = "resize_token_embeddings"


def has_new_structure(parts: Parts, model: nn.Module) -> bool:
    """Whether parameters were replaced, resized or frozen since the engine took the model over."""
    known = {id(e.parameter) for group in parts.groups for e in group.entries}
    now = {id(parameter) for parameter in model.parameters()}
    shapes_hold = all(
        tuple(entry.parameter.shape) == slot.shape
        and entry.parameter.requires_grad == group.trainable
        for group in parts.groups
        for slot, entry in zip(group.layout.slots, group.entries, strict=True)
    )
    return known != now or not shapes_hold


def replacements(parts: Parts, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(old, new) parameter of every place that holds another one now."""
    pairs = []
    for group in parts.groups:
        for entry in group.entries:
            for place in entry.places:
                new = place.module._parameters.get(place.key)
                if isinstance(new, nn.Parameter) and new is not entry.parameter:
                    pairs.append((entry.parameter, new))
    named = dict(model.named_parameters())
    for group in parts.groups:
        for entry in group.entries:
            new = named.get(entry.name)
            if new is not None and new is not entry.parameter:
                pairs.append((entry.parameter, new))
    return pairs


def resizings(parts: Parts) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, new values) of those that got data of another shape, the object staying."""
    return [
        (entry.parameter, entry.parameter.data)
        for group in parts.groups
        for slot, entry in zip(group.layout.slots, group.entries, strict=True)
        if tuple(entry.parameter.shape) != slot.shape
    ]


@contextmanager
def left_together(mesh: ParallelMesh, what: str) -> Iterator[None]:
    """A scope of user code that all ranks leave together. One agreement.

    Raises:
        EngineError: it has failed on another rank, which would wait for this one for ever.
    """
    try:
        yield
    except Exception as error:
        agree(error, group=mesh.world)
        raise
    elsewhere = agree(None, group=mesh.world)
    if elsewhere is not None:
        raise EngineError(f"{what} has failed on another rank: {elsewhere}")


def new_structure(mesh: ParallelMesh, what: str) -> EngineError:
    """The error of a change that other ranks, which have other parts, cannot follow."""
    return EngineError(
        f"{what}, but with mesh.pp={mesh.sizes['pp']} and mesh.tp={mesh.sizes['tp']} each rank has "
        f"a part of the model only. Change the model before it is prepared, or call "
        f"engine.detach() first, which makes it whole, and prepare it again."
    )


class RefusedResize:
    """Stands in front of one module's `resize_token_embeddings`."""

    def __init__(self, module: nn.Module, mesh: ParallelMesh) -> None:
        self._module = module
        self._mesh = mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise EngineError: this rank has a part of the embeddings, or none."""
        if not args and not kwargs:
            # Asked for the embeddings only, as transformers' method has it.
            return getattr(type(self._module), _RESIZE)(self._module)
        raise new_structure(
            self._mesh, f"{_RESIZE}() would change the embeddings of {type(self._module).__name__}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its class's method."""
        copied = memo[id(self._module)]
        return MethodType(getattr(type(copied), _RESIZE), copied)


def refuse_resizing(model: nn.Module, mesh: ParallelMesh) -> None:
    """Let every module of `model` that can resize embeddings refuse it."""
    for module in model.modules():
        if callable(getattr(type(module), _RESIZE, None)):
            module.__dict__[_RESIZE] = RefusedResize(module, mesh)


def allow_resizing(model: nn.Module) -> None:
    """The inverse of refuse_resizing."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_RESIZE), RefusedResize):
            del module.__dict__[_RESIZE]
