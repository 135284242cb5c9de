"""Where a flat buffer lives: in a tensor at hand, or under a key in a store.

A cell is what the walks through gather, reduce and step see of a memory tier. `view` is the memory
itself where it can be addressed; elsewhere values come with `fetch` and go with `commit`, both
asynchronous.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_speed.errors import EngineError
from hf_speed.offload import DONE, Store, Ticket
from hf_speed.ops.aio import aligned_empty

_LARGE_BYTES = 1 << 20


class Cell(Protocol):
    """One flat buffer on a tier."""

    @property
    def numel(self) -> int:
        """Elements."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of every element."""
        ...

    @property
    def device(self) -> torch.device | None:
        """Of `view`; None where the memory cannot be addressed. Waits for nothing."""
        ...

    def view(self) -> Tensor | None:
        """(numel,) the memory itself, nothing in flight on it; None where it has no address."""
        ...

    def fetch(self, out: Tensor, start: int = 0) -> Ticket:
        """Start to read [start, start + out.numel()) into `out`."""
        ...

    def commit(self, value: Tensor, start: int = 0) -> Ticket:
        """Start to write `value`, which must not change before the ticket is done."""
        ...

    def free(self) -> None:
        """Give the memory back."""
        ...


class TensorCell:
    """A buffer that is a tensor: device memory that the engine holds anyway."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def numel(self) -> int:
        """Elements."""
        return self._tensor.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of every element."""
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        """Of the tensor."""
        return self._tensor.device

    def view(self) -> Tensor:
        """The tensor."""
        return self._tensor

    def fetch(self, out: Tensor, start: int = 0) -> Ticket:
        """Copy, in the order of the current stream."""
        out.copy_(self._tensor[start : start + out.numel()])
        return DONE

    def commit(self, value: Tensor, start: int = 0) -> Ticket:
        """Copy, in the order of the current stream."""
        self._tensor[start : start + value.numel()].copy_(value)
        return DONE

    def free(self) -> None:
        """It goes with its last reference."""


class StoreCell:
    """A buffer under a key of a store. It is made of zeros, and freed by `free`."""

    def __init__(self, store: Store, key: str, numel: int, dtype: torch.dtype) -> None:
        store.allocate(key, numel, dtype)
        self._store = store
        self._key = key
        self._numel = numel
        self._dtype = dtype

    @property
    def numel(self) -> int:
        """Elements."""
        return self._numel

    @property
    def dtype(self) -> torch.dtype:
        """Of every element."""
        return self._dtype

    @property
    def device(self) -> torch.device | None:
        """The store's, unless it is a disk."""
        return None if self._store.tier == "disk" else self._store.device

    def view(self) -> Tensor | None:
        """The store's memory, where it is addressable."""
        return self._store.view(self._key)

    def fetch(self, out: Tensor, start: int = 0) -> Ticket:
        """Start to read into `out`."""
        return self._store.fetch(self._key, out, start)

    def commit(self, value: Tensor, start: int = 0) -> Ticket:
        """Start to write `value`."""
        return self._store.commit(self._key, value, start)

    def free(self) -> None:
        """Give the memory back to the tier."""
        self._store.free(self._key)

    def twin(self) -> "StoreCell":
        """Another buffer of the same size on the same tier."""
        return StoreCell(self._store, f"{self._key}/twin", self._numel, self._dtype)


def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(numel,) contents undefined, for values that pass through memory and leave it again.

    Large ones on the host are mappings of their own: freed, they are gone, where a heap would keep
    holes of their size; and they begin on a page, so that a disk moves them without a copy.
    """
    if device.type == "cpu" and numel * dtype.itemsize >= _LARGE_BYTES:
        return aligned_empty(numel, dtype)
    return torch.empty(numel, dtype=dtype, device=device)


class GroupTiers(NamedTuple):
    """The stores of one group's buffers; None is the device's own memory.

    Attributes:
        parameters: of working values while no module computes with them.
        optimizer: of masters (where they are kept apart) and of the optimizer's states.
        gradients: of the reduced gradient.
        streams: whether updates run chunk by chunk through cells, and not in the optimizer's own
            step: always where a store is given.
    """

    parameters: Store | None = None
    optimizer: Store | None = None
    gradients: Store | None = None
    streams: bool = False


ON_DEVICE = GroupTiers()
"""Nothing is offloaded."""


class ShadowedCell:
    """A buffer and a second one of its size, for values that may yet be refused.

    Readers see the first. A background update writes the second; `accept` makes it the first.
    """

    def __init__(self, primary: Cell, shadow: Cell) -> None:
        self.primary = primary
        self._owns_memory = isinstance(primary, TensorCell)
        self.shadow = shadow

    @property
    def numel(self) -> int:
        """Elements."""
        return self.primary.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of every element."""
        return self.primary.dtype

    @property
    def device(self) -> torch.device | None:
        """Of both buffers."""
        return self.primary.device

    def view(self) -> Tensor | None:
        """The first buffer's memory, until `accept`."""
        return self.primary.view()

    def fetch(self, out: Tensor, start: int = 0) -> Ticket:
        """Read the first."""
        return self.primary.fetch(out, start)

    def commit(self, value: Tensor, start: int = 0) -> Ticket:
        """Write the first."""
        return self.primary.commit(value, start)

    def free(self) -> None:
        """Give both back."""
        self.primary.free()
        self.shadow.free()

    def accept(self) -> None:
        """The second becomes the first. Views of it have to be asked for anew.

        A tensor that others look into, as working values do, stays and is written to.
        """
        values = self.shadow.view()
        if self._owns_memory and values is not None:
            self.primary.commit(values)
        else:
            self.primary, self.shadow = self.shadow, self.primary


def twin_of(cell: Cell) -> Cell:
    """A second buffer of zeros like a cell's, on the same tier."""
    if isinstance(cell, StoreCell):
        return cell.twin()
    view = cell.view()
    if view is None:
        raise EngineError("Only a buffer in a store or in memory has a twin.")
    return TensorCell(torch.zeros_like(view))
