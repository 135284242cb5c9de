"""Linears whose backward leaves the weight's gradient for later.

    forward            y = x W^T + b, as torch computes it
    backward           dx = dy W at once; (x, dy, W, b) goes to a queue
    queue.drain()      dW = dy^T x, db = sum of dy, accumulated through autograd

The gradient of the input is what other ranks wait for; that of the weight is wanted at the end of
the step. Between the two fits a collective (Megatron-LM, arXiv:1909.08053) or the bubble of a
pipeline (zero bubble, arXiv:2401.10241, section 2).

Legend: N rows, I input features, O output features.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class WeightWork(NamedTuple):
    """What is left to compute of one linear's backward.

    Attributes:
        x: (N, I), the input, in the dtype that it was multiplied in.
        grad: (N, O), gradient of the output, in the same dtype.
        weight: the leaf that the gradient belongs to: (O, I), or (I, O) if `transposed`.
        bias: likewise, (O,); None where there is none or it takes no gradient.
        transposed: the layout of transformers' Conv1D.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool

    def weight_gradient(self) -> Tensor:
        """In the weight's shape and dtype; bitwise what torch's backward computes on a CPU."""
        left, right = self.grad, self.x
        if self.transposed:
            left, right = right, left
        return left.t().mm(right).to(self.weight.dtype)

    def bias_gradient(self) -> Tensor | None:
        """In the bias's shape and dtype; None without a bias."""
        return None if self.bias is None else self.grad.sum(0).to(self.bias.dtype)


class Queue:
    """Weight gradients that wait to be computed, oldest first."""

    def __init__(self) -> None:
        self._work: deque[WeightWork] = deque()

    def __len__(self) -> int:
        return len(self._work)

    def put(self, work: WeightWork) -> None:
        """Add one."""
        self._work.append(work)

    def take(self) -> list[WeightWork]:
        """Hand over everything that waits, oldest first; whoever takes it computes it."""
        taken = list(self._work)
        self._work.clear()
        return taken

    def drain(self, limit: int | None = None) -> None:
        """Compute what waits and accumulate it as one backward: parameters' hooks run.

        Each gradient is computed when autograd comes to it, and its input is let go of then. May be
        called outside of a backward or inside one.

        Args:
            limit: compute only so many, the oldest; None for all.
        """
        count = len(self) if limit is None else min(limit, len(self))
        # Autograd runs the youngest node first.
        work = [self._work.popleft() for _ in range(count)][::-1]
        if not work:
            return
        with torch.enable_grad():
            roots = [_Later.apply(each.weight, each.bias, [each]) for each in work]
        del work
        torch.autograd.backward(roots, [root.detach() for root in roots])


def deferred_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    queue: Queue | None,
    *,
    transposed: bool = False,
) -> Tensor:
    """A drop-in for F.linear (or Conv1D's addmm) whose weight gradient goes to `queue`.

    Nothing is deferred without a queue, with gradients off, or where the weight takes no gradient
    or is itself computed from others: then this is torch's own function.

    Args:
        x: (..., I).
        weight: (O, I); (I, O) if `transposed`.
        bias: (O,) or None; its gradient is deferred with the weight's.
        queue: takes a WeightWork in the backward.
        transposed: the weight is laid out as transformers' Conv1D has it.

    Returns:
        (..., O), in the autocast dtype where autocast is on.
    """
    takes_gradient = torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf
    plain_bias = bias is None or bias.is_leaf
    if queue is None or not takes_gradient or not plain_bias:
        return _multiply(x, weight, bias, transposed=transposed)
    call = _Call(weight, bias, queue, transposed)
    # Outputs take gradients where an input does: one without elements stands in for the weight.
    tie = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    # Cast outside of the function, so that autograd casts the gradient back.
    return _Deferred.apply(x.to(compute_dtype(x)), call, tie)  # type: ignore[no-any-return]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    if not transposed:
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.size(-1))
    product = flat.mm(weight) if bias is None else torch.addmm(bias, flat, weight)
    return product.view(*x.shape[:-1], weight.size(-1))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear multiplies `x` in: autocast's dtype where it is on; it leaves fp64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _Call(NamedTuple):
    """What one call needs beside its input, hidden from autograd.

    A weight that autograd knew would have its hooks run in this backward, without a gradient.
    """

    weight: Tensor
    bias: Tensor | None
    queue: Queue
    transposed: bool


class _Deferred(torch.autograd.Function):
    """y = x W^T + b; the backward gives dx and queues the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, tie: Tensor | None) -> Tensor:  # noqa: ARG004
        # The weight twice: its values may be elsewhere until the backward, saved-tensor hooks bring
        # them; its gradient belongs to this very object.
        ctx.save_for_backward(x, call.weight)
        ctx.call = call
        return _multiply(x, call.weight, call.bias, transposed=call.transposed)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, None]:
        x, values = ctx.saved_tensors
        weight, bias, queue, transposed = ctx.call
        grad = grad.reshape(-1, grad.size(-1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            values = values.to(grad.dtype)
            grad_x = grad.mm(values.t() if transposed else values).view(x.shape)
        bias = bias if bias is not None and bias.requires_grad else None
        queue.put(WeightWork(x.reshape(-1, x.size(-1)), grad, weight, bias, transposed))
        return grad_x, None, None


class _Later(torch.autograd.Function):
    """Nothing, of a weight and a bias; the backward computes their gradients from `box`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,  # noqa: ARG004
        box: list[WeightWork],
    ) -> Tensor:
        ctx.box = box
        return torch.empty(0, device=weight.device)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        grad: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor | None, None]:
        # Popped: the input of this linear is not kept while the others are computed.
        work = ctx.box.pop()
        return work.weight_gradient(), work.bias_gradient(), None
