"""Messages from one rank to another: started, not waited for.

On a CPU (gloo) a tag pairs each send with its receive, so neither side depends on the order in
which the other starts them. NCCL has no tags: there, messages between two ranks over one group
arrive in the order in which both sides start them.
"""

import torch.distributed as dist
from torch import Tensor

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AxisGroup
from hf_speed.mesh.collectives import Pending, guard
from hf_speed.mesh.journal import Journal


def send(
    value: Tensor, *, to: int, tag: int, group: AxisGroup, journal: Journal
) -> Pending[Tensor]:
    """Start to send `value` to another rank of `group`.

    Args:
        value: contiguous; must not be written before the message has left.
        to: the receiver's place in the group.
        tag: pairs the send with the receive.
        group: the ranks.
        journal: of the run; counts value.nbytes.

    Returns:
        Pending of `value`: it has left.

    Raises:
        MeshError: the group has one rank, or the backend failed.
    """
    what = f"send of {value.nbytes} bytes to rank {to} of {group.label}"
    if group.group is None:
        raise MeshError(f"{what}: there is no other rank.")
    journal.count("send", value.nbytes)
    work = guard(what, lambda: dist.isend(value, group=group.group, group_dst=to, tag=tag))
    return Pending((work,), lambda: value, what=what)


def receive(buffer: Tensor, *, source: int, tag: int, group: AxisGroup) -> Pending[Tensor]:
    """Start to receive a message of `buffer`'s size from another rank of `group`.

    Args:
        buffer: contiguous, overwritten.
        source: the sender's place in the group.
        tag: pairs the receive with the send.
        group: the ranks.

    Returns:
        Pending of `buffer`, filled.

    Raises:
        MeshError: the group has one rank, or the backend failed.
    """
    what = f"receive of {buffer.nbytes} bytes from rank {source} of {group.label}"
    if group.group is None:
        raise MeshError(f"{what}: there is no other rank.")
    work = guard(what, lambda: dist.irecv(buffer, group=group.group, group_src=source, tag=tag))
    return Pending((work,), lambda: buffer, what=what)
