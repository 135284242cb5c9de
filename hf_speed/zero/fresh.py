"""Gradients of a run whose loss has not been told to count.

A pipeline computes gradients in the forward. A training loop may clear older ones between a forward
and its backward, scale the loss, or never call that backward. So they wait here beside the older
ones, until `loss.backward()` says that they count.

    begin   older sums are put aside; what comes adds up in their place
    end     what has come is put aside, the older sums are back
    add     it joins them
    drop    as if it had never come
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.zero.collection import Collection
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.pool import BufferPool


class _Sums(NamedTuple):
    """Gradients of all groups, as they are or put aside.

    Attributes:
        local: for each travelling group its sum, if there is one.
        used: for each travelling group the parameters that have had a gradient.
        whole: for each parameter of the other groups its gradient.
    """

    local: list[Tensor | None]
    used: list[set[int]]
    whole: list[Tensor | None]


class FreshGradients:
    """Keeps the gradients of one run apart from older ones.

    Args:
        collections: of the groups whose gradients travel.
        groups: the others, whose gradients stay on their parameters.
        pool: of the sums' buffers.
    """

    def __init__(
        self, collections: Sequence[Collection], groups: Sequence[FlatGroup], pool: BufferPool
    ) -> None:
        self._collections = list(collections)
        self._parameters = [piece for group in groups for piece in group.pieces]
        self._pool = pool
        self._older: _Sums | None = None
        self._fresh: _Sums | None = None

    def begin(self) -> None:
        """Put older sums aside, and forget what an earlier run has left that does not count."""
        self.drop()
        self._older = self._exchange(
            _Sums(
                [None] * len(self._collections),
                [set() for _ in self._collections],
                [None] * len(self._parameters),
            )
        )

    def end(self) -> None:
        """Put what has come aside, the older sums back."""
        if self._older is not None:
            self._fresh, self._older = self._exchange(self._older), None

    def add(self, factor: float) -> None:
        """What has come, multiplied by `factor`, joins the older sums."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            return
        gradients = [each for each in (*fresh.local, *fresh.whole) if each is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        for collection, local, used in zip(self._collections, fresh.local, fresh.used, strict=True):
            collection.used |= used
            if local is None:
                continue
            if collection.local is None:
                collection.local = local
            else:
                collection.local.add_(local)
                self._pool.give(local)
        for parameter, gradient in zip(self._parameters, fresh.whole, strict=True):
            if parameter.grad is None or gradient is None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad
            else:
                parameter.grad.add_(gradient)

    def drop(self) -> None:
        """Forget what has come."""
        fresh, self._fresh = self._fresh, None
        for local in () if fresh is None else fresh.local:
            if local is not None:
                self._pool.give(local)

    def _exchange(self, sums: _Sums) -> _Sums:
        """Put `sums` in place; returns what was there."""
        found = _Sums(
            [each.local for each in self._collections],
            [each.used for each in self._collections],
            [each.grad for each in self._parameters],
        )
        for collection, local, used in zip(self._collections, sums.local, sums.used, strict=True):
            collection.local, collection.used = local, used
        for parameter, gradient in zip(self._parameters, sums.whole, strict=True):
            parameter.grad = gradient
        return found
