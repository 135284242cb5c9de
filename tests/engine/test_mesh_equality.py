"""Pipeline x tensor slices x data, at ZeRO stages 1 to 3: what one process trains.

Eight processes; ten steps; losses and gradient norms within 1e-5 in fp32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hf_speed.engine import Engine
from hf_speed.integrations.transformers.slice_plan import plan_for
from tests.engine.pipelines import own_rows, train_in_microbatches
from tests.engine.toys import global_batch, speed, toy_model
from tests.support import run_ranks

MESHES = ((2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 4, 1), (8, 1, 1))
"""(pp, tp, dp), of eight processes."""
KINDS = ("llama", "qwen3", "gpt2", "bert")
STEPS = 10
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _model(kind: str) -> nn.Module:
    """Eight layers, for eight stages; four heads, two of keys and values, for four slices."""
    match kind:
        case "llama" | "qwen3":
            return toy_model(kind, num_layers=8, **HEADS)
        case "gpt2":
            return toy_model(kind, num_layers=8, n_head=4)
        case _:
            return toy_model(kind, num_layers=8, num_attention_heads=4)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """At the toys' usual 1e-2 rounding grows a hundredfold in ten steps, in plain PyTorch too."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def _trained(kind: str, mesh: tuple[int, int, int], stage: int, **tree: Any) -> torch.Tensor:
    """(2, steps) losses and gradient norms."""
    pp, tp, _ = mesh
    config = speed(stage, mesh={"pp": pp, "tp": tp}, **tree)
    model = _model(kind)
    engine = Engine.attach(model, config, slice_planner=plan_for)
    optimizer = _adamw(model.parameters())
    engine.bind_optimizer(optimizer)
    losses, norms = [], []
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    for step in range(STEPS):
        loss = model(**own_rows(engine, global_batch(kind, step))).loss
        engine.backward(loss)
        norms.append(engine.clip_grad_norm_(1.0))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if data.group is not None:
            torch.distributed.all_reduce(mean, group=data.group)
        losses.append(mean / data.size)
    engine.detach()
    return torch.stack([torch.stack(losses), torch.stack(norms)])


def _differences(
    kind: str, cases: Sequence[tuple[tuple[int, int, int], int]]
) -> list[tuple[str, torch.Tensor]]:
    """Largest relative differences from one process, of losses and norms, by mesh and stage."""
    steps = [global_batch(kind, step) for step in range(STEPS)]
    plain = train_in_microbatches(_model(kind), steps, count=1, clip=1.0, make_optimizer=_adamw)
    expected = torch.stack([plain.losses, plain.norms])
    found = []
    for mesh, stage in cases:
        ours = _trained(kind, mesh, stage)
        found.append((f"{mesh}, stage {stage}", (ours / expected - 1).abs().amax(1)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_trains_as_one_process(kind: str) -> None:
    # Each mesh at one stage, another for each model. The bench `mesh_equality` has them all.
    first = KINDS.index(kind)
    cases = [(mesh, 1 + (place + first) % 3) for place, mesh in enumerate(MESHES)]
    for rank in run_ranks(_differences, 8, kind, cases, timeout_s=280):
        for name, (losses, norms) in rank:
            assert losses <= 1e-5, f"{name}: losses differ by {losses:.1e}"
            assert norms <= 1e-5, f"{name}: gradient norms differ by {norms:.1e}"
