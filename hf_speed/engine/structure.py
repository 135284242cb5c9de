"""Changes of a model's structure inside `gathered(modify=True)`.

Of a model that every rank sees whole, the engine finds what was replaced, resized or frozen, and
takes it over anew. Where each rank has a part only, such changes are refused, on all ranks; so is
what would take a part for the whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_speed.engine.assemble import Parts
from hf_speed.errors import EngineError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import agree

_RESIZE, _STATE = "resize_token_embeddings", "state_dict"


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
    return EngineError(f"{what}, but {_parts_of(mesh.sizes['pp'], mesh.sizes['tp'])} {_WHOLE}")


_WHOLE = (
    "Change the model before it is prepared, or call engine.detach() first, which makes it whole, "
    "and prepare it again."
)


def _parts_of(pp: int, tp: int) -> str:
    return f"with mesh.pp={pp} and mesh.tp={tp} each rank has a part of the model only."


class Refused:
    """Stands in front of a method of one module that would give, or change, a part for the whole.

    Args:
        module: whose method it is.
        method: its name.
        sizes: of the axes `pp` and `tp`.
    """

    def __init__(self, module: nn.Module, method: str, sizes: tuple[int, int]) -> None:
        self._module = module
        self._method = method
        self._sizes = sizes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise EngineError; but for embeddings whose size is not to change."""
        kind = type(self._module)
        if self._method == _RESIZE:
            if not args and not kwargs:
                # Asked for the embeddings only, as transformers' method has it.
                return getattr(kind, _RESIZE)(self._module)
            raise EngineError(
                f"{_RESIZE}() would change the embeddings of {kind.__name__}, but "
                f"{_parts_of(*self._sizes)} {_WHOLE}"
            )
        raise EngineError(
            f"state_dict() would give what this rank has of {kind.__name__}: "
            f"{_parts_of(*self._sizes)} Call accelerator.get_state_dict(model) or "
            f"save_pretrained(directory, is_main_process=...) on every rank, or iterate over "
            f"engine.full_parameters()."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Refused":
        """A copy of the model has a part only, too."""
        return Refused(memo[id(self._module)], self._method, self._sizes)


def refuse_parts(model: nn.Module, mesh: ParallelMesh) -> None:
    """Let `model` refuse what takes a rank's part of it for the whole."""
    sizes = mesh.sizes["pp"], mesh.sizes["tp"]
    model.__dict__[_STATE] = Refused(model, _STATE, sizes)
    for module in model.modules():
        if callable(getattr(type(module), _RESIZE, None)):
            module.__dict__[_RESIZE] = Refused(module, _RESIZE, sizes)


def allow_parts(model: nn.Module) -> None:
    """The inverse of refuse_parts."""
    for module in model.modules():
        for name in (_RESIZE, _STATE):
            if isinstance(module.__dict__.get(name), Refused):
                del module.__dict__[name]
