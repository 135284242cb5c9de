"""The journal: who is named when ranks part ways."""

import time

import torch

from hf_speed.errors import DivergenceError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import all_gather_flat, all_reduce_small
from hf_speed.mesh.journal import Journal
from tests.support import run_ranks


def _watched(timeout_s: float = 2.0) -> ParallelMesh:
    sizes = {"dp_replicate": 2, "dp_shard": 2}
    journal = Journal(enabled=True)
    return ParallelMesh(sizes, device=torch.device("cpu"), timeout_s=timeout_s, journal=journal)


def _part_ways(how: str) -> str:
    mesh = _watched()
    group = mesh.axis("dp_shard")
    for _ in range(3):
        all_gather_flat(torch.zeros(4), group=group, journal=mesh.journal).wait()
    odd_one = mesh.rank == 3
    try:
        if odd_one and how == "operation":
            all_reduce_small(torch.zeros(1), group=group, journal=mesh.journal)
        elif odd_one and how == "absent":
            time.sleep(3.0)
        else:
            numel = 8 if odd_one else 4
            all_gather_flat(torch.zeros(numel), group=group, journal=mesh.journal).wait()
    except DivergenceError as error:
        return str(error)
    return ""


def test_other_sizes_and_operations_are_named_with_rank_and_caller() -> None:
    for how, theirs in (("size", "all_gather #4 of 32 bytes"), ("operation", "all_reduce #4 of 4")):
        first, second, third, fourth = run_ranks(_part_ways, 4, how)
        # The other pair is not concerned.
        assert first == second == ""
        for message in (third, fourth):
            assert "Ranks [2, 3] of dp_shard/control" in message
            assert "rank 2: all_gather #4 of 16 bytes" in message
            assert f"rank 3: {theirs}" in message
            assert "test_journal.py" in message
            assert "in _part_ways" in message


def test_a_rank_that_does_not_come_is_named() -> None:
    messages = run_ranks(_part_ways, 4, "absent")
    assert "[3] did not come to all_gather #4 of 16 bytes" in messages[2]
    assert messages[0] == messages[1] == messages[3] == ""


def _many() -> int:
    journal = Journal(enabled=True, num_kept=10)
    mesh = ParallelMesh({"dp_shard": 2}, device=torch.device("cpu"), journal=journal)
    # More than the notes that are kept.
    for _ in range(50):
        all_reduce_small(torch.zeros(1), group=mesh.axis("dp_shard"), journal=journal)
    mesh.close()
    return journal.bytes_sent["all_reduce"]


def test_a_long_run_is_followed_to_its_end() -> None:
    assert run_ranks(_many, 2) == [4 * 50] * 2
