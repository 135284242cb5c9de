"""Parking an engine between phases: its device memory goes to another tier, and comes back.

    hf_speed.offload_states(model)         # then use the device for another model
    hf_speed.reload_states(model)

While an engine is parked, parameters are released (reading one raises), the optimizer's states are
placeholders, and forward, step and save raise. What lives on the host or a disk anyway stays there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_speed.engine.assemble import Parts
from hf_speed.offload import Store
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.parameter import placeholder_of


class _State(NamedTuple):
    """An optimizer state that is away."""

    piece: Any
    kind: str
    key: str
    like: Tensor


class ParkedStates:
    """What `park` took from the device, and the way back.

    Args:
        parts: of the engine.
        optimizer: bound to it, or None.
        store: where everything goes; closed by `reload`.
    """

    def __init__(self, parts: Parts, optimizer: Optimizer | None, store: Store) -> None:
        self._parts = parts
        self._store = store
        self._buffers: list[tuple[Tensor, str, int]] = []
        self._states: list[_State] = []
        self.num_bytes = 0
        parts.gatherer.release_all()
        parts.reducer.clear()
        for group in parts.groups:
            self._park_group(group)
        if optimizer is not None:
            self._park_states(optimizer)
        parts.pool.clear()

    def _park_group(self, group: FlatGroup) -> None:
        for piece in group.pieces:
            piece.grad = None
        group.grad = None
        for index, buffer in enumerate(group.device_buffers()):
            self._park_buffer(buffer, f"{group.name}/{index}")
        group.park()

    def _park_buffer(self, buffer: Tensor, key: str) -> None:
        """Copy a buffer away and free its memory; the tensor object stays for `reload`."""
        self._send(buffer, key)
        storage = buffer.untyped_storage()
        self._buffers.append((buffer, key, storage.nbytes()))
        storage.resize_(0)

    def _send(self, values: Tensor, key: str) -> None:
        flat = values.detach().reshape(-1)
        self._store.allocate(key, flat.numel(), flat.dtype)
        self._store.commit(key, flat).wait()
        self.num_bytes += flat.nbytes

    def _park_states(self, optimizer: Optimizer) -> None:
        for index, (piece, kind, value) in enumerate(_held_states(optimizer)):
            key = f"state.{index}"
            self._send(value, key)
            self._states.append(_State(piece, kind, key, torch.empty_like(value, device="meta")))
            optimizer.state[piece][kind] = placeholder_of(
                value.shape, dtype=value.dtype, device=value.device
            )

    def reload(self, optimizer: Optimizer | None) -> None:
        """Bring everything back to the device."""
        for buffer, key, num_bytes in self._buffers:
            buffer.untyped_storage().resize_(num_bytes)
            self._store.fetch(key, buffer.view(-1)).wait()
        for group in self._parts.groups:
            group.unpark()
        if optimizer is not None:
            for piece, kind, key, like in self._states:
                value = torch.empty_like(like, device=optimizer.state[piece][kind].device)
                self._store.fetch(key, value.view(-1)).wait()
                optimizer.state[piece][kind] = value
        self._store.close()


def _held_states(optimizer: Optimizer) -> Iterator[tuple[Any, str, Tensor]]:
    """Tensors of the optimizer's own memory: not views into stores, not placeholders."""
    for piece, state in list(optimizer.state.items()):
        for kind, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim() and _owns_memory(value):
                yield piece, kind, value


def _owns_memory(value: Tensor) -> bool:
    return value.numel() > 0 and value.untyped_storage().nbytes() == value.nbytes
