"""Buffers of a saved model (running statistics, router biases): every rank knows all of them.

A pipeline rank has those of its own stages; the others are brought to it when they are asked for.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.mesh.collectives import broadcast_flat

if TYPE_CHECKING:
    from hf_speed.engine.engine import Engine


class BufferRecord(NamedTuple):
    """One persistent buffer of the whole model.

    Attributes:
        name: full name.
        shape: of the buffer.
        dtype: as it came.
        stages: pipeline ranks that have it, the first of which counts; empty: all have it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stages: tuple[int, ...]


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of the modules here that belong in a saved model, by full name."""
    kept = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def full_buffers(engine: "Engine") -> Iterator[tuple[str, Tensor]]:
    """The buffers of the whole model that belong in a saved one. Collective.

    One broadcast over `pp` of each that some stages only have.
    """
    mesh = engine.mesh
    here = dict(persistent_buffers(engine.model))
    for name, shape, dtype, stages in engine.parts.division.buffers:
        if not stages:
            yield name, here[name]
            continue
        value = torch.empty(shape, dtype=dtype, device=mesh.device)
        if name in here:
            value.copy_(here[name])
        if value.numel():
            broadcast_flat(
                value.view(-1).view(torch.uint8),
                group=mesh.axis("pp"),
                journal=mesh.journal,
                source=stages[0],
            )
        yield name, value
