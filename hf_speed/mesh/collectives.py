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


# torch 2.13 renamed them and warns at the old names, which are the only ones in 2.11.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
        lambda: _ALL_GATHER(full, mine, group=group.group, async_op=True),
    )
    return Pending(work, lambda: full, what=what)


def reduce_scatter_flat(
    send: Tensor, *, group: AxisGroup, journal: Journal, receive: Tensor | None = None
) -> Pending:
    """Bring together the shares of this rank's slice of the sum of `send` over `group`.

    Args:
        send: (group.size * n,) contiguous, any float dtype; must not be written before `wait()`.
        receive: (group.size * n,) scratch of the same dtype; made here if None.

    Returns:
        Pending of (m, n) in send.dtype, whose sum over the first dim is this rank's slice: see
        `sum_parts`. m is group.size, or 1 where the backend has summed. One reduce-scatter of
        send.nbytes: (size - 1) / size of it is sent.

    Raises:
        MeshError: send.numel() is not a multiple of group.size.
    Source: ZeRO, arXiv:1910.02054, section 5.1.
    """
    what = f"reduce_scatter of {send.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending(None, lambda: send.view(1, -1), what=what)
    part = _part_numel(send, group)
    sent = part * send.element_size() * (group.size - 1)
    journal.note("reduce_scatter", group, num_bytes=send.nbytes, sent=sent)
    if send.is_cuda and send.dtype == torch.float32:
        mine = send.new_empty(part)
        work = guard(
            what,
            lambda: _REDUCE_SCATTER(mine, send, group=group.group, async_op=True),
        )
        return Pending(work, lambda: mine.view(1, part), what=what)
    received = torch.empty_like(send) if receive is None else receive
    work = guard(
        what, lambda: dist.all_to_all_single(received, send, group=group.group, async_op=True)
    )
    return Pending(work, lambda: received.view(group.size, part), what=what)


def sum_parts(parts: Tensor, *, out: Tensor, accumulate: bool, scale: float) -> None:
    """`out` = (or, with `accumulate`, +=) scale * sum of `parts` over its first dim.

    The sum is taken in fp32 and in rank order, whatever the dtypes.

    Args:
        parts: (m, n).
        out: (n,).
    """
    if out.dtype != torch.float32:
        total = torch.empty_like(out, dtype=torch.float32)
        sum_parts(parts, out=total, accumulate=False, scale=scale)
        out.add_(total) if accumulate else out.copy_(total)
        return
    rest = list(parts)
    if not accumulate:
        if len(rest) > 1 and parts.dtype == torch.float32 and scale == 1.0:
            torch.add(rest.pop(0), rest.pop(0), out=out)
        else:
            out.copy_(rest.pop(0))
            if scale != 1.0:
                out.mul_(scale)
    for part in rest:
        out.add_(part, alpha=scale)


def all_reduce_flat(send: Tensor, *, group: AxisGroup, journal: Journal) -> Pending:
    """Sum `send` over `group` in place: 2 (N-1)/N of send.nbytes.

    fp32 buffers use the backend's all-reduce. 16-bit ones are summed in fp32 on the rank that owns
    a slice, then gathered, rounded once to their dtype.

    Args:
        send: (group.size * n,) contiguous; overwritten with the sum.

    Returns:
        Pending of `send`.
    """
    what = f"all_reduce of {send.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending(None, lambda: send, what=what)
    part = _part_numel(send, group)
    if send.dtype == torch.float32:
        sent = 2 * part * send.element_size() * (group.size - 1)
        journal.note("all_reduce", group, num_bytes=send.nbytes, sent=sent)
        work = guard(what, lambda: dist.all_reduce(send, group=group.group, async_op=True))
        return Pending(work, lambda: send, what=what)
    shares = reduce_scatter_flat(send, group=group, journal=journal)

    def finish() -> Tensor:
        mine = torch.empty(part, dtype=torch.float32, device=send.device)
        sum_parts(shares.wait(), out=mine, accumulate=False, scale=1.0)
        send[group.rank * part : (group.rank + 1) * part].copy_(mine)
        return all_gather_flat(send, group=group, journal=journal).wait()

    return Pending(None, finish, what=what)


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
