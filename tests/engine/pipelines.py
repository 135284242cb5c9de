"""Training a toy through a pipeline, and the plain loop over the same microbatches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from tests.engine.toys import (
    Batch,
    OptimizerMaker,
    adamw,
    global_batch,
    plain_parameters,
    speed,
    toy_model,
    whole_parameters,
)

NUM_LAYERS = 4
NUM_MICROBATCHES = 4
"""The toys' batches have four rows: one each."""


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        losses: (steps,).
        norms: (steps,) of the gradients, before they were clipped.
        parameters: name -> whole final values.
    """

    losses: Tensor
    norms: Tensor
    parameters: dict[str, Tensor]


def batches(kind: str, num_steps: int) -> list[Batch]:
    """The global batches of some steps."""
    return [global_batch(kind, step) for step in range(num_steps)]


def train_in_microbatches(
    model: nn.Module,
    steps: Sequence[Batch],
    *,
    count: int = NUM_MICROBATCHES,
    clip: float = 1e9,
    make_optimizer: OptimizerMaker = adamw,
) -> Trained:
    """Plain PyTorch in one process, a backward for each microbatch."""
    optimizer = make_optimizer(model.parameters())
    losses, norms = [], []
    for batch in steps:
        total = torch.zeros(())
        parts = {name: value.tensor_split(count) for name, value in batch.items()}
        for index in range(count):
            loss = model(**{name: part[index] for name, part in parts.items()}).loss / count
            loss.backward()
            total += loss.detach()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Trained(torch.stack(losses), torch.stack(norms), plain_parameters(model))


def pipeline_engine(
    model: nn.Module, *, stage: int = 1, mesh: Mapping[str, int] | None = None, **pipe: Any
) -> Engine:
    """An engine over two pipeline ranks, or a mesh of another shape."""
    config = speed(stage, mesh=mesh or {"pp": 2}, pipe={"microbatches": NUM_MICROBATCHES, **pipe})
    return Engine.attach(model, config)


def own_rows(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    """The rows of a global batch that this rank's pipeline is given."""
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    return {name: value.chunk(data.size)[data.rank] for name, value in batch.items()}


def train_pipeline(engine: Engine, steps: Sequence[Batch], *, clip: float = 1e9) -> Trained:
    """The same steps through an engine."""
    optimizer = adamw(engine.model.parameters())
    engine.bind_optimizer(optimizer)
    losses, norms = [], []
    for batch in steps:
        loss = engine.model(**own_rows(engine, batch)).loss
        engine.backward(loss)
        norms.append(engine.clip_grad_norm_(clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return Trained(torch.stack(losses), torch.stack(norms), whole_parameters(engine))


def toy(kind: str, **overrides: Any) -> nn.Module:
    """A toy with enough layers for a few stages."""
    return toy_model(kind, num_layers=NUM_LAYERS, **overrides)
