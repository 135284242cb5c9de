"""Collectives against sums and concatenations written out, and the bytes that they send."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_speed.errors import MeshError
from hf_speed.mesh import AxisGroup, Lane, ParallelMesh
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import (
    agree,
    all_gather_flat,
    all_reduce_flat,
    all_reduce_small,
    broadcast_flat,
    reduce_scatter_flat,
    sum_parts,
)
from hf_speed.mesh.journal import Journal
from tests.support import run_ranks

PART = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _mesh() -> tuple[ParallelMesh, AxisGroup]:
    world_size = dist.get_world_size()
    mesh = ParallelMesh({"dp_shard": world_size}, device=torch.device("cpu"), timeout_s=20.0)
    return mesh, mesh.axis("dp_shard", lane=Lane.GATHER)


def _moving() -> None:
    mesh, group = _mesh()
    size, rank, journal = group.size, group.rank, mesh.journal
    for dtype in DTYPES:
        itemsize = dtype.itemsize
        full = torch.full((size * PART,), -1.0, dtype=dtype)
        full[rank * PART : (rank + 1) * PART] = _values(rank, PART, dtype)
        before = journal.total_bytes_sent
        all_gather_flat(full, group=group, journal=journal).wait()
        assert torch.equal(full, torch.cat([_values(r, PART, dtype) for r in range(size)]))
        assert journal.total_bytes_sent - before == (size - 1) * PART * itemsize

        everyone = [_values(r, size * PART, dtype).float() for r in range(size)]
        send = _values(rank, size * PART, dtype)
        shares = reduce_scatter_flat(send, group=group, journal=journal).wait()
        mine = torch.empty(PART)
        sum_parts(shares, out=mine, accumulate=False, scale=1.0)
        # In rank order and in fp32: bitwise the sum written out.
        expected = everyone[0].clone()
        for each in everyone[1:]:
            expected += each
        assert torch.equal(mine, expected[rank * PART : (rank + 1) * PART])

        before = journal.total_bytes_sent
        send = _values(rank, size * PART, dtype)
        all_reduce_flat(send, group=group, journal=journal).wait()
        assert torch.equal(send, expected.to(dtype))
        assert journal.total_bytes_sent - before == 2 * (size - 1) * PART * itemsize

    value = torch.tensor([float(rank), -float(rank)])
    assert all_reduce_small(value, group=group, journal=journal, op=dist.ReduceOp.MAX).tolist() == [
        size - 1.0,
        0.0,
    ]
    assert broadcast_flat(torch.tensor([rank + 7]), group=group, journal=journal).item() == 7
    assert agree(None, group=group) is None
    error = OSError("disk full") if rank == size - 1 else None
    assert agree(error, group=group) == f"rank {size - 1}: OSError: disk full"


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_move_and_sum_exactly_with_the_fewest_bytes(world_size: int) -> None:
    run_ranks(_moving, world_size)


def _overtaking() -> None:
    """Two gathers and a reduction under way, finished in another order than they started."""
    mesh, group = _mesh()
    other = mesh.axis("dp_shard", lane=Lane.REDUCE)
    fulls = [torch.full((group.size * PART,), 10.0 * place + group.rank) for place in range(3)]
    gathers = [all_gather_flat(full, group=group, journal=mesh.journal) for full in fulls]
    shares = reduce_scatter_flat(torch.ones(group.size * PART), group=other, journal=mesh.journal)
    for place in (2, 0, 1):
        expected = torch.arange(group.size).repeat_interleave(PART) + 10.0 * place
        assert torch.equal(gathers[place].wait(), expected)
        assert gathers[place].wait() is fulls[place]
    assert len(shares.wait()) == group.size


def test_collectives_in_flight_finish_in_any_order() -> None:
    run_ranks(_overtaking, 3)


def test_over_one_rank_everything_is_the_identity_and_sends_nothing() -> None:
    journal = Journal(enabled=True)
    value = torch.randn(7)
    assert all_gather_flat(value, group=IDENTITY, journal=journal).wait() is value
    assert reduce_scatter_flat(value, group=IDENTITY, journal=journal).wait() == [value]
    assert all_reduce_flat(value, group=IDENTITY, journal=journal).wait() is value
    assert all_reduce_small(value, group=IDENTITY, journal=journal) is value
    assert broadcast_flat(value, group=IDENTITY, journal=journal) is value
    assert agree(None, group=IDENTITY) is None
    assert agree(ValueError("no"), group=IDENTITY) == "rank 0: ValueError: no"
    assert journal.total_bytes_sent == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_scaled_and_added_up_in_fp32(dtype: torch.dtype) -> None:
    parts = [_values(rank, 9, dtype) for rank in range(4)]
    exact = 0.25 * torch.stack([part.double() for part in parts]).sum(0)
    out = torch.ones(9)
    sum_parts(parts, out=out, accumulate=True, scale=0.25)
    torch.testing.assert_close(out, (exact + 1.0).float(), rtol=1e-6, atol=1e-7)
    rounded = torch.zeros(9, dtype=dtype)
    sum_parts(parts, out=rounded, accumulate=False, scale=0.25)
    # Rounded once, at the end.
    assert torch.equal(rounded, _fp32_sum(parts, 0.25).to(dtype))


def _fp32_sum(parts: list[Tensor], scale: float) -> Tensor:
    total = parts[0].float() * scale
    for part in parts[1:]:
        total = total.add(part.float(), alpha=scale)
    return total


def _uneven() -> None:
    mesh, group = _mesh()
    with pytest.raises(MeshError, match=r"shape \(7,\) cannot be cut in 2 equal slices"):
        all_gather_flat(torch.zeros(7), group=group, journal=mesh.journal)
    with pytest.raises(MeshError, match="must be flat, contiguous"):
        reduce_scatter_flat(torch.zeros(4, 4), group=group, journal=mesh.journal)


def test_buffers_that_do_not_divide_are_refused() -> None:
    run_ranks(_uneven, 2)


def _closed() -> None:
    mesh, group = _mesh()
    assert mesh.axis("dp_shard", lane=Lane.GATHER) is group
    assert mesh.axis("tp") is IDENTITY
    assert mesh.world.size == 2
    mesh.close()
    mesh.close()
    with pytest.raises(MeshError, match="This mesh was closed"):
        mesh.axis("dp_shard")
    # A new one lives beside what the old one left: the user's own group.
    _moving()
    dist.barrier()


def test_a_closed_mesh_takes_its_groups_with_it_and_leaves_the_users() -> None:
    run_ranks(_closed, 2)


def test_one_process_needs_no_backend() -> None:
    mesh = ParallelMesh({}, device=torch.device("cpu"))
    assert not dist.is_initialized()
    assert (mesh.world_size, mesh.rank, mesh.world) == (1, 0, IDENTITY)
    with pytest.raises(MeshError, match="dp_shard=2 needs 2 ranks, but 1 were started"):
        ParallelMesh({"dp_shard": 2}, device=torch.device("cpu"))
