"""What tensor-slicing ranks send each other: sums, gathers and pieces of activations.

Built on the flat collectives of `mesh`, which say what they send and in which order they sum. Every
rank ends with the same bits. Nothing here knows autograd: see `functions.py`.

Legend: N rows (tokens), H features, T ranks, P = ceil(N / T) rows of one rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import (
    Pending,
    all_gather_flat,
    all_reduce_flat,
    reduce_scatter_flat,
    sum_parts,
)
from hf_speed.mesh.journal import Journal


class Peers(NamedTuple):
    """The ranks that hold the slices of one model, and the journal of the run."""

    tp: AxisGroup
    journal: Journal

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp.size

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return self.tp.rank

    def __deepcopy__(self, memo: dict[int, Any]) -> "Peers":
        # A copy of the model talks to the same ranks; process groups cannot be copied.
        memo[id(self)] = self
        return self


def start_sum(x: Tensor, *, peers: Peers, in_place: bool = False) -> Pending[Tensor]:
    """Sum `x` over the ranks. One all-reduce; its first half is under way on return.

    Args:
        x: any shape, equal on all ranks; must not be written before the result is there.
        peers: the ranks.
        in_place: `x` may be overwritten with the sum (and is, where it needs no padding).

    Returns:
        Pending of the sum in x.dtype: added up in fp32 and in rank order, rounded once.
    """
    if peers.tp.is_identity:
        return Pending((), lambda: x, what="sum")
    group, journal = peers
    numel, shape = x.numel(), x.shape
    flat = _flat(x, multiple_of=group.size)
    is_own = flat.data_ptr() != x.data_ptr() or in_place
    if is_own or (flat.is_cuda and flat.dtype == torch.float32):
        send = flat if is_own else flat.clone()
        summed = all_reduce_flat(send, group=group, journal=journal)
        return Pending((), lambda: summed.wait()[:numel].view(shape), what="sum")
    shares = reduce_scatter_flat(flat, group=group, journal=journal)

    def finish() -> Tensor:
        full = torch.empty_like(flat)
        mine = full.chunk(group.size)[group.rank]
        sum_parts(shares.wait(), out=mine, accumulate=False, scale=1.0)
        all_gather_flat(full, group=group, journal=journal).wait()
        return full[:numel].view(shape)

    return Pending((), finish, what="sum")


def rows_each(num_rows: int, num_ranks: int) -> int:
    """Rows of one rank; those past the end are padding on the last ranks."""
    return -(-num_rows // num_ranks)


def own_rows(x: Tensor, *, peers: Peers) -> Tensor:
    """This rank's rows (P, H) of `x` (N, H), padded with zeros. A copy. Sends nothing."""
    part = rows_each(x.size(0), peers.size)
    start = min(part * peers.rank, x.size(0))
    mine = x[start : start + part]
    if mine.size(0) == part:
        return mine.clone()
    padded = x.new_zeros(part, *x.shape[1:])
    padded[: mine.size(0)] = mine
    return padded


def start_gather_rows(x: Tensor, num_rows: int, *, peers: Peers) -> Pending[Tensor]:
    """All ranks' rows (P, H), without the padding: (num_rows, H). One all-gather."""
    part, size = x.size(0), peers.size
    full = x.new_empty(size * part, *x.shape[1:])
    full[peers.rank * part : (peers.rank + 1) * part] = x
    pending = all_gather_flat(full.view(-1), group=peers.tp, journal=peers.journal)

    def finish() -> Tensor:
        pending.wait()
        return full[:num_rows]

    return Pending((), finish, what="gather of rows")


def start_sum_rows(x: Tensor, *, peers: Peers) -> Pending[Tensor]:
    """This rank's rows (P, H) of the sum of `x` (N, H) over the ranks. One reduce-scatter.

    `x` must not be written before the result is there.
    """
    num_rows, rest = x.size(0), x.shape[1:]
    part = rows_each(num_rows, peers.size)
    x = x.contiguous()
    if part * peers.size != num_rows:
        padded = x.new_zeros(part * peers.size, *rest)
        padded[:num_rows] = x
        x = padded
    shares = reduce_scatter_flat(x.view(-1), group=peers.tp, journal=peers.journal)

    def finish() -> Tensor:
        parts = shares.wait()
        if len(parts) == 1:
            return parts[0].view(part, *rest)
        mine = torch.empty_like(parts[0])
        sum_parts(parts, out=mine, accumulate=False, scale=1.0)
        return mine.view(part, *rest)

    return Pending((), finish, what="sum of rows")


def gather_along(x: Tensor, *, dim: int, lengths: Sequence[int], peers: Peers) -> Tensor:
    """All ranks' pieces, one after the other along `dim`. One all-gather; blocks.

    Args:
        x: this rank's piece, lengths[rank] long along `dim`, the rest equal on all ranks.
        dim: which dim the pieces follow each other along.
        lengths: of every rank's piece.
        peers: the ranks.
    """
    if peers.tp.is_identity:
        return x
    longest = max(lengths)
    shape = list(x.shape)
    shape[dim] = longest
    buffer = x.new_empty(peers.size, *shape)
    mine = buffer[peers.rank].narrow(dim, 0, lengths[peers.rank])
    mine.copy_(x)
    if lengths[peers.rank] < longest:
        # Sent but never read; what a new buffer holds may be anything.
        buffer[peers.rank].narrow(dim, x.size(dim), longest - x.size(dim)).zero_()
    all_gather_flat(buffer.view(-1), group=peers.tp, journal=peers.journal).wait()
    pieces = [each.narrow(dim, 0, length) for each, length in zip(buffer, lengths, strict=True)]
    return torch.cat(pieces, dim)


def own_piece(x: Tensor, *, dim: int, lengths: Sequence[int], peers: Peers) -> Tensor:
    """Inverse of `gather_along`: this rank's piece, a view. Sends nothing."""
    return x.narrow(dim, sum(lengths[: peers.rank]), lengths[peers.rank])


def _flat(x: Tensor, *, multiple_of: int) -> Tensor:
    """The elements of `x` in one dim: a view where it is contiguous and divides, else a copy."""
    flat = x.reshape(-1)
    excess = -flat.numel() % multiple_of
    return torch.cat([flat, flat.new_zeros(excess)]) if excess else flat
