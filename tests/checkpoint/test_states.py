"""Training state: what any mesh writes, any other reads, and what is damaged is refused by name."""

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_speed.checkpoint import LocalState, StateReader, write_states
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import run_ranks

SHAPES = {"a.weight": (5, 3, 4), "b.bias": (7,), "c.scale": (), "d.empty": (0, 3)}
KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16}


def world_group() -> AxisGroup:
    return AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")


def full(name: str, kind: str, *, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) * 31 + len(kind))
    value = torch.randn(prod(SHAPES[name]), generator=generator) + offset
    return value.to(KINDS[kind])


def intervals(numel: int, size: int) -> list[tuple[int, int]]:
    """Uneven: the first rank has least, and with few elements some ranks have none."""
    cuts = [numel * rank * (rank + 1) // (size * (size + 1)) for rank in range(size + 1)]
    return [(begin, end - begin) for begin, end in pairwise(cuts)]


def states_of(rank: int, size: int, *, offset: float = 0.0) -> Iterator[LocalState]:
    for name, shape in SHAPES.items():
        for kind in KINDS:
            start, numel = intervals(prod(shape), size)[rank]
            value = full(name, kind, offset=offset)[start : start + numel]
            yield LocalState(name, kind, shape, start, numel, value)


def save(directory: Path, world: AxisGroup, *, offset: float = 0.0) -> None:
    write_states(
        directory,
        states_of(world.rank, world.size, offset=offset),
        {"stage": 3, "rank": world.rank},
        world=world,
        scalars={name: {"step": 4.0} for name in SHAPES},
        local={"rng": torch.full((3,), world.rank, dtype=torch.uint8)},
        max_shard_bytes=100,
    )


def check_read(directory: Path, size: int, *, offset: float = 0.0) -> None:
    with StateReader(directory) as reader:
        for rank in range(size):
            for state in states_of(rank, size, offset=offset):
                value = reader.read(state.name, state.kind, state.start, state.numel)
                assert value is not None
                assert torch.equal(value, state.value)
                assert value.dtype == state.value.dtype


def _save_rank(directory: str) -> None:
    save(Path(directory), world_group())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_world_reads_what_any_world_wrote(size: int, tmp_path: Path) -> None:
    run_ranks(_save_rank, size, str(tmp_path))
    for other in (1, 2, 4, 7):
        check_read(tmp_path, other)
    reader = StateReader(tmp_path)
    assert reader.manifest.world_size == size
    assert reader.meta == {"stage": 3, "rank": 0}
    assert reader.scalars["b.bias"] == {"step": 4.0}
    assert [reader.local(rank)["rng"].tolist() for rank in range(size)] == [
        [rank] * 3 for rank in range(size)
    ]
    assert reader.local(size) == {}
    assert reader.kinds("c.scale") == ("exp_avg", "master")
    assert not (tmp_path / "hf_speed" / ".staging").exists()


def test_states_of_none_are_none(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    assert StateReader(tmp_path).read("a.weight", "exp_avg_sq", 0, 1) is None
    assert StateReader(tmp_path).read("z", "master", 0, 1) is None


def test_files_stay_below_the_limit_unless_one_state_is_larger(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    files = sorted(path.name for path in (tmp_path / "hf_speed").glob("state-*"))
    assert files == [f"state-001-rank00000-{index:05d}.safetensors" for index in range(3)]


def test_second_save_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    save(tmp_path, IDENTITY, offset=1.0)
    check_read(tmp_path, 2, offset=1.0)
    assert {path.name[:9] for path in (tmp_path / "hf_speed").glob("state-*")} == {"state-002"}


def test_kill_before_the_manifest_leaves_the_save_before(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    manifest = (tmp_path / MANIFEST_PATH).read_bytes()
    kept = {path: path.read_bytes() for path in (tmp_path / "hf_speed").glob("*.safetensors")}
    save(tmp_path, IDENTITY, offset=1.0)
    # The moment before the rename: new files are in place, the old ones not yet removed.
    (tmp_path / MANIFEST_PATH).write_bytes(manifest)
    for path, data in kept.items():
        path.write_bytes(data)
    check_read(tmp_path, 3)
    save(tmp_path, IDENTITY, offset=2.0)
    check_read(tmp_path, 3, offset=2.0)


def test_missing_manifest_says_that_the_save_was_cut_short(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    (tmp_path / MANIFEST_PATH).unlink()
    with pytest.raises(
        CheckpointError, match=r"was not saved to the end.*Use an earlier checkpoint"
    ):
        StateReader(tmp_path)


def test_directory_without_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no hf_speed training state"):
        StateReader(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        StateReader(tmp_path / "absent")


def test_missing_and_truncated_files_are_named_with_what_they_hold(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    path = tmp_path / "hf_speed" / "state-001-rank00000-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    message = rf"00000-00000.safetensors has {len(data) - 3} bytes instead of {len(data)}; it holds"
    with pytest.raises(CheckpointError, match=message + ".* of a.weight"):
        StateReader(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"is missing; it holds the .* of a.weight"):
        StateReader(tmp_path)


def test_damaged_content_of_the_right_size_is_named(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    path = tmp_path / "hf_speed" / "state-001-rank00000-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(
        CheckpointError, match=r"00000-00000.safetensors is damaged: .* It holds the"
    ):
        check_read(tmp_path, 1)


def test_checkpoint_of_another_model_names_the_parameters(tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    reader = StateReader(tmp_path)
    reader.check(SHAPES, kind="master")
    with pytest.raises(CheckpointError, match=r"b.bias is \(7,\) there and \(8,\) here"):
        reader.check({**SHAPES, "b.bias": (8,)}, kind="master")
    other = {("a.wait" if name == "a.weight" else name): shape for name, shape in SHAPES.items()}
    with pytest.raises(CheckpointError, match=r"first a.wait \(nearest there: a.weight\)"):
        reader.check(other, kind="master")
    with pytest.raises(CheckpointError, match=r"is of another model: the master of b\.bias"):
        reader.read("b.bias", "master", 0, 8)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("gap", "pieces of the master of b.bias are bad: 2 of 7 elements are missing"),
        ("overlap", "pieces of the master of b.bias are bad: .* overlap"),
    ],
)
def test_gaps_and_overlaps_are_refused_at_the_save(drop: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, IDENTITY)
    start, numel = (0, 5) if drop == "gap" else (0, 7)
    states = [LocalState("b.bias", "master", (7,), start, numel, torch.zeros(numel))]
    if drop == "overlap":
        states.append(LocalState("b.bias", "master", (7,), 3, 2, torch.zeros(2)))
    with pytest.raises(CheckpointError, match=message):
        write_states(tmp_path, states, {}, world=IDENTITY)
    check_read(tmp_path, 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            LocalState("b", "m", (7,), 0, 7, torch.zeros(6)),
            r"has a value of shape \(6,\), not \(7,\)",
        ),
        (LocalState("b", "m", (7,), 3, 5, torch.zeros(5)), r"does not fit: \[3, 8\) is not within"),
        (LocalState("b", "m", (1,), 0, 1, torch.zeros(1, dtype=torch.complex64)), "cannot hold"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    state: LocalState, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_states(tmp_path, [state], {}, world=IDENTITY)


def _disagree_rank(directory: str) -> str:
    world = world_group()
    scalars = {"b.bias": {"step": float(world.rank)}}
    with pytest.raises(CheckpointError) as caught:
        write_states(directory, [], {}, world=world, scalars=scalars)
    return str(caught.value)


def test_ranks_that_disagree_on_a_scalar_are_refused_on_every_rank(tmp_path: Path) -> None:
    texts = run_ranks(_disagree_rank, 2, str(tmp_path))
    assert all("Rank 1 has step=1.0 for b.bias where another has 0.0" in text for text in texts)
