"""The one place where hooks are installed on modules, parameters and autograd.

    forward   enter(unit) -> module computes -> leave(unit)
    backward  the first gradient of a unit's outputs -> enter(unit); each parameter's gradient ->
              collect; end of the whole backward -> finish

The outermost module that is called opens the pass: normally the model, or a part of it that the
user calls on its own. A module that runs again inside a backward is a checkpoint recomputing.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from hf_speed.offload.activations import ActivationOffload
from hf_speed.zero.gather import Gatherer, GatherPolicy, Order, Unit
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.reduce import Reducer
from hf_speed.zero.saved import Saver

_IGNORE_TRACING = True


class Phase(Enum):
    """What the engine is in the middle of."""

    IDLE = auto()
    FORWARD = auto()
    BACKWARD = auto()


class UnitHooks:
    """Connects the units of a model to a gatherer and a reducer.

    Args:
        units: all units, in forward order, root last.
        gatherer: brings values.
        reducer: takes gradients.
        policy: how long units stay, and which are gathered.
        is_syncing: asked at the start of each backward: does it end an accumulation?
        on_forward: called before the outermost forward of each pass.
        on_backward_end: called after the gradients of a backward are in place.
        activations: takes what autograd saves to another tier; None leaves it where it is.
    """

    def __init__(
        self,
        units: list[Unit],
        *,
        gatherer: Gatherer,
        reducer: Reducer,
        policy: GatherPolicy,
        is_syncing: Callable[[], bool],
        on_forward: Callable[[], None],
        on_backward_end: Callable[[], None],
        activations: ActivationOffload | None = None,
    ) -> None:
        self.phase = Phase.IDLE
        self._is_copy = False
        self._gatherer = gatherer
        self._reducer = reducer
        self._policy = policy
        self._is_syncing = is_syncing
        self._on_forward = on_forward
        self._on_backward_end = on_backward_end
        self._depth = 0
        self._expects_backward = False
        self._saving: saved_tensors_hooks | None = None
        self._saver = Saver(units, gatherer, activations)
        self._moves = activations is not None or any(unit.sharded for unit in units)
        self._last = next((unit for unit in reversed(units) if not unit.is_root), None)
        self._handles: list[RemovableHandle] = []
        for unit in units:
            self._install(unit)

    def _install(self, unit: Unit) -> None:
        module = unit.module
        self._handles.append(
            module.register_forward_pre_hook(partial(self._before_forward, unit), prepend=True)
        )
        self._handles.append(
            module.register_forward_hook(partial(self._after_forward, unit), always_call=True)
        )
        for group in unit.groups:
            if not (group.trainable and group.travels):
                continue
            for index, entry in enumerate(group.entries):
                hook = partial(self._on_gradient, group, index)
                self._handles.append(entry.parameter.register_post_accumulate_grad_hook(hook))

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnitHooks":
        """A copy of the model is a plain model: the hooks copied with it do nothing."""
        inert = UnitHooks.__new__(UnitHooks)
        inert._is_copy = True
        memo[id(self)] = inert
        return inert

    def remove(self) -> None:
        """Take every hook off again, and what the reducer has put on parameters."""
        self._reducer.let_go()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def abandon(self) -> None:
        """Forget a pass that an exception cut short."""
        self._close_pass()
        self._reducer.abandon()
        self._gatherer.release_all()
        self.phase = Phase.IDLE
        self._depth = 0

    def _before_forward(self, unit: Unit, module: nn.Module, args: object) -> None:  # noqa: ARG002
        if self._is_copy or self._is_idle():
            return
        if self.phase is Phase.BACKWARD and torch._C._current_graph_task_id() == -1:
            self.abandon()
        if self.phase is Phase.BACKWARD:
            self._come_to(unit)
            return
        # Counted first: the hook after the forward runs even if this one raises.
        self._depth += 1
        if self._depth == 1:
            self._open_pass(unit)
        self._gatherer.enter(unit)

    def _is_idle(self) -> bool:
        """Whether a pass asks for nothing: no values come or go, and gradients only add up."""
        return not self._moves and self._reducer.is_collecting

    def _open_pass(self, unit: Unit) -> None:
        self._on_forward()
        self.phase = Phase.FORWARD
        # Of the whole pass: a checkpoint switches gradients off for the blocks inside.
        self._expects_backward = torch.is_grad_enabled()
        training = unit.module.training and self._expects_backward
        whole = unit.is_root and training and not self._policy.on_demand
        self._gatherer.begin(Order.FORWARD if whole else Order.ON_DEMAND)
        # Checkpointing replaces saved tensors itself; hooks inside its own would hide them from it.
        outer = torch._C._autograd._top_saved_tensors_default_hooks(_IGNORE_TRACING)
        if self._saver.is_needed and torch.is_grad_enabled() and outer is None:
            self._saving = saved_tensors_hooks(self._saver.pack, self._saver.unpack)
            self._saving.__enter__()

    def _close_pass(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.__exit__(None, None, None)

    def _after_forward(
        self,
        unit: Unit,
        module: nn.Module,  # noqa: ARG002
        args: object,  # noqa: ARG002
        output: object,
    ) -> None:
        if self._is_copy or self._is_idle():
            return
        if self.phase is Phase.BACKWARD:
            self._watch_outputs(unit, output)
            return
        self._depth -= 1
        if output is None and sys.exc_info()[0] is not None:
            # The module raised: start nothing that other ranks, which may not have, would wait for.
            if self._depth == 0:
                self.abandon()
            return
        self._watch_outputs(unit, output)
        if not self._keeps(unit):
            self._gatherer.leave(unit)
        if self._depth == 0:
            self._gatherer.finish(keeps=self._keeps)
            self._close_pass()
            self.phase = Phase.IDLE
            if not torch.is_grad_enabled():
                self._gatherer.release_all()

    def _keeps(self, unit: Unit) -> bool:
        """Whether a unit stays after the forward; alike on ranks that ran it and that did not."""
        # The backward starts with the root and the last unit: no use in releasing those.
        last = unit.is_root or unit is self._last
        return self._expects_backward and (last or not self._policy.regather)

    def _watch_outputs(self, unit: Unit, output: object) -> None:
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if tensors:
            register_multi_grad_hook(tensors, partial(self._before_backward, unit), mode="any")

    def _before_backward(self, unit: Unit, gradient: Tensor) -> None:  # noqa: ARG002
        self._begin_backward()
        self._come_to(unit)

    def _come_to(self, unit: Unit) -> None:
        """The backward reaches a unit: those behind it are done."""
        self._gatherer.release_passed(unit)
        # In this order ranks that run different blocks never block each other: a reduction may wait
        # for a rank that needs these gathers, a gather for a rank that waits for these reductions.
        self._gatherer.announce(unit)
        if not unit.is_root:
            self._reducer.leave_behind(unit.groups)
        self._gatherer.enter(unit)

    def _begin_backward(self) -> None:
        if self.phase is Phase.BACKWARD:
            return
        self.phase = Phase.BACKWARD
        self._reducer.begin(sync=self._is_syncing())
        self._gatherer.begin(Order.ON_DEMAND if self._policy.on_demand else Order.BACKWARD)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _on_gradient(self, group: FlatGroup, index: int, parameter: nn.Parameter) -> None:  # noqa: ARG002
        self._begin_backward()
        self._reducer.collect(group, index)

    def _end_backward(self) -> None:
        self._gatherer.finish()
        # Before anything waits for a gather: other ranks may wait for these reductions first.
        self._reducer.finish()
        self._gatherer.release_all()
        self.phase = Phase.IDLE
        self._on_backward_end()


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a module's output: tuples, lists, mappings (ModelOutput is one)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        fields: Mapping[str, Any] = vars(value)
        yield from _tensors(fields)
