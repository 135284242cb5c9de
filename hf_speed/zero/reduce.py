"""From the gradients that autograd leaves on parameters to this rank's part of their mean.

    collect     a gradient arrives: into its slot of the group's send buffer
    launch      a group is complete and all before it have left: reduce-scatter, in the background
    settle      the sum has arrived: scaled to the mean, added to `group.grad` in fp32
    finish      end of the backward: groups that got nothing send zeros, so that the order of
                collectives is the same on every rank whatever its data used

Where gradients live on another tier, the sum so far comes from there before it is added to, and
goes back while the backward goes on.

Stages 2 and 3 reduce in every backward: full gradients never outlive it. Stages 0 and 1 collect
locally while `sync` is off (no_sync, accumulation) and reduce once.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_speed.errors import EngineError
from hf_speed.mesh.collectives import (
    all_gather_flat,
    all_reduce_flat,
    reduce_scatter_flat,
    sum_parts,
)
from hf_speed.mesh.journal import Journal
from hf_speed.zero.collection import Collection, InFlight
from hf_speed.zero.fresh import FreshGradients
from hf_speed.zero.gradients import GradientTier, piece_values
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.parameter import placeholder_of
from hf_speed.zero.pool import BufferPool
from hf_speed.zero.stand_ins import GradientStandIns, arrived_gradient

MAX_IN_FLIGHT = 2
"""Reductions under way at once; more would only hold more buffers."""


class Watcher(Protocol):
    """Who wants to know when gradients change."""

    def backward_begins(self) -> None:
        """They are about to."""
        ...

    def reduced(self, group: FlatGroup) -> None:
        """One is final, unless this backward reaches its group again or another one follows."""
        ...


class Reducer:
    """Reduces gradients of trainable groups in a fixed order, in the background of the backward.

    Args:
        groups: in the order in which the backward completes them.
        pool: of send and receive buffers.
        journal: of the run.
        each_backward: stages 2 and 3: reduce whether or not `sync` is on.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        *,
        pool: BufferPool,
        journal: Journal,
        each_backward: bool,
    ) -> None:
        self._collections = [Collection(group) for group in groups if group.travels]
        others = [group for group in groups if not group.travels]
        self._fresh = FreshGradients(self._collections, others, pool)
        self._by_group = {collection.group: collection for collection in self._collections}
        self._pool = pool
        self.tier = GradientTier(pool)
        self.watcher: Watcher | None = None
        self._is_last = False
        self._journal = journal
        self._each_backward = each_backward
        self._place = {each.group: place for place, each in enumerate(self._collections)}
        self._next = 0
        self._num_passed = 0
        self._in_flight: deque[InFlight] = deque()
        self._stand_ins = GradientStandIns()
        self._reducing = True
        self._collecting = False
        self._stepped = False

    def begin_collecting(self) -> None:
        """Start many backwards that count as one: their gradients add up here, unreduced.

        Between them nobody reads or clears a gradient, so nothing is shown and nothing looked for.
        """
        self.begin(sync=False)
        self._reducing = False
        self._collecting = True
        self._fresh.begin()

    @property
    def is_collecting(self) -> bool:
        """Whether backwards only add up here."""
        return self._collecting

    def end_collecting(self) -> None:
        """End what `begin_collecting` has started; what has come waits apart from older sums."""
        if self._collecting:
            self._collecting = False
            self._fresh.end()
            self.finish()

    def drop_collected(self) -> None:
        """Forget what has come since `begin_collecting`."""
        self._fresh.drop()

    def take_collected(self, *, factor: float, sync: bool) -> None:
        """What has come since `begin_collecting` counts: as one backward of a loss times `factor`.

        Older gradients that the user has cleared since are not added to. Collective with `sync`.
        """
        self.begin(sync=False)
        self._fresh.add(factor)
        self._reducing = sync
        self.finish()

    def begin(self, *, sync: bool) -> None:
        """Start a backward. Gradients that the user has cleared since are not added to."""
        if self._collecting:
            return
        self._is_last = sync
        if self.watcher is not None:
            self.watcher.backward_begins()
        self._reducing = sync or self._each_backward
        self._next = self._num_passed = 0
        self.heed_cleared()
        self._stand_ins.hide()
        if self._user_has_cleared():
            for collection in self._collections:
                self._forget_cleared(collection)
        for collection in self._collections:
            collection.arrived.clear()
            collection.launched = False
            if collection.group.whole or not collection.holds:
                # Where pieces are the parameters themselves, autograd would add to them; else they
                # look into a local sum, which leaves with this backward.
                for piece in collection.group.pieces:
                    piece.grad = None
        self._stepped = False

    def collect(self, group: FlatGroup, index: int) -> None:
        """Take the gradient that autograd has just finished for one parameter."""
        parameter = group.entries[index].parameter
        gradient = arrived_gradient(parameter.grad)
        if gradient is None:
            return
        parameter.grad = None
        collection = self._by_group[group]
        collection.used.add(index)
        if not self._reducing:
            self._add_local(collection, index, gradient)
            return
        if collection.launched:
            # A module that a re-entrant checkpoint runs twice: a second, late share.
            collection.launched = False
            collection.arrived.clear()
        self._take_send_buffer(collection)
        collection.put(index, gradient)
        if collection.is_complete:
            self._launch_ready()

    def leave_behind(self, groups: Sequence[FlatGroup]) -> None:
        """The backward has come to the unit of `groups`: what it has passed gets no more gradients.

        Reductions of groups that lack some leave now, zeros standing in. At the end would be too
        late: a rank that has them all may wait for this one before it joins this one's next gather.
        """
        places = [self._place[group] for group in groups if group in self._place]
        if self._reducing and places:
            self._num_passed = max(self._num_passed, min(places))
            self._launch_ready()

    def finish(self) -> None:
        """End of the backward: send what is left, wait for all, hand the pieces their gradients."""
        if self._collecting:
            return
        if self._reducing:
            for collection in self._collections[self._next :]:
                self._launch(collection)
            self._next = len(self._collections)
            # Late shares of modules that ran twice.
            for collection in self._collections:
                if not collection.launched:
                    self._launch(collection)
            while self._in_flight:
                self._settle()
        self.tier.drain()
        for collection in self._collections:
            self._hand_over(collection)
            self._stand_ins.show(collection.group, collection.used)

    def heed_cleared(self) -> None:
        """Clear, in the pieces, what the user has cleared on parameters since the last backward."""
        cleared, everything = self._stand_ins.cleared()
        for group, index in cleared:
            collection = self._by_group[group]
            collection.used.discard(index)
            if collection.local is not None:
                group.slot_view(collection.local, group.layout.slots[index]).zero_()
        gone = set(cleared)
        for collection in self._collections if cleared else ():
            group = collection.group
            for piece, slot_piece in zip(group.pieces, group.piece_slots(), strict=True):
                if everything or (group, slot_piece.index) in gone:
                    piece.grad = None

    def refuse_replaced(self) -> None:
        """Before a step: gradients that the user has put on parameters would be ignored."""
        self._stand_ins.refuse_replaced()

    def let_go(self) -> None:
        """Leave nothing on the parameters: the engine gives its model back."""
        self._stand_ins.hide()

    def abandon(self) -> None:
        """An exception has cut a backward short: finish its reductions, lose its other gradients.

        As in plain PyTorch what has arrived stays, next to earlier backwards, until it is cleared.
        """
        while self._in_flight:
            self._settle()
        self.tier.drain()
        for collection in self._collections:
            collection.send = None
            collection.kept = {}

    def clear(self) -> None:
        """Forget every gradient, as zero_grad() does, and its memory."""
        self._stand_ins.hide()
        self._fresh.drop()
        for collection in self._collections:
            self._forget(collection)
            collection.send = None

    def flush(self) -> None:
        """Before a step: reduce what was only summed locally, if no backward has synced."""
        if not self.has_unreduced:
            return
        self._reducing = True
        self._next = 0
        for collection in self._collections:
            collection.arrived.clear()
            collection.launched = False
            for piece in collection.group.pieces if not collection.holds else ():
                # They look into a local sum, whose memory is used again once it has left.
                piece.grad = None
        self.finish()

    @property
    def has_unreduced(self) -> bool:
        """Whether there are gradients that no other rank has seen yet."""
        return any(collection.local is not None for collection in self._collections)

    def prepare_step(self) -> None:
        """Give the pieces gradients in their own dtype where those are kept in another."""
        for collection in self._collections:
            group = collection.group
            if group.grad is None or group.streams:
                continue
            if not collection.shows_gradients:
                for piece, values in piece_values(group, group.grad):
                    piece.grad = values.to(piece.dtype)

    def used_mask(self) -> list[bool]:
        """For every parameter of every travelling group: has it had a gradient for this step?"""
        return [
            index in collection.used
            for collection in self._collections
            for index in range(len(collection.group.entries))
        ]

    def drop_unused(self, used: Sequence[bool]) -> None:
        """Give parameters without a gradient on any rank None, as plain PyTorch does."""
        start = 0
        for collection in self._collections:
            slots = collection.group.piece_slots()
            for piece, slot_piece in zip(collection.group.pieces, slots, strict=True):
                if not used[start + slot_piece.index]:
                    piece.grad = None
            num_entries = len(collection.group.entries)
            collection.used_anywhere = {i for i in range(num_entries) if used[start + i]}
            start += num_entries

    def has_gradient(self, group: FlatGroup, index: int) -> bool:
        """Whether any rank has a gradient of a parameter; known once a step is ready."""
        collection = self._by_group.get(group)
        if collection is None:
            return group.entries[index].parameter.grad is not None
        return index in collection.used_anywhere

    def mark_used(self, group: FlatGroup, index: int) -> None:
        """The user gives a parameter a gradient, on every rank."""
        if group in self._by_group:
            self._by_group[group].used_anywhere.add(index)

    def end_step(self) -> None:
        """After a step: copies that were made for it are freed."""
        self._stepped = True
        for collection in self._collections:
            if not collection.shows_gradients:
                self._forget(collection)
                for piece in collection.group.pieces:
                    piece.grad = None

    def _user_has_cleared(self) -> bool:
        """Whether gradients were set to None since the last backward, here or by what is usual.

        A rank that holds no piece cannot see it: it goes by whether a step was taken.
        """
        pieces = [piece for collection in self._collections for piece in collection.group.pieces]
        return any(piece.grad is None for piece in pieces) if pieces else self._stepped

    def _forget_cleared(self, collection: Collection) -> None:
        """Clear the sums of what the user has cleared: normally all, or what an optimizer holds."""
        group = collection.group
        held = zip(group.pieces, group.piece_slots(), strict=True)
        kept = {slot_piece.index for piece, slot_piece in held if piece.grad is not None}
        if not kept:
            self._forget(collection)
            return
        collection.used &= kept
        for index, slot in enumerate(group.layout.slots):
            if index not in kept and collection.local is not None:
                group.slot_view(collection.local, slot).zero_()
        with self.tier.in_memory(group, modify=True) as gradient:
            if gradient is not None:
                for piece, values in piece_values(group, gradient):
                    if piece.grad is None:
                        values.zero_()

    def _forget(self, collection: Collection) -> None:
        collection.holds = False
        collection.used.clear()
        self._drop_local(collection)

    def _take_send_buffer(self, collection: Collection) -> None:
        if collection.send is None:
            group = collection.group
            collection.send = self._pool.take(group.layout.padded_numel, group.dtypes.wire)

    def _add_local(self, collection: Collection, index: int, gradient: Tensor) -> None:
        group = collection.group
        if collection.local is None:
            collection.local = self._pool.take(group.layout.padded_numel, group.dtypes.accumulate)
            collection.local.zero_()
        group.slot_view(collection.local, group.layout.slots[index]).add_(gradient)

    def _drop_local(self, collection: Collection) -> None:
        if collection.local is not None:
            local, collection.local = collection.local, None
            self._pool.give(local)

    def _launch_ready(self) -> None:
        while self._next < len(self._collections):
            collection = self._collections[self._next]
            if collection.launched:
                return
            if not collection.is_complete and self._next >= self._num_passed:
                return
            self._launch(collection)
            self._next += 1

    def _launch(self, collection: Collection) -> None:
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            self._settle()
        for reduction in self._in_flight:
            self._advance(reduction)
        group = collection.group
        self._take_send_buffer(collection)
        send = collection.send
        if send is None:
            raise EngineError(f"{group.name} has no send buffer.")
        for start, stop in group.layout.gaps():
            send[start:stop].zero_()
        for index in range(len(group.layout.slots)):
            if index not in collection.arrived:
                collection.target(index).zero_()
        if collection.local is not None:
            collection.settle_kept()
            send.add_(collection.local, alpha=collection.early_scale)
            self._drop_local(collection)
        collection.launched = True
        collection.send = None
        kept, collection.kept = collection.kept, {}
        receive = self._pool.take(send.numel(), send.dtype)
        shares = reduce_scatter_flat(
            send, group=collection.ranks, journal=self._journal, receive=receive
        )
        self._in_flight.append(InFlight(collection, send, receive, shares, kept))

    def _advance(self, reduction: InFlight) -> None:
        """Start the second half of a reduction over replicas, once the first has arrived."""
        group = reduction.collection.group
        if group.axes.replica.is_identity or reduction.summed is not None:
            return
        if group.axes.reduce.is_identity:
            # Stage 0: each replica sums a slice; the slices come together where the shares arrived,
            # in the slice that is this rank's own and that nobody has written.
            mine = reduction.collection.own_slice(reduction.receive)
            reduction.sum_shares(out=mine, accumulate=False, scale=1.0)
            reduction.summed = all_gather_flat(
                reduction.receive, group=group.axes.replica, journal=self._journal
            )
            return
        mine = torch.empty(group.layout.part_numel, dtype=group.dtypes.wire, device=group.device)
        reduction.sum_shares(out=mine, accumulate=False, scale=1.0)
        reduction.summed = all_reduce_flat(mine, group=group.axes.replica, journal=self._journal)

    def _settle(self) -> None:
        """Finish the oldest reduction: its mean over all data-parallel ranks joins group.grad."""
        reduction = self._in_flight.popleft()
        self._advance(reduction)
        collection = reduction.collection
        send, receive = reduction.send, reduction.receive
        self.tier.open(collection.group, holds=collection.holds)
        if self._is_the_mean(reduction):
            collection.group.grad, receive = receive, collection.group.grad
        else:
            self._add_mean(reduction)
        collection.holds = True
        self.tier.close(collection.group)
        if self.watcher is not None and self._is_last:
            self.watcher.reduced(collection.group)
        del reduction
        self._pool.give(send)
        if receive is not None:
            self._pool.give(receive)

    def _is_the_mean(self, reduction: InFlight) -> bool:
        """Whether the buffer that arrived can become group.grad as it is, without a copy."""
        collection, summed = reduction.collection, reduction.summed
        if summed is None or collection.holds or collection.late_scale != 1.0:
            return False
        if collection.group.gradient_cell is not None:
            return False
        arrived = summed.wait()
        return arrived is reduction.receive and arrived.dtype == collection.group.dtypes.accumulate

    def _add_mean(self, reduction: InFlight) -> None:
        collection = reduction.collection
        group = collection.group
        if group.grad is None:
            group.grad = torch.empty(
                group.layout.part_numel, dtype=group.dtypes.accumulate, device=group.device
            )
        scale, holds = collection.late_scale, collection.holds
        if reduction.summed is None:
            reduction.sum_shares(out=group.grad, accumulate=holds, scale=scale)
        else:
            summed = reduction.summed.wait()
            sum_parts([summed], out=group.grad, accumulate=holds, scale=scale)

    def _grad_of(self, group: FlatGroup) -> Tensor:
        if group.grad is None:
            raise EngineError(f"{group.name} has no gradient buffer.")
        return group.grad

    def _hand_over(self, collection: Collection) -> None:
        """Let the pieces show this rank's part of the sum so far."""
        group = collection.group
        if not collection.shows_gradients:
            # Nothing to read before `prepare_step`, but something to clear.
            for piece in group.pieces:
                piece.grad = placeholder_of(piece.shape, dtype=piece.dtype, device=piece.device)
            return
        if collection.holds:
            source = self._grad_of(group)
        elif collection.local is not None:
            source = group.part_of(collection.local)
        else:
            return
        for piece, values in piece_values(group, source):
            piece.grad = values
