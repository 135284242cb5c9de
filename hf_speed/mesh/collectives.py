"""Every collective of the package, over flat buffers, with the fewest bytes that it allows.

Each returns a Pending: started, not waited for. Over a group of size 1 the result is the input and
nothing is sent.

On a CPU (gloo) gathers and reductions are direct exchanges of slices between all pairs of ranks.
gloo's own reduce-scatter is an all-reduce underneath (1.0 instead of (N-1)/N of the buffer at
N = 2, 1.5 instead of 0.75 at N = 4), and its all-gather costs twice the CPU time of the plain
exchange. A reduction is summed by the receiver in fp32 and in rank order: the ideal bytes, an exact
order, and no 16-bit partial sums. On CUDA the same holds for 16-bit buffers, as an all-to-all; fp32
ones, where partial sums lose nothing, use NCCL's own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.errors import MeshError
from hf_speed.mesh.axes import AxisGroup
from hf_speed.mesh.journal import Journal

T = TypeVar("T")

# torch 2.13 renamed them and warns at the old names, which are the only ones in 2.11.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Generic[T]):
    """A started collective. `wait()` finishes it and returns its result; call it once or more."""

    def __init__(
        self,
        works: Sequence[dist.Work],
        finish: Callable[[], T],
        *,
        what: str = "",
        check: Callable[[], None] | None = None,
    ) -> None:
        self._works = works
        self._check = check
        self._finish: Callable[[], T] | None = finish
        self._what = what
        self._result: T | None = None

    def wait(self) -> T:
        """Block (on CUDA: make the current stream wait) until the result may be read.

        Raises:
            MeshError: the backend failed: a peer died, or did not join within the timeout.
            DivergenceError: in debug mode, instead.
        """
        if self._finish is not None:
            if self._check is not None:
                self._check()
            for work in self._works:
                guard(self._what, work.wait)
            self._result = self._finish()
            self._works = ()
            self._finish = None
        if self._result is None:
            raise MeshError(f"{self._what} failed before; its result does not exist.")
        return self._result


def guard(what: str, call: Callable[[], Any]) -> Any:
    """Run a backend call; a failure says what was running and what to look for."""
    try:
        return call()
    except RuntimeError as error:
        raise MeshError(
            f"{what} failed: {error}. A peer has died or has left the order of collectives: look "
            f"for the first traceback among the ranks; debug.journal=true names the diverging call."
        ) from error


def all_gather_flat(full: Tensor, *, group: AxisGroup, journal: Journal) -> Pending[Tensor]:
    """Fill `full` from the slice that each rank holds of it.

    Args:
        full: (group.size * n,) contiguous; this rank's slice [rank * n, (rank + 1) * n) is filled
            already, the others are overwritten.
        group: the ranks.
        journal: of the run.

    Returns:
        Pending of `full`. One all-gather, n * (size - 1) elements sent.

    Raises:
        MeshError: full.numel() is not a multiple of group.size.
    """
    what = f"all_gather of {full.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending((), lambda: full, what=what)
    parts = _parts(full, group)
    mine = parts[group.rank]
    check = journal.note(
        "all_gather", group, num_bytes=full.nbytes, sent=mine.nbytes * (group.size - 1)
    )
    if full.is_cuda:
        works = [guard(what, lambda: _ALL_GATHER(full, mine, group=group.group, async_op=True))]
    else:
        works = _exchange([mine] * group.size, parts, group=group, what=what)
    return Pending(works, lambda: full, what=what, check=check)


def exchange(
    mine: Tensor | None,
    receivers: Sequence[int],
    into: Mapping[int, Tensor],
    *,
    group: AxisGroup,
) -> Pending[Mapping[int, Tensor]]:
    """Bring the parts of a tensor to some of the ranks. Not in the journal.

    Args:
        mine: this rank's part, contiguous, in host memory; not written before the wait.
        receivers: places in the group, the same on every rank.
        into: on a receiver: place -> where the part of that rank goes, contiguous.
        group: the ranks; used by one thread.

    Returns:
        Pending of `into`. `mine` is sent once to each other receiver.
    """

    def start() -> list[dist.Work]:
        # Receives first: a send that finds its receive posted needs no handshake.
        works = [dist.irecv(part, group=group.group, group_src=p) for p, part in into.items()]
        if mine is not None:
            others = [place for place in receivers if place != group.rank]
            works += [dist.isend(mine, group=group.group, group_dst=place) for place in others]
        return [work for work in works if work is not None]

    what = f"an exchange of parts over {group.label}"
    return Pending(guard(what, start), lambda: into, what=what)


def reduce_scatter_flat(
    send: Tensor, *, group: AxisGroup, journal: Journal, receive: Tensor | None = None
) -> Pending[list[Tensor]]:
    """Bring together the shares of this rank's slice of the sum of `send` over `group`.

    Args:
        send: (group.size * n,) contiguous, any float dtype; must not be written before the result
            is used up, which may look into it.
        group: the ranks.
        journal: of the run.
        receive: (group.size * n,) scratch of the same dtype; made here if None.

    Returns:
        Pending of tensors (n,) in send.dtype, in rank order, whose sum is this rank's slice: see
        `sum_parts`. A single one where the backend has summed. One reduce-scatter of send.nbytes:
        (size - 1) / size of it is sent.

    Raises:
        MeshError: send.numel() is not a multiple of group.size.
    Source: ZeRO, arXiv:1910.02054, section 5.1.
    """
    what = f"reduce_scatter of {send.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending((), lambda: [send], what=what)
    slices = _parts(send, group)
    sent = slices[0].nbytes * (group.size - 1)
    check = journal.note("reduce_scatter", group, num_bytes=send.nbytes, sent=sent)
    if send.is_cuda and send.dtype == torch.float32:
        mine = torch.empty_like(slices[0])
        work = guard(what, lambda: _REDUCE_SCATTER(mine, send, group=group.group, async_op=True))
        return Pending([work], lambda: [mine], what=what, check=check)
    received = torch.empty_like(send) if receive is None else receive
    shares = _parts(received, group)
    if send.is_cuda:
        work = guard(
            what, lambda: dist.all_to_all_single(received, send, group=group.group, async_op=True)
        )
        return Pending([work], lambda: shares, what=what, check=check)
    works = _exchange(slices, shares, group=group, what=what)
    shares[group.rank] = slices[group.rank]
    return Pending(works, lambda: shares, what=what, check=check)


def _exchange(
    outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, group: AxisGroup, what: str
) -> list[dist.Work]:
    """Send outgoing[peer] to, and receive incoming[peer] from, every peer; own slices stay."""
    peers = [(group.rank + step) % group.size for step in range(1, group.size)]

    def start() -> list[dist.Work]:
        # Receives first: a send that finds its receive posted needs no handshake.
        receives = [dist.irecv(incoming[peer], group=group.group, group_src=peer) for peer in peers]
        sends = [dist.isend(outgoing[peer], group=group.group, group_dst=peer) for peer in peers]
        return [work for work in (*receives, *sends) if work is not None]

    return guard(what, start)


def sum_parts(parts: Sequence[Tensor], *, out: Tensor, accumulate: bool, scale: float) -> None:
    """`out` = (or, with `accumulate`, +=) scale * sum of `parts`.

    The sum is taken in fp32 and in the order given, whatever the dtypes.

    Args:
        parts: each (n,).
        out: (n,).
        accumulate: add to what `out` holds.
        scale: factor of the sum.
    """
    if out.dtype != torch.float32:
        total = torch.empty_like(out, dtype=torch.float32)
        sum_parts(parts, out=total, accumulate=False, scale=scale)
        out.add_(total) if accumulate else out.copy_(total)
        return
    rest = list(parts)
    if not accumulate:
        exact = all(part.dtype == torch.float32 for part in parts) and scale == 1.0
        if len(rest) > 1 and exact:
            torch.add(rest.pop(0), rest.pop(0), out=out)
        else:
            out.copy_(rest.pop(0))
            if scale != 1.0:
                out.mul_(scale)
    for part in rest:
        out.add_(part, alpha=scale)


def all_reduce_flat(send: Tensor, *, group: AxisGroup, journal: Journal) -> Pending[Tensor]:
    """Sum `send` over `group` in place: 2 (N-1)/N of send.nbytes.

    A reduce-scatter and an all-gather. The second starts when the first is waited for.

    Args:
        send: (group.size * n,) contiguous; overwritten with the sum, rounded to its dtype.
        group: the ranks.
        journal: of the run.

    Returns:
        Pending of `send`.
    """
    what = f"all_reduce of {send.nbytes} bytes over {group.label}"
    if group.is_identity:
        return Pending((), lambda: send, what=what)
    if send.is_cuda and send.dtype == torch.float32:
        sent = 2 * send.nbytes // group.size * (group.size - 1)
        check = journal.note("all_reduce", group, num_bytes=send.nbytes, sent=sent)
        work = guard(what, lambda: dist.all_reduce(send, group=group.group, async_op=True))
        return Pending([work], lambda: send, what=what, check=check)
    shares = reduce_scatter_flat(send, group=group, journal=journal)

    def finish() -> Tensor:
        mine = _parts(send, group)[group.rank]
        total = torch.empty_like(mine, dtype=torch.float32)
        sum_parts(shares.wait(), out=total, accumulate=False, scale=1.0)
        mine.copy_(total)
        return all_gather_flat(send, group=group, journal=journal).wait()

    return Pending((), finish, what=what)


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
    journal.note("all_reduce", group, num_bytes=value.nbytes, sent=value.nbytes)()
    guard(
        f"all_reduce over {group.label}",
        lambda: dist.all_reduce(value, op=op, group=group.group),
    )
    return value


def broadcast_flat(value: Tensor, *, group: AxisGroup, journal: Journal, source: int = 0) -> Tensor:
    """Overwrite `value` with that of one rank of the group, the first. One broadcast; blocks."""
    if group.is_identity:
        return value
    sent = value.nbytes if group.rank == source else 0
    journal.note("broadcast", group, num_bytes=value.nbytes, sent=sent)()
    guard(
        f"broadcast over {group.label}",
        lambda: dist.broadcast(value, group=group.group, group_src=source),
    )
    return value


def broadcast_object(value: Any, *, group: AxisGroup, device: torch.device) -> Any:
    """What the first rank of the group has, on all: anything that can be pickled. Blocks.

    Two broadcasts. For what is small and rare.
    """
    if group.is_identity:
        return value
    box = [value]
    guard(
        f"broadcast of an object over {group.label}",
        lambda: dist.broadcast_object_list(box, group=group.group, group_src=0, device=device),
    )
    return box[0]


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


def gather_objects(value: T, *, group: AxisGroup) -> list[T]:
    """What every rank has, in rank order: anything that can be pickled and is small. Blocks."""
    if group.is_identity:
        return [value]
    everyone: list[T] = [value] * group.size
    guard(
        f"objects of all ranks over {group.label}",
        lambda: dist.all_gather_object(everyone, value, group=group.group),
    )
    return everyone


def highest(value: int, *, group: AxisGroup) -> int:
    """The largest `value` of any rank. One object all-gather; blocks."""
    if group.is_identity:
        return value
    everyone = [value] * group.size
    guard(
        f"the highest number over {group.label}",
        lambda: dist.all_gather_object(everyone, value, group=group.group),
    )
    return max(everyone)


def _parts(buffer: Tensor, group: AxisGroup) -> list[Tensor]:
    """The slices of a flat buffer, one for each rank, as views."""
    part, rest = divmod(buffer.numel(), group.size)
    if rest or buffer.dim() != 1 or not buffer.is_contiguous():
        raise MeshError(
            f"A buffer of shape {tuple(buffer.shape)} cannot be cut in {group.size} equal slices "
            f"over {group.label}: it must be flat, contiguous and a multiple of the group's size."
        )
    return [buffer[rank * part : (rank + 1) * part] for rank in range(group.size)]
