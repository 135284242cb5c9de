"""Lion: the sign of an interpolated momentum.

Source: Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, program 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_speed.errors import ConfigError


class Lion(torch.optim.Optimizer):
    """Every weight moves by lr, up or down: by the sign of an average of gradient and momentum.

        step = sign(beta1 * exp_avg + (1 - beta1) * grad)
        param = param * (1 - lr * weight_decay) - lr * step
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad

    It keeps one moment where Adam keeps two. Its learning rate should be 3 to 10 times smaller than
    AdamW's, and its weight decay larger by the same factor (section 5 of the paper).

    Args:
        params: as every optimizer of torch takes them.
        lr: step size.
        betas: of the interpolation, and of the momentum; each in [0, 1).
        weight_decay: decoupled, 0 or more.
        maximize: ascend.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ConfigError(f"Lion: lr={lr} must be 0 or more.")
        if not weight_decay >= 0.0:
            raise ConfigError(f"Lion: weight_decay={weight_decay} must be 0 or more.")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"Lion: betas={betas} must be two numbers in [0, 1).")
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, under gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """The same operations, in the same order, as the rule's kernels."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["step"] += 1
        lr, exp_avg = float(group["lr"]), state["exp_avg"]
        beta1, beta2 = group["betas"]
        grad = -grad if group["maximize"] else grad
        direction = (exp_avg * beta1).add_(grad * (1 - beta1)).sign_()
        param.mul_(1 - lr * group["weight_decay"]).sub_(direction.mul_(lr))
        exp_avg.mul_(beta2).add_(grad * (1 - beta2))
