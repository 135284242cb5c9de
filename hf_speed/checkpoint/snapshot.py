"""Host copies of what a rank saves, so that the training may change it while it is written.

Each copy is freed as soon as it has been handed to the writer. From a GPU the copies go to pinned
memory, which torch keeps for the next save.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from hf_speed.checkpoint.plan import ModelPlan
from hf_speed.checkpoint.writer import LocalState
from hf_speed.mesh import AxisGroup

T = TypeVar("T")


def copy_parameters(
    parameters: Iterable[tuple[str, Tensor]], plan: ModelPlan, *, world: AxisGroup
) -> Iterator[tuple[str, Tensor]]:
    """Copy those full tensors that go into this rank's files; `write_model` asks for no other.

    Args:
        parameters: of the whole model, as `write_model` takes them; each valid until the next.
        plan: of the model's files.
        world: the ranks that write.

    Returns:
        All names, in the same order; what other ranks write is on the meta device. To be iterated
        once. `parameters` is used up by now.
    """
    mine = _own_sources(plan, world)
    copied: deque[tuple[str, Tensor]] = deque()
    devices: set[torch.device] = set()
    for name, value in parameters:
        dtype = mine.get(plan.aliases.get(name, name))
        if dtype is None:
            copied.append((name, torch.empty(value.shape, dtype=value.dtype, device="meta")))
        else:
            both_float = value.is_floating_point() and dtype.is_floating_point
            copied.append((name, _host_copy(value, dtype if both_float else value.dtype)))
            devices.add(value.device)
    _finish(devices)
    return _drain(copied)


def copy_states(states: Iterable[LocalState]) -> Iterator[LocalState]:
    """Copy this rank's states; `states` is used up by now. To be iterated once."""
    copied: deque[LocalState] = deque()
    devices: set[torch.device] = set()
    for state in states:
        devices.add(state.value.device)
        copied.append(state._replace(value=_host_copy(state.value, state.value.dtype)))
    _finish(devices)
    return _drain(copied)


def _own_sources(plan: ModelPlan, world: AxisGroup) -> dict[str, torch.dtype]:
    """The model's tensors that this rank's files are made from, and the dtype of a copy.

    That is the file's where one tensor becomes one; a conversion gets what the model has.
    """
    mine = {
        spec.name: spec.dtype
        for index, file in enumerate(plan.files)
        if index % world.size == world.rank
        for spec in file.tensors
    }
    found: dict[str, torch.dtype] = {}
    for group in plan.groups:
        dtypes = [mine[target] for target in group.targets if target in mine]
        for source in group.sources if dtypes else ():
            # Not a float: a copy keeps the dtype that it has.
            found[source] = dtypes[0] if group.is_rename else torch.uint8
    return found


def _host_copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host that shares nothing; from a GPU it is complete after `_finish`."""
    host = torch.empty(value.shape, dtype=dtype, pin_memory=value.is_cuda)
    return host.copy_(value.detach(), non_blocking=True)


def _finish(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _drain(items: deque[T]) -> Iterator[T]:
    while items:
        yield items.popleft()
