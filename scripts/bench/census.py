"""How many bytes of tensor storage are alive in this process, found by walking all Python objects.

It knows nothing of any engine: every tensor that Python can reach is found, each storage is counted
once, whole, however many views there are. A tensor held only from C++ (a bucket of DDP) is not
seen; gradients, whose Python object may not exist yet, are asked for by name.
"""

from __future__ import annotations

import gc

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _storage(tensor: Tensor) -> tuple[int, int] | None:
    """Give (address, bytes) of a tensor's storage, or None where it has none of its own."""
    if is_traceable_wrapper_subclass(tensor) or tensor.device.type == "meta":
        # A DTensor: its local tensor is another object, and is counted there.
        return None
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return None


def live_bytes(model: nn.Module | None = None, *, collect: bool = True) -> int:
    """Count the bytes of all storages that live tensors of this process keep.

    Args:
        model: its parameters' gradients are counted even where no Python object holds them yet.
        collect: let the garbage collector free unreachable cycles first.
    """
    held = [] if model is None else [p.grad for p in model.parameters() if p.grad is not None]
    if collect:
        gc.collect()
    found: dict[int, int] = {}
    for item in [*gc.get_objects(), *held]:
        # type(), not isinstance: isinstance wakes lazy proxies that libraries leave in the heap.
        if not issubclass(type(item), Tensor):
            continue
        storage = _storage(item)
        if storage is not None and storage[0] != 0:
            found[storage[0]] = max(found.get(storage[0], 0), storage[1])
    return sum(found.values())
