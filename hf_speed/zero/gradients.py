"""Reduced gradients: what is asked of them between backward and step, wherever they live.

Where they live on another tier between backwards,

open     before a sum is added to: `group.grad` is memory, with the sum so far in it
close    it goes back to its tier, in the background; its norms are taken on the way
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_speed.offload import Ticket
from hf_speed.zero.cells import Cell, scratch
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.norm import norms_of
from hf_speed.zero.parameter import placeholder_of
from hf_speed.zero.pool import BufferPool

MAX_COMMITS = 2
"""Gradients on their way to their tier at once; more would only hold more buffers."""


_USUAL_NORMS = (2.0, float("inf"))


class Commit(NamedTuple):
    """A gradient on its way to its tier."""

    ticket: Ticket
    gradient: Tensor


def piece_values(group: FlatGroup, source: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
    """Each piece with what `source`, a buffer of the part's size, holds of it."""
    for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
        stop = slot_piece.part_start + slot_piece.numel
        yield piece, source[slot_piece.part_start : stop].view(piece.shape)


class GradientTier:
    """Moves the gradients of groups between memory and their tier.

    Args:
        pool: of device buffers.
    """

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._commits: deque[Commit] = deque()
        self._norms: dict[tuple[FlatGroup, float], list[Tensor]] = {}

    def open(self, group: FlatGroup, *, holds: bool) -> None:
        """Bring the sum so far, if there is one."""
        cell = group.gradient_cell
        if cell is None:
            return
        group.grad = _view_on(group, cell)
        if group.grad is not None:
            return
        group.grad = self._pool.take(cell.numel, cell.dtype)
        if holds:
            cell.fetch(group.grad).wait()

    def close(self, group: FlatGroup) -> None:
        """Send the sum to its tier."""
        cell = group.gradient_cell
        if cell is None or group.grad is None:
            return
        gradient, group.grad = group.grad, None
        if _view_on(group, cell) is not None:
            return
        for norm_type in _USUAL_NORMS:
            values = [each for _, each in piece_values(group, gradient)]
            self._norms[group, norm_type] = norms_of(values, norm_type)
        self._commits.append(Commit(cell.commit(gradient), gradient))
        if len(self._commits) > MAX_COMMITS:
            self._finish_oldest()

    def drain(self) -> None:
        """Wait until all have arrived."""
        while self._commits:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        ticket, gradient = self._commits.popleft()
        ticket.wait()
        del ticket
        self._pool.give(gradient)

    @contextmanager
    def in_memory(self, group: FlatGroup, *, modify: bool = False) -> Iterator[Tensor | None]:
        """The reduced gradient of this rank's part, if there is one, wherever it lives."""
        cell = group.gradient_cell
        if cell is None:
            yield group.grad
            return
        view = cell.view()
        if view is not None:
            yield view
            return
        gradient = scratch(cell.numel, cell.dtype, torch.device("cpu"))
        cell.fetch(gradient).wait()
        yield gradient
        if modify:
            for norm_type in _USUAL_NORMS:
                self._norms.pop((group, norm_type), None)
            cell.commit(gradient).wait()

    def norms(self, group: FlatGroup, norm_type: float) -> list[Tensor]:
        """The norm of each piece that has a gradient."""
        known = self._norms.get((group, norm_type))
        if known is None:
            with self.in_memory(group) as gradient:
                if gradient is None:
                    return []
                values = [each for _, each in piece_values(group, gradient)]
                known = norms_of(values, norm_type)
        pairs = zip(group.pieces, known, strict=True)
        return [norm for piece, norm in pairs if piece.grad is not None]


def _view_on(group: FlatGroup, cell: Cell) -> Tensor | None:
    """The tier's own memory, where the group's sums can be made in it."""
    return cell.view() if cell.device == group.device else None


class PieceGradients:
    """Gradients that the optimizer's own step will read from the pieces.

    Args:
        groups: all trainable groups.
    """

    def __init__(self, groups: Sequence[FlatGroup]) -> None:
        self._groups = tuple(groups)

    def tensors(self) -> list[Tensor]:
        """This rank's parts, as the optimizer will read them."""
        pieces = (piece for group in self._groups for piece in group.pieces)
        return [piece.grad for piece in pieces if piece.grad is not None]

    def norms(self, norm_type: float) -> list[Tensor]:
        """The norm of each that counts: of equal copies on several ranks, one does."""
        pieces = (piece for group in self._groups if group.is_counted for piece in group.pieces)
        return norms_of([piece.grad for piece in pieces if piece.grad is not None], norm_type)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply all."""
        tensors = self.tensors()
        if tensors:
            torch._foreach_mul_(tensors, factor)

    def clamp(self, value: float) -> None:
        """Clamp every element to [-value, value]."""
        for gradient in self.tensors():
            gradient.clamp_(-value, value)

    @contextmanager
    def exposed(self, group: FlatGroup, *, modify: bool = False) -> Iterator[None]:  # noqa: ARG002
        """They are in the pieces always."""
        yield

    def settle(self) -> None:
        """Factors are applied at once."""

    def reset(self) -> None:
        """Nothing is kept for a step."""


class StreamedGradients:
    """Gradients that a streamed update reads from where they live.

    Args:
        groups: all trainable groups.
        tier: brings them into memory.

    Attributes:
        factor: what the update multiplies them by: clipping and the loss scale.
    """

    def __init__(self, groups: Sequence[FlatGroup], tier: GradientTier) -> None:
        self.factor = 1.0
        self._groups = tuple(groups)
        self._tier = tier

    def norms(self, norm_type: float) -> list[Tensor]:
        """The norm of each piece's that counts, scaled."""
        counted = [group for group in self._groups if group.is_counted]
        norms = [each for group in counted for each in self._tier.norms(group, norm_type)]
        return norms if self.factor == 1.0 else [each * self.factor for each in norms]

    def scale(self, factor: float | Tensor) -> None:
        """Remember it: the update multiplies while it reads."""
        self.factor *= float(factor)

    def clamp(self, value: float) -> None:
        """Clamp every element to [-value, value]: one pass over all gradients."""
        for group in self._groups:
            with self._tier.in_memory(group, modify=True) as gradient:
                if gradient is not None:
                    gradient.mul_(self.factor).clamp_(-value, value)
        self.factor = 1.0

    @contextmanager
    def exposed(self, group: FlatGroup, *, modify: bool = False) -> Iterator[None]:
        """Gradients in the pieces inside, scaled, in master precision."""
        with self._tier.in_memory(group, modify=modify) as gradient:
            if gradient is not None:
                for piece, values in piece_values(group, gradient):
                    if piece.grad is not None:
                        scaled = values.to(device=piece.device, dtype=piece.dtype, copy=True)
                        piece.grad = scaled.mul_(self.factor)
            yield
            if modify:
                self._keep(group, gradient)
        for piece in group.pieces:
            if piece.grad is not None:
                piece.grad = placeholder_of(piece.shape, dtype=piece.dtype, device=piece.device)

    def _keep(self, group: FlatGroup, gradient: Tensor | None) -> None:
        """Write what the pieces show back. The factor has been applied before."""
        if gradient is None and any(piece.grad is not None for piece in group.pieces):
            gradient = group.grad = torch.zeros(
                group.layout.part_numel, dtype=group.dtypes.accumulate, device=group.device
            )
        if gradient is not None:
            for piece, values in piece_values(group, gradient):
                if piece.grad is not None:
                    values.copy_(piece.grad.view(values.shape))

    def settle(self) -> None:
        """Apply the factor to the gradients themselves."""
        if self.factor != 1.0:
            self.clamp(float("inf"))

    def reset(self) -> None:
        """A step is done."""
        self.factor = 1.0
