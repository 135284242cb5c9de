"""Toys on any mesh: pipeline stages, slices of layers, data-parallel ranks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.engine import Engine
from hf_speed.integrations.transformers.slice_plan import plan_for
from tests.engine.toys import speed, toy_model

NUM_LAYERS = 4


class Mesh(NamedTuple):
    """Pipeline and slicing ranks; the world's others see different batches."""

    pp: int = 1
    tp: int = 1
    replicas: int = 1


PIPE, SLICES, BOTH = Mesh(2, 1), Mesh(1, 2), Mesh(2, 2)


def toy(kind: str = "llama", **overrides: Any) -> nn.Module:
    """Layers for two stages of two chunks, heads for two slices."""
    heads = {"num_key_value_heads": 2} if kind in ("llama", "qwen3") else {}
    return toy_model(kind, num_layers=NUM_LAYERS, **{**heads, **overrides})


def attach(
    model: nn.Module,
    mesh: Mesh,
    stage: int = 1,
    *,
    dtype: torch.dtype | None = None,
    pipe: Mapping[str, Any] | None = None,
    **sections: Mapping[str, Any],
) -> Engine:
    """An engine on `mesh`, two microbatches a batch where there is a pipeline.

    Args:
        model: of the toys.
        mesh: the ranks.
        stage: of ZeRO.
        dtype: that computes; None: the model's own.
        pipe: adds to the section of that name, where there is a pipeline.
        **sections: of the config.
    """
    if mesh.pp > 1:
        sections["pipe"] = {"microbatches": 2, **(pipe or {})}
    axes = {"pp": mesh.pp, "tp": mesh.tp, "dp_replicate": mesh.replicas}
    config = speed(stage, mesh=axes, **sections)
    return Engine.attach(model, config, compute_dtype=dtype, slice_planner=plan_for)


def own_rows(engine: Engine, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a global batch that this rank is given."""
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    return {name: value.chunk(data.size)[data.rank] for name, value in batch.items()}


def mean_over_data(engine: Engine, loss: Tensor) -> Tensor:
    """The mean of this rank's loss over the ranks that see other batches."""
    mean, data = loss.detach().float().clone(), engine.mesh.axis("dp_replicate", "dp_shard")
    if data.group is not None:
        torch.distributed.all_reduce(mean, group=data.group)
    return mean / data.size


def adamw_of(model: nn.Module) -> Optimizer:
    """Over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class Adapter(nn.Module):
    """A frozen linear and, beside it, two small ones that are trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.up(self.down(x))


def adapted(first: int, last: int) -> nn.Module:
    """A frozen model whose layers [first, last) have adapters."""
    model: Any = toy()
    model.requires_grad_(requires_grad=False)
    torch.manual_seed(2)
    for layer in model.model.layers[first:last]:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    return model


def step_plain(model: Any, batch: Any, *, pieces: int) -> Tensor:
    """Forward and backward in plain PyTorch, in as many microbatches; the mean of their losses."""
    total = torch.zeros(())
    for index in range(pieces):
        loss = model(**{k: v.chunk(pieces)[index] for k, v in batch.items()}).loss / pieces
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total
