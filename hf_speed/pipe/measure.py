"""What each layer of a model costs in time: measured once, on a toy batch, forwards only."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.pipe.body import Body
from hf_speed.pipe.partition import Costs

NUM_RUNS = 3
"""Runs of which the fastest counts, after one that warms up."""
NUM_TOKENS = 64
"""Tokens of the toy batch's one row."""


def measure_costs(model: nn.Module, body: Body) -> Costs:
    """Seconds of a forward of each part of `model`, the least of several runs.

    Runs the whole model on zeros of `model.main_input_name`, without gradients.

    Raises:
        ConfigError: the model has no values yet, or takes no tokens.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            "pipe.balance='time' runs the model before it is cut, but its parameters are on the "
            "meta device. Set pipe.balance='parameters', or a list of layers a stage."
        )
    name = getattr(model, "main_input_name", None)
    if name != "input_ids":
        raise ConfigError(
            f"pipe.balance='time' runs the model on a toy batch of tokens, but "
            f"{type(model).__name__} takes {name or 'no input_ids'}. Set "
            f"pipe.balance='parameters', or a list of layers a stage."
        )
    device = next(model.parameters()).device
    places = (*body.before, *body.layers, *body.after)
    seconds: dict[str, float] = {place.path: float("inf") for place in places}
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        for run in range(NUM_RUNS + 1):
            for path, elapsed in _one_run(model, body, tokens, device).items():
                seconds[path] = min(seconds[path], elapsed) if run else float("inf")
    finally:
        model.train(was_training)
    # A module that the toy batch does not reach costs nothing here.
    known = {path: 0.0 if value == float("inf") else value for path, value in seconds.items()}
    return Costs(
        tuple(known[place.path] for place in body.layers),
        sum(known[place.path] for place in body.before),
        sum(known[place.path] for place in body.after),
    )


def _one_run(
    model: nn.Module, body: Body, tokens: torch.Tensor, device: torch.device
) -> dict[str, float]:
    started: dict[str, float] = {}
    elapsed: dict[str, float] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            started[path] = _now(device)

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            elapsed[path] = elapsed.get(path, 0.0) + _now(device) - started[path]

        return hook

    handles = []
    for place in (*body.before, *body.layers, *body.after):
        handles.append(place.module.register_forward_pre_hook(before(place.path)))
        handles.append(place.module.register_forward_hook(after(place.path)))
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return elapsed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
