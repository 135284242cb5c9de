"""`model.zero_grad()` of a prepared model.

nn.Module.zero_grad clears the gradients of `model.parameters()`. At stages 1 to 3 gradients are on
this rank's pieces of them, which the optimizer holds and the model does not.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from hf_speed.zero.stand_ins import ShardedGradient


class ClearGradients:
    """Stands in front of one model's `zero_grad`."""

    def __init__(self, model: nn.Module, pieces: Iterable[nn.Parameter]) -> None:
        self._model = model
        self._pieces = tuple(pieces)

    def __call__(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's signature
        """Forget every gradient of the model on this rank. No collective."""
        for parameter in self._model.parameters():
            # A stand-in cannot be zeroed, only dropped.
            if isinstance(parameter.grad, ShardedGradient):
                parameter.grad = None
        type(self._model).zero_grad(self._model, set_to_none=set_to_none)
        for piece in self._pieces:
            piece.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """A copy of the model is a plain model, with its class's method."""
        copied = memo[id(self._model)]
        return MethodType(type(copied).zero_grad, copied)


def wrap_zero_grad(model: nn.Module, pieces: Iterable[nn.Parameter]) -> None:
    """Let `model.zero_grad()` clear what the optimizer will read."""
    model.__dict__["zero_grad"] = ClearGradients(model, pieces)


def unwrap_zero_grad(model: nn.Module) -> None:
    """The inverse of wrap_zero_grad."""
    model.__dict__.pop("zero_grad", None)
