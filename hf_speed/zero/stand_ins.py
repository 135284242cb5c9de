"""What `parameter.grad` shows of a gradient that is kept elsewhere.

Where an optimizer works on parts, or on masters of another dtype, the mean gradient is on those and
not on the model's parameters. A None there would say that there is none:
`torch.nn.utils.clip_grad_norm_(model.parameters())` would clip nothing and not tell. So after a
backward a parameter carries a stand-in of its gradient's shape, dtype and device, without memory,
which raises when it is read or changed. Setting it to None clears the gradient, as ever.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_speed.errors import EngineError, ShardedParameterError
from hf_speed.zero.group import FlatGroup

_aten = torch.ops.aten


class ShardedGradient(Tensor):
    """Stands for the gradient of one parameter.

    Attributes:
        parameter_name: for messages.
        arrived: what autograd has added to it before it was taken away.
    """

    parameter_name: str
    arrived: Tensor | None

    @classmethod
    def stand_in(
        cls, name: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> "ShardedGradient":
        """Make one; no memory."""
        made = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=device, storage_size=0
        )
        made.parameter_name = name
        made.arrived = None
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"ShardedGradient({self.parameter_name}, {shape=}, {dtype=}, {device=})"

    def __reduce_ex__(self, proto: int) -> Any:  # type: ignore[override]
        raise _read_error(self, "pickle")

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse everything but what autograd and `model.to()` do."""
        options = kwargs or {}
        first = next(_stand_ins((*args, *options.values())))
        adds = func in (_aten.add_.Tensor, _aten.add.Tensor) and first is args[0]
        if adds and torch._C._current_graph_task_id() != -1:
            # A backward that comes to a parameter before the engine has seen it begin.
            first.arrived = args[1] if first.arrived is None else first.arrived + args[1]
            return first
        if func is _aten._to_copy.default:
            # model.to(): the engine says at the next forward that it was moved.
            dtype, device = options.get("dtype"), options.get("device")
            return cls.stand_in(
                first.parameter_name,
                first.shape,
                dtype=dtype or first.dtype,
                device=device or first.device,
            )
        raise _read_error(first, func.overloadpacket.__name__)


def _stand_ins(values: Iterable[Any]) -> Iterator[ShardedGradient]:
    for value in values:
        if isinstance(value, ShardedGradient):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _stand_ins(value)


def _read_error(gradient: ShardedGradient, operation: str) -> ShardedParameterError:
    name, shape = gradient.parameter_name, tuple(gradient.shape)
    return ShardedParameterError(
        f"{operation} needs the gradient of {name} of shape {shape}, which is not on the "
        f"parameter: the optimizer holds it, in parts or in another dtype. Clip with "
        f"accelerator.clip_grad_norm_ or engine.clip_grad_norm_ instead of torch.nn.utils. Read or "
        f"change it with hf_speed.get_full_grad(model, {name!r}) and set_full_grad, on every "
        f"rank."
    )


class GradientStandIns:
    """Puts stand-ins on parameters after a backward and takes them away before the next."""

    def __init__(self) -> None:
        self._made: dict[tuple[FlatGroup, int], ShardedGradient] = {}
        self._shown: list[tuple[FlatGroup, int]] = []

    def show(self, group: FlatGroup, indices: Iterable[int]) -> None:
        """The parameters at `indices` have a gradient, which is in the group's pieces."""
        if group.whole:
            return
        with torch._C.DisableTorchFunctionSubclass():
            for index in sorted(indices):
                parameter = group.entries[index].parameter
                if (group, index) not in self._made:
                    name, shape = group.entries[index].name, group.layout.slots[index].shape
                    self._made[group, index] = ShardedGradient.stand_in(
                        name, shape, dtype=parameter.dtype, device=parameter.device
                    )
                parameter.grad = self._made[group, index]
                self._shown.append((group, index))

    def cleared(self) -> tuple[list[tuple[FlatGroup, int]], bool]:
        """What the user has cleared or replaced since `show`, each told once.

        Autograd may have put a first gradient there since.

        Returns:
            The parameters, and whether they are all that were shown.
        """
        with torch._C.DisableTorchFunctionSubclass():
            found = [
                (group, index)
                for group, index in self._shown
                if not isinstance(group.entries[index].parameter.grad, ShardedGradient)
            ]
        everything = bool(found) and len(found) == len(self._shown)
        if found:
            gone = set(found)
            self._shown = [each for each in self._shown if each not in gone]
        return found, everything

    def refuse_replaced(self) -> None:
        """Before a step: a tensor in the place of a stand-in would be ignored.

        Raises:
            EngineError: the user has put one there.
        """
        with torch._C.DisableTorchFunctionSubclass():
            for group, index in self._shown:
                gradient = group.entries[index].parameter.grad
                if gradient is not None and not isinstance(gradient, ShardedGradient):
                    name = group.entries[index].name
                    raise EngineError(
                        f"The gradient of {name} was set to a tensor after the backward, but the "
                        f"optimizer reads it from its own parts. Call "
                        f"hf_speed.set_full_grad(model, {name!r}, value) on every rank instead."
                    )

    def hide(self) -> None:
        """Take every stand-in away: a backward begins, or the engine lets go of its model."""
        with torch._C.DisableTorchFunctionSubclass():
            for group, index in self._shown:
                parameter = group.entries[index].parameter
                gradient = parameter.grad
                if isinstance(gradient, ShardedGradient) and gradient.arrived is None:
                    parameter.grad = None
        self._shown.clear()


def arrived_gradient(gradient: Tensor | None) -> Tensor | None:
    """What autograd has left in `parameter.grad`, on its own or in a stand-in."""
    if isinstance(gradient, ShardedGradient):
        arrived, gradient.arrived = gradient.arrived, None
        return arrived
    return gradient
