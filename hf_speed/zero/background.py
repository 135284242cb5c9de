"""Updates that run while something else does, on buffers of their own, to be accepted or refused.

speculative   a group's update starts when its gradient has been reduced, while the backward goes
              on. At the step it is accepted if what it assumed holds: no clipping, every parameter
              used, the same hyperparameters, no other backward. Else the old values are still
              there, and the step is done with what is true. Numbers are those of a plain step.
delayed       the update of step t runs during the forward and backward of step t+1, and is
              accepted at the end of that. Numbers differ: gradients are one step old
              (ZeRO-Offload, arXiv:2101.06840, section 5.2).
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from hf_speed.zero.cells import ShadowedCell
from hf_speed.zero.group import FlatGroup


class Assumed(NamedTuple):
    """What an update that has started takes for granted.

    Attributes:
        scale: factor on the gradient.
        settings: hyperparameters of every piece, and which pieces are left alone.
    """

    scale: float
    settings: tuple[Any, ...]


class _Running(NamedTuple):
    """A group's update under way."""

    assumed: Assumed
    future: Future[None]
    confirm: Callable[[], None]


class BackgroundUpdates:
    """One thread that updates groups in the order in which they are started.

    Args:
        shadowed: the cells of each group that an update writes.
    """

    def __init__(self, shadowed: Mapping[FlatGroup, Sequence[ShadowedCell]]) -> None:
        self.num_accepted = 0
        self.num_refused = 0
        self._shadowed = shadowed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_speed-update")
        self._running: dict[FlatGroup, _Running] = {}

    def start(
        self,
        group: FlatGroup,
        assumed: Assumed,
        update: Callable[[], None],
        confirm: Callable[[], None],
    ) -> None:
        """Begin to update a group whose gradient is final, or seems so.

        Args:
            group: refused first, where an update of it is under way.
            assumed: what `update` takes for granted.
            update: writes the second buffers; called in the thread.
            confirm: called once the update counts.
        """
        self.refuse(group)
        self._running[group] = _Running(assumed, self._thread.submit(update), confirm)

    @property
    def groups(self) -> list[FlatGroup]:
        """Those that have been started and not been settled."""
        return list(self._running)

    def accept(self, group: FlatGroup, expected: Assumed | None) -> bool:
        """Settle a group: True, and its new values count, if it was updated under `expected`.

        Args:
            group: started or not.
            expected: what turned out to be true; None: whatever was assumed.
        """
        found = self._running.pop(group, None)
        if found is None:
            return False
        found.future.result()
        if expected is not None and found.assumed != expected:
            self.num_refused += 1
            return False
        for cell in self._shadowed[group]:
            cell.accept()
        group.look_again()
        found.confirm()
        self.num_accepted += 1
        return True

    def refuse(self, group: FlatGroup) -> None:
        """Settle a group: its new values are dropped."""
        found = self._running.pop(group, None)
        if found is not None:
            found.future.result()
            self.num_refused += 1

    def refuse_all(self) -> None:
        """Drop everything that is under way."""
        for group in self.groups:
            self.refuse(group)

    def close(self) -> None:
        """Drop everything and end the thread."""
        self.refuse_all()
        self._thread.shutdown()
