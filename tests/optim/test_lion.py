"""Lion alone: its arithmetic against the paper's, its arguments, its state dict."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.optim import Lion


def test_lion_follows_its_paper() -> None:
    """Program 1 of arXiv:2302.06675, in doubles."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    weight, momentum = parameter.detach().clone(), torch.zeros(50, dtype=torch.float64)
    for _ in range(5):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        update = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
        weight = weight - 0.01 * (update + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * parameter.grad
        optimizer.step()
    assert torch.allclose(parameter.detach(), weight, rtol=1e-12)
    assert torch.allclose(optimizer.state[parameter]["exp_avg"], momentum, rtol=1e-12)


def test_lion_minimises_and_maximises() -> None:
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        parameter = nn.Parameter(torch.full((3,), 2.0))
        optimizer = Lion([parameter], lr=0.1, maximize=maximize)
        for _ in range(10):
            optimizer.zero_grad()
            (sign * (parameter**2).sum()).backward()
            optimizer.step()
        assert torch.allclose(parameter, torch.ones(3), atol=1e-5)


def test_lion_leaves_a_parameter_without_gradient() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = Lion(parameters, lr=0.1, weight_decay=1.0)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameters[1], torch.ones(2))
    assert parameters[1] not in optimizer.state


def test_lion_calls_a_closure() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Lion([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert torch.allclose(parameter, torch.full((2,), 0.9))


def test_lion_resumes_from_its_state_dict() -> None:
    def steps(parameter: nn.Parameter, optimizer: Lion, seeds: range) -> None:
        for seed in seeds:
            parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    one = nn.Parameter(torch.ones(5))
    whole = Lion([one])
    steps(one, whole, range(3))
    other = nn.Parameter(one.detach().clone())
    resumed = Lion([other])
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    steps(one, whole, range(3, 6))
    steps(other, resumed, range(3, 6))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"Lion: lr=-1.0 must be 0 or more"),
        ({"weight_decay": -0.1}, r"Lion: weight_decay=-0.1 must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"Lion: betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
    ],
)
def test_lion_refuses_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lion([nn.Parameter(torch.zeros(1))], **settings)
