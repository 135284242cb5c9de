"""Gradient checkpointing, both kinds, at every stage; also over a frozen base."""

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    plain_parameters,
    share,
    speed,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks


def _trained(
    model: nn.Module, stage: int | None, *, on_rank: bool
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Losses of three steps, final parameters, bytes sent."""
    engine = None if stage is None else Engine.attach(model, speed(stage))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9
    )
    if engine is not None:
        engine.bind_optimizer(optimizer)
    losses = []
    for step in range(3):
        batch = global_batch("llama", step)
        loss = model(**(share(batch) if on_rank else batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        # An evaluation in between leaves nothing behind.
        with torch.no_grad():
            model.eval()(**batch)
            model.train()
    if engine is None:
        return torch.stack(losses), plain_parameters(model), 0
    return torch.stack(losses), whole_parameters(engine), engine.mesh.journal.total_bytes_sent


def _checkpointed(kind: str, *, reentrant: bool | None) -> nn.Module:
    model = toy_model(kind, num_layers=4).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def _full_training() -> None:
    for kind in ("llama", "gpt2"):
        _, plain, _ = _trained(_checkpointed(kind, reentrant=None), None, on_rank=False)
        for stage in (1, 2, 3):
            losses, parameters, sent = _trained(
                _checkpointed(kind, reentrant=None), stage, on_rank=True
            )
            assert_same_values(parameters, plain, rtol=1e-5, atol=1e-6)
            for reentrant in (False, True):
                model = _checkpointed(kind, reentrant=reentrant)
                again, same, bytes_sent = _trained(model, stage, on_rank=True)
                assert torch.equal(again, losses)
                assert_same_values(same, parameters)
                assert bytes_sent == sent


def test_both_kinds_of_checkpointing_change_neither_numbers_nor_bytes() -> None:
    run_ranks(_full_training, 2)


class LowRank(nn.Module):
    """A frozen linear layer and a trainable product of two thin ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.base(x) + self.up(self.down(x))


def _adapted(*, reentrant: bool | None) -> nn.Module:
    model = _checkpointed("llama", reentrant=reentrant)
    model.requires_grad_(requires_grad=False)
    for layer in model.model.layers[1:]:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.q_proj.up.requires_grad_(requires_grad=True)
        layer.self_attn.q_proj.down.requires_grad_(requires_grad=True)
    if reentrant:
        model.enable_input_require_grads()
    return model


def _adapters() -> list[int]:
    _, plain, _ = _trained(_adapted(reentrant=None), None, on_rank=False)
    sent = []
    for stage in (2, 3):
        for reentrant in (None, False, True):
            _, parameters, bytes_sent = _trained(_adapted(reentrant=reentrant), stage, on_rank=True)
            assert_same_values(parameters, plain, rtol=1e-5, atol=1e-6)
            sent.append(bytes_sent)
    return sent


def test_low_rank_adapters_on_a_frozen_base_train_with_both_kinds() -> None:
    for sent in run_ranks(_adapters, 2):
        trainable = sum(p.numel() for p in _adapted(reentrant=None).parameters() if p.requires_grad)
        everything = sum(p.numel() for p in _adapted(reentrant=None).parameters())
        # Stage 2 sends gradients and new values of what is trained, not the frozen base.
        start = 4 * everything
        assert all(bytes_sent - start < 3 * 4 * trainable * 1.5 for bytes_sent in sent[:3])


@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpointing_trains_on_odd_worlds(world_size: int) -> None:
    run_ranks(_odd_world, world_size)


def _odd_world() -> None:
    runs = []
    for reentrant in (None, True):
        model = _checkpointed("llama", reentrant=reentrant)
        runs.append(_trained(model, 3, on_rank=False))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_same_values(runs[0][1], runs[1][1])
