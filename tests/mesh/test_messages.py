"""Messages between two ranks, and groups of some of the places along an axis."""

import pytest
import torch

from hf_speed.errors import MeshError
from hf_speed.mesh import Lane, ParallelMesh
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import all_reduce_small
from hf_speed.mesh.journal import Journal
from hf_speed.mesh.messages import receive, send
from tests.support import run_ranks


def _tagged() -> list[float]:
    """Two messages, received in another order than they were sent."""
    mesh = ParallelMesh({"pp": 2}, device=torch.device("cpu"))
    group = mesh.axis("pp", lane=Lane.FORWARD)
    if group.rank == 0:
        leaving = [
            send(torch.full((3,), float(tag)), to=1, tag=tag, group=group, journal=mesh.journal)
            for tag in (5, 6)
        ]
        for each in leaving:
            each.wait()
        return [float(mesh.journal.bytes_sent["send"])]
    second, first = (
        receive(torch.empty(3), source=0, tag=tag, group=group).wait() for tag in (6, 5)
    )
    return [float(first[0]), float(second[0])]


def test_a_message_finds_its_receive_by_its_tag_and_its_bytes_are_counted() -> None:
    assert run_ranks(_tagged, 2) == [[24.0], [5.0, 6.0]]


def test_a_group_of_one_has_nobody_to_talk_to() -> None:
    with pytest.raises(MeshError, match=r"send of 4 bytes to rank 1 of identity: there is no"):
        send(torch.ones(1), to=1, tag=0, group=IDENTITY, journal=Journal(enabled=False))
    with pytest.raises(MeshError, match=r"receive of 4 bytes from rank 1 of identity"):
        receive(torch.ones(1), source=1, tag=0, group=IDENTITY)


def _within() -> tuple[int, float, str]:
    """Of four pipeline ranks the first and the last share a weight."""
    mesh = ParallelMesh({"pp": 4}, device=torch.device("cpu"))
    ends = mesh.axis("pp", "dp_replicate", within={"pp": (0, 3)})
    value = torch.tensor([float(mesh.rank + 1)])
    all_reduce_small(value, group=ends, journal=mesh.journal)
    return ends.size, float(value), ends.label


def test_a_group_may_have_some_places_along_an_axis_only() -> None:
    first, second, third, last = run_ranks(_within, 4)
    assert first == last == (2, 5.0, "pp x dp_replicate pp[0, 3]/control")
    assert second == (1, 2.0, "identity")
    assert third == (1, 3.0, "identity")
