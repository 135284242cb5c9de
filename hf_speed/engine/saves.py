"""An engine's saves: made on first use, shared with engines that are saved together."""

import time

from hf_speed.checkpoint.saver import Save, Saver
from hf_speed.engine.assemble import Parts
from hf_speed.mesh import AXES, Lane


class Saves:
    """Runs the saves of one engine, behind the training where checkpoint.asynchronous says so."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._own: Saver | None = None
        self._joined: Saver | None = None
        self.secured_s = 0.0
        """Seconds for which `secure` has kept the training, in all."""

    @property
    def are_behind(self) -> bool:
        """Whether a save is still being written when the call that began it returns."""
        return self._parts.config.asynchronous

    def begin(self, what: str) -> Save:
        """Start a save, after the one in flight. Collective.

        Raises:
            CheckpointError: on every rank; the one before has failed.
        """
        return self._made().begin(what)

    def at_once(self, what: str) -> Save:
        """Start a save that is written when its calls return. Collective.

        Raises:
            CheckpointError: on every rank; the one before has failed.
        """
        self.wait()
        return Saver(self._parts.mesh.world, is_behind=False).begin(what)

    def join(self, other: "Saves") -> None:
        """Be part of saves that another engine begins: their failures are told here too."""
        self._joined = other._made() if other is not self else None

    def check(self) -> None:
        """Make ready for a step; raise, at the same one on every rank, if a save has failed.

        Raises:
            CheckpointError: a save has failed.
        """
        self.secure()
        for saver in self._savers:
            saver.check()

    def secure(self, *, when: bool = True) -> None:
        """Copy what the save in flight has still to read, where that is about to change."""
        if not when:
            return
        begin = time.perf_counter()
        for saver in self._savers:
            saver.secure()
        self.secured_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Block until no save is in flight. Collective.

        Raises:
            CheckpointError: on every rank; a save has failed.
        """
        for saver in self._savers:
            saver.wait()

    @property
    def _savers(self) -> list[Saver]:
        return [each for each in (self._own, self._joined) if each is not None]

    def _made(self) -> Saver:
        if self._own is None:
            mesh = self._parts.mesh
            group = mesh.axis(*AXES, lane=Lane.SAVE) if self.are_behind else mesh.world
            self._own = Saver(group, is_behind=self.are_behind)
        return self._own
