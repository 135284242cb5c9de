"""Does an optimizer treat each element on its own?

Only then may it update an arbitrary interval, or a slice, of a parameter. Asked by trial and not by
name: one instance steps a small matrix, another the two halves of the same matrix flattened; an
elementwise rule gives the same numbers. Adafactor, Muon, LAMB and Shampoo do not.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.errors import ConfigError

_ROWS, _COLUMNS, _CUT, _STEPS = 6, 10, 23, 3


def require_elementwise(optimizer: Optimizer, *, stage: int, num_slices: int = 1) -> None:
    """Raise if `optimizer` needs whole tensors.

    Args:
        optimizer: the user's.
        stage: of the run.
        num_slices: ranks that divide layers (mesh.tp).

    Raises:
        ConfigError: its update of a parameter differs from its updates of two parts of it, or it
            cannot be tried.
    """
    name = type(optimizer).__name__
    told = f"mesh.tp={num_slices}" if num_slices > 1 else f"zero.stage={stage}"
    part = "slices" if num_slices > 1 else "intervals"
    advice = (
        f"Use an elementwise optimizer (AdamW, Adam, SGD, Adagrad, RMSprop, Lion ...), or "
        f"{'mesh.tp=1 with ' if num_slices > 1 else ''}zero.stage=0, where every rank holds whole "
        f"parameters."
    )
    try:
        whole, parts = _try_both(optimizer)
    except Exception as error:
        raise ConfigError(
            f"{told} gives each rank {part} of parameters, and {name} could not be "
            f"shown to work on them: {type(error).__name__}: {error}. {advice}"
        ) from error
    if not torch.allclose(whole, parts, rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"{told} gives each rank {part} of parameters, but {name} needs whole "
            f"tensors: its update of a {_ROWS}x{_COLUMNS} matrix differs from that of its parts. "
            f"{advice}"
        )


def _try_both(optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_ROWS, _COLUMNS, generator=generator)
    gradients = [torch.randn(_ROWS, _COLUMNS, generator=generator) for _ in range(_STEPS)]
    whole = nn.Parameter(start.clone())
    flat = start.flatten()
    parts = [nn.Parameter(flat[:_CUT].clone()), nn.Parameter(flat[_CUT:].clone())]
    one, other = _like(optimizer, [whole]), _like(optimizer, parts)
    for gradient in gradients:
        whole.grad = gradient.clone()
        parts[0].grad = gradient.flatten()[:_CUT].clone()
        parts[1].grad = gradient.flatten()[_CUT:].clone()
        one.step()
        other.step()
    return whole.detach().flatten(), torch.cat([part.detach() for part in parts])


def _like(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """A second optimizer of the same class and settings."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings: dict[str, Any] = {
        key: value for key, value in optimizer.defaults.items() if key in accepted
    }
    return type(optimizer)(parameters, **settings)
