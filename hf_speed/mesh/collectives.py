"""Every collective of the package, over flat buffers, with the fewest bytes that it allows.

Each returns a Pending: started, not waited for. Over a group of size 1 the result is the input and
nothing is sent.

gloo's reduce-scatter is an all-reduce underneath (1.0 instead of (N-1)/N of the buffer at N = 2,
1.5 instead of 0.75 at N = 4). Here a reduction is an all-to-all of the slices followed by a sum in
fp32 on the receiver, in rank order: the ideal bytes, an exact order, and no 16-bit partial sums.
NCCL's own reduce-scatter serves fp32 buffers, where its partial sums lose nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AxisGroup
from hf_speed.mesh.journal import Journal


class Pending:
    """A started collective. `wait()` finishes it and returns its result; call it once or more."""

    def __init__(
        self,
        work: dist.Work | None,
        finish: Callable[[], Tensor],
        *,
        what: str = "",
    ) -> None:
        self._work = work
        self._finish: Callable[[], Tensor] | None = finish
        self._what = what
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """Block (on CUDA: make the current stream wait) until the result may be read.

        Raises:
            MeshError: the backend failed: a peer died, or did not join within the timeout.
        """
        if self._finish is not None:
            if self._work is not None:
                guard(self._what, self._work.wait)
            self._result = self._finish()
            self._work = self._finish = None
        if self._result is None:
            raise MeshError(f"{self._what} failed before; its result does not exist.")
        return self._result


def guard(what: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - passes through any result
    """Run a backend call; a failure says what was running and what to look for."""
    try:
        return call()
    except RuntimeError as error:
        raise MeshError(
            f"{what} failed: {error}. A peer has died or has left the order of collectives: look "
            f"for the first traceback among the ranks; debug.journal=true names the diverging call."
        ) from error


def all_gather_flat(full: Tensor, *, group: AxisGroup, journal: Journal) -> Pending:
    """Fill `full` from the slice that each rank holds of it.

    Args:
        full: (group.size * n,) contiguous; this rank's slice [rank * n, (rank + 1) * n) is filled
            already, the others are overwritten.

    Returns:
        Pending of `full`. One all-gather, n * (size - 1) elements sent.

    Raises:
        MeshError: full.numel() is not a multiple of group.size.
    """
    what = f"all_gather of {full.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending(None, lambda: full, what=what)
    part = _part_numel(full, group)
    mine = full[group.rank * part : (group.rank + 1) * part]
    journal.note(
        "all_gather", group, num_bytes=full.nbytes, sent=mine.nbytes * (group.size - 1)
    )
    work = guard(
        what,
        lambda: dist.all_gather_into_tensor(full, mine, group=group.group, async_op=True),
    )
    return Pending(work, lambda: full, what=what)


def reduce_scatter_flat(
    send: Tensor, *, group: AxisGroup, journal: Journal, receive: Tensor | None = None
) -> Pending:
    """Sum `send` over `group` and keep this rank's slice.

    Args:
        send: (group.size * n,) contiguous, any float dtype; must not be written before `wait()`.
        receive: (group.size * n,) scratch of the same dtype; made here if None.

    Returns:
        Pending of (n,) fp32 (send itself, unsummed and in its own dtype, where size is 1).
        One reduce-scatter of send.nbytes: (size - 1) / size of it is sent.

    Raises:
        MeshError: send.numel() is not a multiple of group.size.
    Source: ZeRO, arXiv:1910.02054, section 5.1.
    """
    what = f"reduce_scatter of {send.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending(None, lambda: send, what=what)
    part = _part_numel(send, group)
    sent = part * send.element_size() * (group.size - 1)
    journal.note("reduce_scatter", group, num_bytes=send.nbytes, sent=sent)
    if send.is_cuda and send.dtype == torch.float32:
        mine = send.new_empty(part)
        work = guard(
            what,
            lambda: dist.reduce_scatter_tensor(mine, send, group=group.group, async_op=True),
        )
        return Pending(work, lambda: mine, what=what)
    received = torch.empty_like(send) if receive is None else receive
    work = guard(
        what, lambda: dist.all_to_all_single(received, send, group=group.group, async_op=True)
    )
    return Pending(work, lambda: sum_parts(received.view(group.size, part)), what=what)


def sum_parts(parts: Tensor) -> Tensor:
    """Sum (N, n) over its first dim in fp32 and in rank order; returns (n,) fp32, may alias parts[0]."""
    total = parts[0] if parts.dtype == torch.float32 else parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    return total


def all_reduce_flat(send: Tensor, *, group: AxisGroup, journal: Journal) -> Tensor:
    """Sum `send` over `group`: reduce-scatter, then all-gather, 2 (N-1)/N of send.nbytes.

    Args:
        send: (group.size * n,) contiguous; overwritten with the sum, rounded to its dtype.

    Returns:
        `send`. Blocks until done.
    """
    if group.is_identity:
        return send
    part = _part_numel(send, group)
    mine = reduce_scatter_flat(send, group=group, journal=journal).wait()
    send[group.rank * part : (group.rank + 1) * part].copy_(mine)
    return all_gather_flat(send, group=group, journal=journal).wait()


def all_reduce_small(
    value: Tensor,
    *,
    group: AxisGroup,
    journal: Journal,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """Reduce a few elements (norms, flags, counts) in place. One all-reduce; blocks."""
    if group.is_identity:
        return value
    journal.note("all_reduce", group, num_bytes=value.nbytes, sent=value.nbytes)
    guard(
        f"all_reduce over {group.label}",
        lambda: dist.all_reduce(value, op=op, group=group.group),
    )
    return value


def broadcast_flat(value: Tensor, *, group: AxisGroup, journal: Journal) -> Tensor:
    """Overwrite `value` with that of the group's first rank. One broadcast; blocks."""
    if group.is_identity:
        return value
    sent = value.nbytes if group.rank == 0 else 0
    journal.note("broadcast", group, num_bytes=value.nbytes, sent=sent)
    guard(
        f"broadcast over {group.label}",
        lambda: dist.broadcast(value, group=group.group, group_src=0),
    )
    return value


def agree(error: BaseException | None, *, group: AxisGroup) -> str | None:
    """Let every rank know whether any failed: the first failure's text, or None.

    One object all-gather; blocks. Call it where a local fault (a full disk) must stop all ranks.
    """
    mine = None if error is None else f"rank {group.rank}: {type(error).__name__}: {error}"
    if group.is_identity:
        return mine
    everyone: list[str | None] = [None] * group.size
    guard(
        f"agreement over {group.label}",
        lambda: dist.all_gather_object(everyone, mine, group=group.group),
    )
    return next((each for each in everyone if each is not None), None)


def _part_numel(buffer: Tensor, group: AxisGroup) -> int:
    part, rest = divmod(buffer.numel(), group.size)
    if rest or buffer.dim() != 1 or not buffer.is_contiguous():
        raise MeshError(
            f"A buffer of shape {tuple(buffer.shape)} cannot be cut in {group.size} equal slices "
            f"over {group.label}: it must be flat, contiguous and a multiple of the group's size."
        )
    return part
