"""Bringing the values of a unit here ahead of use, and letting them go again.

    forward    enter(k): wait for unit k, whose gather is in flight; start k+1; compute; leave(k)
    backward   the same in reverse, the saved weights being looked up in the newly gathered buffer
    step       invalidate: what was gathered is stale

A gather is a fetch from the tier where this rank keeps its part, or the whole, and a collective
where parameters are divided. Fetches from a slow tier start one unit ahead of the collectives.

In training the order of gathers is the order of the units, whatever a rank's data makes it run: a
rank that skips a block still takes part in its gather, so ranks that take different paths do not
wait for each other for ever. A unit that runs a second time in one pass is gathered again then.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from torch import Tensor

from hf_speed.errors import EngineError
from hf_speed.logs import get_logger
from hf_speed.mesh.collectives import Pending, all_gather_flat
from hf_speed.mesh.journal import Journal
from hf_speed.offload import Ticket
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.pool import BufferPool
from hf_speed.zero.units import UnitPlan

_log = get_logger(__name__)

FETCHES_AHEAD = 1
"""Units fetched from a slow tier ahead of those whose collectives have started."""


class Order(Enum):
    """The direction in which a pass visits the units."""

    FORWARD = auto()
    BACKWARD = auto()
    ON_DEMAND = auto()


class GatherPolicy(NamedTuple):
    """How long units stay, and which are gathered.

    Attributes:
        regather: release units after the forward and gather them again in the backward.
        on_demand: gather a unit when it runs and no others: ranks run the same ones, but only some
            of them in a pass, as pipeline stages do.
    """

    regather: bool
    on_demand: bool = False


class Fetch(NamedTuple):
    """What this rank keeps of a group, on its way into a full buffer. As a gather: all of it."""

    group: FlatGroup
    full: Tensor
    tickets: Sequence[Ticket]

    def wait(self) -> Tensor:
        """The buffer, with what was fetched in it."""
        for ticket in self.tickets:
            ticket.wait()
        return self.full


class Unit:
    """A module and its flat groups. `pins` counts the scopes that need its values to stay."""

    def __init__(self, plan: UnitPlan, groups: Sequence[FlatGroup]) -> None:
        self.name = plan.name
        self.module = plan.module
        self.is_root = plan.is_root
        self.groups = tuple(groups)
        self.sharded = tuple(group for group in groups if group.is_sharded)
        self.pins = 0
        self.fetches: list[Fetch] = []
        self.pending: list[tuple[FlatGroup, Pending[Tensor] | Fetch]] = []
        self.is_open = False

    def __deepcopy__(self, memo: dict[int, object]) -> "Unit":
        """Copies of the model carry inert hooks, which only name the unit."""
        return self

    @property
    def in_flight(self) -> bool:
        """Whether its values are here or on their way."""
        return self.is_open or bool(self.pending)

    @property
    def is_far(self) -> bool:
        """Whether its values come from a tier that cannot be addressed, so that a fetch lasts."""
        return any(cell.device is None for group in self.sharded for cell in group.sources)


class SavedView(NamedTuple):
    """A saved tensor that looks into a gathered buffer, without keeping the buffer."""

    unit: Unit
    group: FlatGroup
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    version: int


class Gatherer:
    """Gathers and releases units in a fixed order.

    Args:
        units: in forward order, root last (it is gathered first).
        pool: where gathered buffers come from.
        journal: of the run.
        prefetch_units: how many units ahead of use a gather is started.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        pool: BufferPool,
        journal: Journal,
        prefetch_units: int,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._prefetch_units = prefetch_units
        self._order = [unit for unit in units if unit.sharded and not unit.is_root]
        self._root = [unit for unit in units if unit.sharded and unit.is_root]
        self._place = {unit: index for index, unit in enumerate(self._order)}
        self._direction = Order.ON_DEMAND
        self._next = 0
        self._by_storage: dict[int, tuple[Unit, FlatGroup]] = {}
        self._first_trainable = next(
            (i for i, unit in enumerate(self._order) if any(g.trainable for g in unit.groups)),
            len(self._order),
        )

    def begin(self, direction: Order) -> None:
        """Start a pass over the units."""
        self._direction = direction
        self._next = len(self._order) - 1 if direction is Order.BACKWARD else 0

    def finish(self, *, keeps: Callable[[Unit], bool] = lambda _: False) -> None:
        """End a pass: take part in the gathers that this rank did not need, and let those go.

        Args:
            keeps: units that stay for the backward, as on the ranks that ran them.
        """
        if self._direction is Order.FORWARD:
            self._start_through(len(self._order) - 1)
            for unit in self._order:
                if unit.pending and not keeps(unit):
                    self.leave(unit)
        elif self._direction is Order.BACKWARD:
            # Below the first trainable unit no rank's backward needs values.
            self._start_through(self._first_trainable)
        self._direction = Order.ON_DEMAND

    def enter(self, unit: Unit) -> None:
        """Return with the unit's values in place; start the gathers of those that follow."""
        self.announce(unit)
        self._open(unit)

    def announce(self, unit: Unit) -> None:
        """Start the gathers up to this unit and of those that follow; waits for none."""
        place = self._place.get(unit)
        if place is None:
            self._start(unit)
            self._start_ahead_of_root()
        elif self._direction is Order.BACKWARD:
            self._start_through(place)
            self._start(unit)
            self._start_through(max(place - self._prefetch_units, self._lowest()))
        elif self._direction is Order.FORWARD:
            self._start_through(place)
            self._start(unit)
            self._start_through(min(place + self._prefetch_units, len(self._order) - 1))
        else:
            self._start(unit)
            for ahead in self._order[place + 1 : place + 1 + self._prefetch_units]:
                self._start(ahead)

    def leave(self, unit: Unit) -> None:
        """Let go of a unit's values unless a scope holds on to them."""
        unused = [fetch.wait() for fetch in unit.fetches]
        unit.fetches.clear()
        for full in unused:
            self._pool.give(full)
        if unit.pins or not unit.in_flight:
            return
        self._open(unit)
        for group in unit.sharded:
            if group.full is not None:
                self._by_storage.pop(group.full.untyped_storage().data_ptr(), None)
            self._pool.give(group.close())
        unit.is_open = False

    def release_passed(self, unit: Unit) -> None:
        """In the backward: let go of the units after `unit`, which the pass has left behind."""
        place = self._place.get(unit, len(self._order))
        for passed in self._order[place + 1 :]:
            self.leave(passed)

    def release_all(self) -> None:
        """Let go of every unit that no scope holds."""
        for unit in (*self._order, *self._root):
            self.leave(unit)

    def invalidate(self) -> None:
        """After a step: gathered values are old. Units that a scope holds are gathered anew."""
        self.release_all()
        for unit in (*self._order, *self._root):
            for group in unit.sharded:
                group.version += 1
            if unit.pins:
                pins, unit.pins = unit.pins, 0
                self.leave(unit)
                unit.pins = pins
                self.enter(unit)

    def hold(self, units: Iterable[Unit]) -> None:
        """Gather units and keep them until `let_go`."""
        chosen = [unit for unit in units if unit.sharded]
        for unit in chosen:
            self._start(unit)
        for unit in chosen:
            self._open(unit)
            unit.pins += 1

    def let_go(self, units: Iterable[Unit]) -> None:
        """End a `hold`."""
        for unit in units:
            if unit.sharded:
                unit.pins -= 1
                self.leave(unit)

    def pack(self, saved: Tensor) -> Tensor | SavedView:
        """Autograd saves a tensor: keep where a gathered weight stands, not its memory."""
        found = self._by_storage.get(saved.untyped_storage().data_ptr())
        if found is None:
            return saved
        unit, group = found
        return SavedView(
            unit,
            group,
            int(saved.storage_offset()),
            tuple(saved.shape),
            saved.stride(),
            group.version,
        )

    def unpack(self, saved: Tensor | SavedView) -> Tensor:
        """Autograd needs it again: look it up in the buffer gathered for the backward."""
        if isinstance(saved, Tensor):
            return saved
        if saved.version != saved.group.version:
            raise EngineError(
                f"The weights of {saved.unit.name or 'the root unit'} were changed by an optimizer "
                f"step between this forward and its backward. Run the backward before the step."
            )
        if saved.group.full is None:
            _log.log_once(
                logging.WARNING,
                "%s is used in the backward at a place that its outputs do not announce: it is "
                "gathered a second time, without overlap.",
                saved.unit.name or "the root unit",
            )
            self._start(saved.unit)
            self._open(saved.unit)
        if saved.group.full is None:
            raise EngineError(f"{saved.unit.name} could not be gathered for its backward.")
        return saved.group.full.as_strided(saved.size, saved.stride, saved.offset)

    def _start_ahead_of_root(self) -> None:
        if self._prefetch_units and self._direction is Order.FORWARD:
            self._start_through(min(self._prefetch_units, len(self._order)) - 1)
        elif self._prefetch_units and self._direction is Order.BACKWARD:
            self._start_through(max(len(self._order) - self._prefetch_units, self._lowest()))

    def _lowest(self) -> int:
        return min(self._first_trainable, len(self._order))

    def _start_through(self, place: int) -> None:
        """Start, in order, every gather of this pass up to the unit at `place`."""
        if self._direction is Order.BACKWARD:
            while self._next >= place:
                self._start(self._order[self._next])
                self._next -= 1
            ahead = range(self._next, max(self._next - FETCHES_AHEAD, self._lowest() - 1), -1)
        else:
            while self._next <= place:
                self._start(self._order[self._next])
                self._next += 1
            ahead = range(self._next, min(self._next + FETCHES_AHEAD, len(self._order)))
        if self._prefetch_units:
            for index in ahead:
                self._fetch(self._order[index])

    def _fetch(self, unit: Unit) -> None:
        """Start to bring what this rank keeps of a unit, where that takes time."""
        if not (unit.in_flight or unit.fetches) and unit.is_far:
            self._fetch_now(unit)

    def _fetch_now(self, unit: Unit) -> None:
        for group in unit.sharded:
            full = self._pool.take(group.layout.padded_numel, group.layout.dtype)
            unit.fetches.append(Fetch(group, full, group.fetch_into(full)))

    def _start(self, unit: Unit) -> None:
        if unit.in_flight:
            return
        if not unit.fetches:
            self._fetch_now(unit)
        for fetch in unit.fetches:
            group = fetch.group
            gather: Pending[Tensor] | Fetch = fetch
            if group.divided:
                full = fetch.wait()
                gather = all_gather_flat(full, group=group.axes.gather, journal=self._journal)
            unit.pending.append((group, gather))
        unit.fetches.clear()

    def _open(self, unit: Unit) -> None:
        for group, gather in unit.pending:
            full = gather.wait()
            group.open(full)
            self._by_storage[full.untyped_storage().data_ptr()] = (unit, group)
        if unit.pending:
            unit.pending.clear()
            unit.is_open = True
