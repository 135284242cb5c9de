"""Exchanges with their backwards: what crosses the border of a sliced region.

    forward                                  backward
    enter          x as it is                all-reduce of dx, weight gradients meanwhile
    leave          all-reduce                dx as it is
    enter_rows     all-gather of rows        reduce-scatter of dx, weight gradients meanwhile
    leave_rows     reduce-scatter of rows    all-gather of dx
    split_rows     this rank's rows          all-gather of dx
    join_rows      all-gather of rows        this rank's rows
    split_along    this rank's piece         all-gather of dx
    join_along     all-gather of pieces      this rank's piece

`enter` and `leave` are f and g of Megatron-LM (arXiv:1909.08053, section 3), those of rows g and
its conjugate in sequence parallelism (arXiv:2205.05198, section 4.2.2). Outside of a region every
rank has the same values and gradients, so splitting and joining need no sums.

Legend: N rows (tokens), H features, P rows of one rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_speed.mesh.collectives import Pending
from hf_speed.nn.deferred import Queue, WeightWork
from hf_speed.nn.sliced.exchange import (
    Peers,
    gather_along,
    own_piece,
    own_rows,
    start_gather_rows,
    start_sum,
    start_sum_rows,
)


class Meanwhile(NamedTuple):
    """Weight gradients to compute while the region's input gradient travels.

    Attributes:
        queue: where the region's linears put them, in this call of the region.
        weights: whose gradients they are: leaves that take one.
    """

    queue: Queue
    weights: tuple[Tensor, ...]


def enter(x: Tensor, *, peers: Peers, meanwhile: Meanwhile) -> Tensor:
    """Hand `x`, alike on all ranks, to what each rank computes differently."""
    if not torch.is_grad_enabled():
        return x
    return _Enter.apply(x, peers, meanwhile.queue, *meanwhile.weights)  # type: ignore[no-any-return]


def leave(x: Tensor, *, peers: Peers) -> Tensor:
    """Sum what the ranks have computed. `x`, the output of a linear, is overwritten."""
    return _Leave.apply(x, peers)  # type: ignore[no-any-return]


def enter_rows(x: Tensor, num_rows: int, *, peers: Peers, meanwhile: Meanwhile) -> Tensor:
    """Every rank's rows (P, H): (num_rows, H)."""
    if not torch.is_grad_enabled():
        return start_gather_rows(x, num_rows, peers=peers).wait()
    return _EnterRows.apply(x, num_rows, peers, meanwhile.queue, *meanwhile.weights)  # type: ignore[no-any-return]


def leave_rows(x: Tensor, *, peers: Peers) -> Tensor:
    """This rank's rows (P, H) of the sum of `x` (N, H) over the ranks."""
    return _LeaveRows.apply(x, peers)  # type: ignore[no-any-return]


def split_rows(x: Tensor, *, peers: Peers) -> Tensor:
    """This rank's rows (P, H) of `x` (N, H), which is alike on all ranks."""
    return _SplitRows.apply(x, peers)  # type: ignore[no-any-return]


def join_rows(x: Tensor, num_rows: int, *, peers: Peers) -> Tensor:
    """Inverse of `split_rows`."""
    return _JoinRows.apply(x, num_rows, peers)  # type: ignore[no-any-return]


def split_along(x: Tensor, *, dim: int, lengths: Sequence[int], peers: Peers) -> Tensor:
    """This rank's piece of `x`, alike on all ranks."""
    return _SplitAlong.apply(x, dim, tuple(lengths), peers)  # type: ignore[no-any-return]


def join_along(x: Tensor, *, dim: int, lengths: Sequence[int], peers: Peers) -> Tensor:
    """Inverse of `split_along`."""
    return _JoinAlong.apply(x, dim, tuple(lengths), peers)  # type: ignore[no-any-return]


def _compute(work: list[WeightWork], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each of `weights` from the work of its linears."""
    gradients: dict[int, Tensor] = {}
    work.reverse()
    while work:
        # Popped: the input of this linear is not kept while the others are computed.
        each = work.pop()
        pairs = [(each.weight, each.weight_gradient())]
        if each.bias is not None:
            bias_gradient = each.bias_gradient()
            pairs += [] if bias_gradient is None else [(each.bias, bias_gradient)]
        for leaf, gradient in pairs:
            known = gradients.get(id(leaf))
            gradients[id(leaf)] = gradient if known is None else known.add_(gradient)
    return [gradients.get(id(weight)) for weight in weights]


class _Enter(torch.autograd.Function):
    """The weights are inputs, so that autograd takes their gradients from here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, queue: Queue, *weights: Tensor) -> Tensor:
        ctx.peers, ctx.queue, ctx.weights = peers, queue, weights
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[0]
        pending = start_sum(grad, peers=ctx.peers) if needed else None
        gradients = _compute(ctx.queue.take(), ctx.weights)
        return pending.wait() if pending is not None else None, None, None, *gradients


class _EnterRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_rows: int, peers: Peers, queue: Queue, *weights: Tensor
    ) -> Tensor:
        ctx.peers, ctx.queue, ctx.weights = peers, queue, weights
        return start_gather_rows(x, num_rows, peers=peers).wait()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        pending: Pending[Tensor] | None = None
        if ctx.needs_input_grad[0]:
            pending = start_sum_rows(grad, peers=ctx.peers)
        gradients = _compute(ctx.queue.take(), ctx.weights)
        return pending.wait() if pending is not None else None, None, None, None, *gradients


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:  # noqa: ARG004
        # In place, hidden from autograd: `x` is a product, which no backward looks at.
        return start_sum(x.detach(), peers=peers, in_place=True).wait().detach()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any,  # noqa: ARG004
        grad: Tensor,
    ) -> tuple[Tensor, None]:
        return grad, None


class _LeaveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, ctx.num_rows = peers, x.size(0)
        return start_sum_rows(x, peers=peers).wait()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return start_gather_rows(grad, ctx.num_rows, peers=ctx.peers).wait(), None


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, ctx.num_rows = peers, x.size(0)
        return own_rows(x, peers=peers)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return start_gather_rows(grad, ctx.num_rows, peers=ctx.peers).wait(), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int, peers: Peers) -> Tensor:
        ctx.peers = peers
        return start_gather_rows(x, num_rows, peers=peers).wait()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        return own_rows(grad, peers=ctx.peers), None, None


class _SplitAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers) -> Tensor:
        ctx.place = {"dim": dim, "lengths": lengths, "peers": peers}
        return own_piece(x, **ctx.place).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return gather_along(grad, **ctx.place), None, None, None


class _JoinAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], peers: Peers) -> Tensor:
        ctx.place = {"dim": dim, "lengths": lengths, "peers": peers}
        return gather_along(x, **ctx.place)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return own_piece(grad, **ctx.place), None, None, None
