"""How many bytes of tensor storage are alive in this process, found by walking all Python objects.

It knows nothing of any engine: every tensor that Python can reach is found, each storage is counted
once, whole, however many views there are. A tensor held only from C++ (a bucket of DDP) is not
seen; gradients, whose Python object may not exist yet, are asked for by name.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _storage(tensor: Tensor) -> tuple[int, int] | None:
    """Give (address, bytes) of a tensor's storage, or None where it has none of its own."""
    is_fake = type(tensor) is FakeTensor or tensor.device.type == "meta"
    if is_fake or is_traceable_wrapper_subclass(tensor):
        # No memory; or a DTensor, whose local tensor is another object, and is counted there.
        return None
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return None


def live_storages(model: nn.Module | None = None, *, collect: bool = True) -> dict[int, int]:
    """Give the bytes of every storage that live tensors of this process keep, by address.

    Args:
        model: its parameters' gradients are counted even where no Python object holds them yet.
        collect: let the garbage collector free unreachable cycles first.
    """
    held = [] if model is None else [p.grad for p in model.parameters() if p.grad is not None]
    if collect:
        gc.collect()
    # type(), not isinstance: isinstance wakes lazy proxies that libraries leave in the heap.
    return storages_of(x for x in [*gc.get_objects(), *held] if issubclass(type(x), Tensor))


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Give the bytes of the storages under `tensors`, by address: views of one count once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = _storage(tensor)
        if storage is not None and storage[0] != 0:
            found[storage[0]] = max(found.get(storage[0], 0), storage[1])
    return found


def live_bytes(model: nn.Module | None = None, *, collect: bool = True) -> int:
    """Add up `live_storages`."""
    return sum(live_storages(model, collect=collect).values())
