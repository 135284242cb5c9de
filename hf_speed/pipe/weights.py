"""Weight gradients that wait: the W of schedules that split the backward.

Every linear of a rank's stages asks a switch, at each call, whether its weight gradient is to wait,
and in which queue. The runtime sets the switch for the forward of a microbatch, and again for its
backward, in which a checkpoint may run the forward a second time.

Source: zero bubble pipelines, arXiv:2401.10241, section 2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_speed.nn.deferred import Queue, deferred_linear


class Switch:
    """Where weight gradients go now; None: nowhere, they are computed at once.

    Args:
        follow: told of every change: for linears that do not ask.
    """

    def __init__(self, follow: Callable[[Queue | None], None] = lambda _: None) -> None:
        self.queue: Queue | None = None
        self._follow = follow

    @contextmanager
    def to(self, queue: Queue | None) -> Iterator[None]:
        """They go to `queue` inside."""
        before = self.queue
        self._set(queue)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, queue: Queue | None) -> None:
        if queue is not self.queue:
            self.queue = queue
            self._follow(queue)


class WaitingForward:
    """Stands in front of the forward of one linear.

    Args:
        module: an nn.Linear, or transformers' Conv1D.
        switch: of the pipeline.
        transposed: the weight is (in, out).
    """

    def __init__(self, module: Any, switch: Switch, *, transposed: bool) -> None:
        self._module = module
        self._switch = switch
        self._transposed = transposed

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), as the module computes it."""
        module = self._module
        return deferred_linear(
            x, module.weight, module.bias, self._switch.queue, transposed=self._transposed
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is a plain model, with its class's method."""
        copied = memo[id(self._module)]
        return MethodType(type(copied).forward, copied)


def wrap_linears(modules: Iterable[nn.Module], switch: Switch) -> list[nn.Module]:
    """Let every linear of `modules` ask `switch`; returns those linears.

    Exactly nn.Linear and Conv1D: what derives from them may compute something else.
    """
    wrapped = []
    for module in dict.fromkeys(each for root in modules for each in root.modules()):
        is_conv = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (type(module) is nn.Linear or is_conv) and "forward" not in module.__dict__:
            module.__dict__["forward"] = WaitingForward(module, switch, transposed=is_conv)
            wrapped.append(module)
    return wrapped


def unwrap_linears(modules: Iterable[nn.Module]) -> None:
    """The inverse of wrap_linears."""
    for module in modules:
        module.__dict__.pop("forward", None)


def needs_generator(model: nn.Module) -> bool:
    """Whether training draws random numbers in the forward: some dropout has a probability.

    Read off the modules: a config may name dropout that the model at hand does not have.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        rates = (value for name, value in vars(module).items() if "drop" in name)
        if any(isinstance(value, float) and value > 0 for value in rates):
            return True
    return False


def generator_state(device: torch.device) -> Tensor:
    """The state of the generator that the forward on `device` draws from: uint8."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """The inverse of generator_state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state)
