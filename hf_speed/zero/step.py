"""What happens around the user's own optimizer.step().

    before   reduce what is left, agree on overflow and on unused parameters, unscale
    step     torch's (or anyone's) optimizer updates this rank's pieces; or, where buffers live on
             several tiers, StreamedUpdates has done so before, and the optimizer finds nothing left
    after    parts travel to the other ranks (stages 0-2), or what was gathered is stale (3)

The optimizer object stays the user's: its param_groups are re-pointed at pieces, in place, so that
schedulers and loggers that hold it go on working.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hf_speed.errors import EngineError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import Pending, all_gather_flat, all_reduce_small
from hf_speed.mesh.journal import Journal
from hf_speed.zero.gather import Gatherer
from hf_speed.zero.gradients import PieceGradients, StreamedGradients
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.norm import any_overflow, global_norm
from hf_speed.zero.pool import BufferPool
from hf_speed.zero.precision import LossScaler
from hf_speed.zero.reduce import Reducer
from hf_speed.zero.stream import StreamedUpdates


class StepAxes(NamedTuple):
    """The ranks that a step deals with.

    Attributes:
        shard: hold different elements.
        data: see different batches.
        world: all of them: what overflows on one is skipped on all.
    """

    shard: AxisGroup
    data: AxisGroup
    world: AxisGroup


class Stepper:
    """Readies gradients for a step and spreads its result.

    Args:
        groups: all trainable groups.
        gatherer: told when gathered values are stale.
        reducer: brings the gradients.
        pool: of gathered buffers.
        scaler: of the loss, in fp16; None elsewhere.
        axes: the ranks that a step deals with.
        journal: of the run.
        device: of the gradients.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        *,
        gatherer: Gatherer,
        reducer: Reducer,
        pool: BufferPool,
        scaler: LossScaler | None,
        axes: StepAxes,
        journal: Journal,
        device: torch.device,
    ) -> None:
        self.was_skipped = False
        self.is_parked = False
        self.grad_norm: Tensor | None = None
        self._groups = tuple(groups)
        self._gatherer = gatherer
        self._reducer = reducer
        self._pool = pool
        self._streams = any(group.streams for group in groups)
        self.updates: StreamedUpdates | None = None
        self.gradients: PieceGradients | StreamedGradients = (
            StreamedGradients(self._groups, reducer.tier)
            if self._streams
            else PieceGradients(self._groups)
        )
        self._scaler = scaler
        self._axes = axes
        self._journal = journal
        self._device = device
        self._is_ready = False
        self._handles: list[RemovableHandle] = []

    def watch(self, optimizer: Optimizer, updates: StreamedUpdates | None) -> None:
        """Run before and after every step of `optimizer`, or, with `updates`, in its stead."""
        self.updates = updates
        self._reducer.watcher = self if updates is not None else None
        self._handles.append(optimizer.register_step_pre_hook(self._before))
        self._handles.append(optimizer.register_step_post_hook(self._after))

    def unwatch(self) -> None:
        """Leave the optimizer alone again."""
        self.updates = self._reducer.watcher = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward_begins(self) -> None:
        """Gradients will change."""
        if self.updates is not None:
            self.updates.backward_begins()

    def reduced(self, group: FlatGroup) -> None:
        """One group's gradient seems final."""
        if self.updates is not None:
            scale = 1.0 if self._scaler is None else 1.0 / self._scaler.scale
            self.updates.reduced(group, scale=scale)

    def settle(self) -> None:
        """Finish an update that runs since the last step, if one does. Collective."""
        self.check_not_parked()
        if self.updates is not None and self.updates.flush():
            self.spread()

    def check_not_parked(self) -> None:
        """Raise while the engine's memory is elsewhere."""
        if self.is_parked:
            raise EngineError(
                "The states of this engine are parked by hf_speed.offload_states(). Call "
                "hf_speed.reload_states() on every rank before a forward, a step or a save."
            )

    def make_ready(self) -> None:
        """Bring every gradient to its final value, once per step. Collective.

        One all-reduce of a byte per parameter: which parameters had a gradient on any rank, and
        whether any rank's gradients overflowed.

        Raises:
            EngineError: the user has put a gradient on a parameter.
        """
        self._reducer.refuse_replaced()
        self._reducer.heed_cleared()
        if self._is_ready:
            return
        self._is_ready = True
        self._reducer.flush()
        self._reducer.prepare_step()
        mask = self._reducer.used_mask()
        flags = torch.tensor([False, *mask], dtype=torch.uint8).to(self._device)
        if self._scaler is not None:
            norms = self.gradients.norms(float("inf"))
            flags[0] = any_overflow(norms, device=self._device).to(torch.uint8)
        if mask or self._scaler is not None:
            all_reduce_small(
                flags, group=self._axes.data, journal=self._journal, op=dist.ReduceOp.MAX
            )
        if self._scaler is not None and self._axes.world.size > self._axes.data.size:
            all_reduce_small(
                flags[:1], group=self._axes.world, journal=self._journal, op=dist.ReduceOp.MAX
            )
        overflowed, *used = flags.tolist()
        self._reducer.drop_unused([bool(each) for each in used])
        self.was_skipped = bool(overflowed)
        if self._scaler is not None and not self.was_skipped:
            self.gradients.scale(1.0 / self._scaler.scale)

    def clip_norm(self, max_norm: float, norm_type: float) -> Tensor:
        """Scale gradients so that their global norm is at most `max_norm`; returns the norm before.

        Collective. 0-d fp32.
        """
        self.make_ready()
        norms = self.gradients.norms(norm_type)
        norm = global_norm(
            norms,
            norm_type=norm_type,
            group=self._axes.shard,
            journal=self._journal,
            device=self._device,
        )
        self.grad_norm = norm
        if not self.was_skipped:
            self.gradients.scale(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def clip_value(self, value: float) -> None:
        """Clamp every element of every gradient to [-value, value]. No collective of its own."""
        self.make_ready()
        if not self.was_skipped:
            self.gradients.clamp(value)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise EngineError(
                f"{type(optimizer).__name__}.step(closure) computes gradients after hf_speed has "
                f"made them ready. Call backward first, then step() without a closure."
            )
        self.check_not_parked()
        self.make_ready()
        if self.updates is not None and not self.was_skipped:
            scale = self.gradients.factor if isinstance(self.gradients, StreamedGradients) else 1.0
            self.updates.run(scale=scale)
        if self.was_skipped or self.updates is not None:
            # Optimizers leave a parameter without a gradient alone, counters included.
            for group in self._groups:
                for piece in group.pieces:
                    piece.grad = None

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:  # noqa: ARG002
        if self._scaler is not None:
            self._scaler.update(overflowed=self.was_skipped)
        self._reducer.end_step()
        self.gradients.reset()
        self._is_ready = False
        if not self.was_skipped:
            self.spread()

    def spread(self) -> None:
        """Bring the working values of all ranks up to date with the masters. Collective."""
        pending: list[Pending[Tensor]] = []
        for group in self._groups:
            if group.full is None or not group.resident:
                continue
            mine = group.part_of(group.full)
            # A streamed update has written working values too.
            if not group.streams and mine.data_ptr() != group.master.data_ptr():
                mine.copy_(group.master)
            pending.append(
                all_gather_flat(group.full, group=group.axes.gather, journal=self._journal)
            )
        for each in pending:
            each.wait()
        for group in self._groups:
            if group.sources and not group.divided:
                self._spread_stored(group)
        self._gatherer.invalidate()

    def _spread_stored(self, group: FlatGroup) -> None:
        """Every rank keeps the whole on a tier: bring the other parts there."""
        ranks = group.axes.gather
        if ranks.is_identity:
            return
        full = self._pool.take(group.layout.padded_numel, group.layout.dtype)
        group.own_source.fetch(group.part_of(full)).wait()
        all_gather_flat(full, group=ranks, journal=self._journal).wait()
        tickets = []
        for part, source in enumerate(group.sources):
            if part != ranks.rank:
                first, last = group.layout.interval(part)
                tickets.append(source.commit(full[first:last]))
        for ticket in tickets:
            ticket.wait()
        self._pool.give(full)

    @contextmanager
    def exposed(self, group: FlatGroup, *, modify: bool = False) -> Iterator[None]:
        """Masters and optimizer states of a group in memory inside, wherever they live.

        Args:
            group: trainable.
            modify: keep changes.
        """
        if self.updates is None:
            with group.in_memory(modify=modify):
                yield
        else:
            with self.updates.exposed(group, modify=modify):
                yield

    def forget_gradients(self) -> None:
        """A new backward has begun: what was readied for a step no longer is."""
        self._is_ready = False


def repoint(
    optimizer: Optimizer,
    pieces_of: Mapping[nn.Parameter, Sequence[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]],
    shapes: Mapping[nn.Parameter, Sequence[int]],
) -> None:
    """Replace the parameters in `optimizer.param_groups` by their pieces on this rank, in place.

    Args:
        optimizer: any torch optimizer; state that it has already is cut like the parameter.
        pieces_of: parameter -> its pieces here (none, or one), each with the function that cuts the
            piece's part out of a tensor of the parameter's shape.
        shapes: parameter -> shape of the whole, which its states have.
    """
    for group in optimizer.param_groups:
        replaced: list[nn.Parameter] = []
        for parameter in group["params"]:
            if parameter not in pieces_of:
                replaced.append(parameter)
                continue
            state = optimizer.state.pop(parameter, None)
            for piece, cut in pieces_of[parameter]:
                replaced.append(piece)
                if state:
                    optimizer.state[piece] = _cut_state(state, shapes[parameter], cut)
        group["params"][:] = replaced


def _cut_state(
    state: Mapping[str, Any], shape: Sequence[int], cut: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    return {
        key: cut(value).clone()
        if isinstance(value, Tensor) and value.shape == tuple(shape)
        else value
        for key, value in state.items()
    }
