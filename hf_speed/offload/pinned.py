"""Page-locking memory for a GPU, in place."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from hf_speed.errors import OffloadError


class Pins:
    """The memory that one owner has locked; unlocked again by `remove` or `clear`."""

    def __init__(self) -> None:
        self._locked: set[int] = set()

    def add(self, memory: Tensor) -> None:
        """Lock the pages of a CPU tensor, which must stay alive until they are unlocked.

        Raises:
            OffloadError: the driver refuses.
        """
        if memory.nbytes == 0:
            return
        status = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if status != 0:
            # CUDA keeps the error for whoever asks next: let that be this launch.
            if torch.cuda.is_initialized():
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
            raise OffloadError(
                f"CUDA cannot lock {memory.nbytes} bytes of host memory (error {status}). "
                f"Raise the limit of locked memory (ulimit -l), or give the host tier less."
            )
        self._locked.add(memory.data_ptr())

    def remove(self, memory: Tensor) -> None:
        """Unlock what `add` locked."""
        self._unlock(memory.data_ptr())

    def clear(self) -> None:
        """Unlock everything."""
        for address in list(self._locked):
            self._unlock(address)

    def _unlock(self, address: int) -> None:
        if address in self._locked:
            self._locked.remove(address)
            _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    """The functions of the CUDA runtime that torch shows."""
    return torch.cuda.cudart()
