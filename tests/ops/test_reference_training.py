"""Moments in bf16 and in 8 bits train a small language model on real text as fp32 moments do."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_speed.ops.reference import BLOCK
from hf_speed.ops.spans import span_table
from hf_speed.ops.update import update_
from tests.ops.chunks import fresh_moments, row, settings

CONTEXT, STEPS, BATCH = 6, 250, 64
LEARNING_RATE = {"adam": 3e-3, "lion": 5e-4, "sgd": 0.1}


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    """Windows of characters of the standard library, and the character after each."""
    folder = Path(functools.__file__).parent
    source = "".join((folder / f"{name}.py").read_text() for name in ("argparse", "ast", "inspect"))
    characters = torch.tensor(list(source.encode("ascii", "replace")))
    windows = characters.unfold(0, CONTEXT + 1, 1)
    return windows[:, :-1], windows[:, -1]


@functools.cache
def _final_loss(rule: str, moment: torch.dtype) -> float:
    """The mean loss over the last 50 of STEPS steps of a network of 37,000 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(128, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 128), nn.GELU(),
        nn.Linear(128, 128),
    )  # fmt: skip
    parameters = list(model.parameters())
    n = sum(parameter.numel() for parameter in parameters)
    master = torch.cat([parameter.detach().flatten() for parameter in parameters])
    grad, moments = torch.zeros(n), fresh_moments(rule, n, moment)
    assert n > 100 * BLOCK
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = master[start:stop].view_as(parameter)
        parameter.grad = grad[start:stop].view_as(parameter)
        start = stop
    inputs, targets = _text()
    losses = []
    for step in range(1, STEPS + 1):
        batch = torch.randint(0, len(inputs), (BATCH,))
        grad.zero_()
        loss = functional.cross_entropy(model(inputs[batch]), targets[batch])
        loss.backward()
        losses.append(loss.item())
        group = settings(lr=LEARNING_RATE[rule], betas=(0.9, 0.999), weight_decay=0.01)
        update_(
            rule, master, grad, moments, span_table([(n, row(rule, group, step=step))]), seed=step
        )
    assert losses[0] > 4.5
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize(
    ("rule", "moment", "tolerance"),
    [
        ("adam", torch.bfloat16, 0.002),
        ("adam", torch.uint8, 0.01),
        ("lion", torch.bfloat16, 0.01),  # A sign amplifies what rounding flips.
        ("lion", torch.uint8, 0.02),
        ("sgd", torch.bfloat16, 0.002),
        ("sgd", torch.uint8, 0.01),
    ],
    ids=str,
)
def test_small_moments_train_alike(rule: str, moment: torch.dtype, tolerance: float) -> None:
    expected = _final_loss(rule, torch.float32)
    assert expected < 3.3
    assert _final_loss(rule, moment) == pytest.approx(expected, rel=tolerance)
