"""The gradients of one group between autograd and the network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_speed.errors import EngineError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import Pending, sum_parts
from hf_speed.zero.group import FlatGroup


class Collection:
    """The gradients of one group on their way out.

    Attributes:
        send: buffer of this backward's gradients, in the wire dtype.
        kept: gradients of which this rank sums a part itself: that part need not go through `send`.
        arrived: parameters whose gradient this backward has brought.
        used: parameters that have had a gradient here since they were last cleared.
        used_anywhere: those that have had one on any rank; known once a step is ready.
        local: sum of the backwards that were not reduced, in the accumulation dtype.
        holds: whether `group.grad` is part of the current sum, or left over from an older one.
        launched: whether this backward's reduction has started.
    """

    def __init__(self, group: FlatGroup) -> None:
        self.group = group
        self.send: Tensor | None = None
        self.kept: dict[int, Tensor] = {}
        self.arrived: set[int] = set()
        self.used: set[int] = set()
        self.used_anywhere: set[int] = set()
        self.local: Tensor | None = None
        self.holds = False
        self.launched = False
        num_ranks = group.axes.reduce.size * group.axes.replica.size // group.axes.num_sharers
        # Scaling to the mean is free while copying to an fp32 wire; 16-bit ones would lose bits.
        scaled_early = group.dtypes.wire == torch.float32
        self.early_scale = 1.0 / num_ranks if scaled_early else 1.0
        self.late_scale = 1.0 if scaled_early else 1.0 / num_ranks
        self.ranks = summing_ranks(group)
        summed = group.layout._replace(parts=self.ranks.size)
        self._own = summed.interval(self.ranks.rank)
        self.own_pieces = summed.pieces(self.ranks.rank)
        # Where NCCL sums, or a sum is rounded, all of `send` has to be there.
        self._keeps_own = scaled_early and self.ranks.size > 1 and group.device.type == "cpu"

    @property
    def shows_gradients(self) -> bool:
        """Whether pieces can show the accumulated gradient: it is in memory, in their dtype."""
        group = self.group
        return group.dtypes.accumulate == group.dtypes.master and not group.streams

    def put(self, index: int, gradient: Tensor) -> None:
        """Take a gradient, scaled, into the send buffer; what this rank sums itself stays put."""
        if index in self.arrived:
            self.settle_kept()
            self.target(index).add_(gradient, alpha=self.early_scale)
            return
        self.arrived.add(index)
        slot = self.group.layout.slots[index]
        first = max(slot.start, self._own[0])
        last = min(slot.start + slot.numel, self._own[1])
        if first >= last or not self._keeps_own or gradient.dtype != torch.float32:
            self._scale_into(self.target(index), gradient)
            return
        flat = gradient.reshape(-1)
        self.kept[index] = flat
        for start, stop in ((slot.start, first), (last, slot.start + slot.numel)):
            if start < stop:
                part = flat[start - slot.start : stop - slot.start]
                self._scale_into(self._buffer()[start:stop], part)

    def own_slice(self, buffer: Tensor) -> Tensor:
        """The slice of a buffer of `send`'s size that this rank sums."""
        return buffer[self._own[0] : self._own[1]]

    def settle_kept(self) -> None:
        """Write the kept parts into the send buffer after all: something is to be added to them."""
        for index, gradient in self.kept.items():
            self._scale_into(self.target(index).view(-1), gradient)
        self.kept = {}

    def _scale_into(self, target: Tensor, gradient: Tensor) -> None:
        if self.early_scale == 1.0:
            target.copy_(gradient)
        else:
            torch.mul(gradient, self.early_scale, out=target)

    def _buffer(self) -> Tensor:
        if self.send is None:
            raise EngineError(f"{self.group.name} has no send buffer.")
        return self.send

    def target(self, index: int) -> Tensor:
        """One parameter's place in the send buffer, in its true shape."""
        return self.group.slot_view(self._buffer(), self.group.layout.slots[index])

    @property
    def is_complete(self) -> bool:
        """Whether every parameter has had its gradient in this backward."""
        return len(self.arrived) == len(self.group.entries)


def summing_ranks(group: FlatGroup) -> AxisGroup:
    """The ranks between which a group's sum is divided first.

    Those that divide the group; at stage 0, where nothing is divided, those that repeat it.
    """
    return group.axes.replica if group.axes.reduce.is_identity else group.axes.reduce


@dataclass(slots=True, eq=False)
class InFlight:
    """A reduction under way and the buffers that it reads and writes.

    `shares` come from the ranks that divide the group, one of them this rank itself, whose share is
    partly in `kept`; `summed`, where there are replicas, is their sum over those too.
    """

    collection: Collection
    send: Tensor
    receive: Tensor
    shares: Pending[list[Tensor]]
    kept: dict[int, Tensor]
    summed: Pending[Tensor] | None = None

    def sum_shares(self, *, out: Tensor, accumulate: bool, scale: float) -> None:
        """`out` = (or +=) scale * the sum of the shares: this rank's slice."""
        shares = self.shares.wait()
        if not self.kept:
            sum_parts(shares, out=out, accumulate=accumulate, scale=scale)
            return
        # Only an fp32 wire keeps gradients, and its scale has been applied already.
        own = shares[self.collection.ranks.rank]
        peers = [share for share in shares if share is not own]
        first = None if accumulate else peers.pop(0)
        for piece in self.collection.own_pieces:
            part = slice(piece.part_start, piece.part_start + piece.numel)
            kept = self.kept.get(piece.index)
            mine, alpha = own[part], 1.0
            if kept is not None:
                mine = kept[piece.start : piece.start + piece.numel]
                alpha = self.collection.early_scale
            torch.add(out[part] if first is None else first[part], mine, alpha=alpha, out=out[part])
        for peer in peers:
            out.add_(peer)
