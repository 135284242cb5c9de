"""A tensor that a save will read, and that the training may have to change before.

    training    save begins ---- forward, backward ---- secure, step
    save                 read, write, read, write, ...     read the copies

Nothing is copied when the save begins: values change at the next optimizer step, and what has been
written by then need never be copied. `secure` copies the rest.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_speed.errors import CheckpointError


class Held:
    """One value: read once, by the thread that saves; secured by the one that trains.

    Args:
        value: of a tensor that is in memory; not copied.
        name: for messages.
        owners: what others change the same memory through: parameters whose data it is.
    """

    def __init__(self, value: Tensor, name: str, owners: Sequence[Tensor] = ()) -> None:
        self._value: Tensor | None = value
        self._name = name
        self._owners = owners
        self._version = self._count_changes(value)
        self._is_copy = False
        self._lock = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[Tensor]:
        """The value, which stays as it is until the block ends; once.

        Raises:
            CheckpointError: it was changed, and nobody had called `secure`.
        """
        with self._lock:
            value = self._value
            if value is None:
                raise RuntimeError(f"{self._name} was read before.")
            yield value
            self._value = None
            if self._has_changed(value):
                raise CheckpointError(
                    f"{self._name} was changed after the save began and before it was read. Change "
                    f"parameters through hf_speed.gathered(model), or call wait_for_save() first."
                )

    def secure(self) -> None:
        """From now on the tensor may change. Waits while it is being read."""
        with self._lock:
            value = self._value
            # One that has changed already is left to `reading`, which says so.
            if value is not None and not self._is_copy and not self._has_changed(value):
                self._value = value.detach().clone(memory_format=torch.contiguous_format)
                self._is_copy = True

    def _has_changed(self, value: Tensor) -> bool:
        return not self._is_copy and self._count_changes(value) != self._version

    def _count_changes(self, value: Tensor) -> int:
        """In-place operations so far; a parameter counts apart from its data."""
        return sum(each._version for each in (value, *self._owners))
