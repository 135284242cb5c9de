"""States of tensor slices: boxes of the whole, which any other mesh reads bitwise."""

import time
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hf_speed.checkpoint import LocalState, StateReader, write_states
from hf_speed.errors import CheckpointError
from hf_speed.mesh.axes import IDENTITY
from hf_speed.shard.reshard import cover_error
from hf_speed.shard.slicing import Slicing, interval_runs

SHAPES = {
    "embed.weight": (10, 3),
    "layers.0.qkv.weight": (3, 20),
    "layers.0.q.weight": (8, 6),
    "layers.0.k.weight": (6, 6),
    "layers.1.o.weight": (6, 8),
    "layers.1.experts": (2, 3, 8),
    "layers.1.norm.weight": (5,),
    "scale": (),
}
KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16}
TIED = "embed.weight"


class Mesh(NamedTuple):
    """Sizes of the axes that a checkpoint is written or read on."""

    pp: int = 1
    dp: int = 1
    tp: int = 1


MESHES = [
    Mesh(),
    Mesh(dp=3),
    Mesh(dp=2, tp=2),
    Mesh(tp=4),
    Mesh(pp=2, tp=2),
    Mesh(pp=2, dp=2, tp=4),
]


class Place(NamedTuple):
    """One rank's part of one parameter: an interval of what it holds, flattened."""

    name: str
    slicing: Slicing | None
    tp_rank: int
    start: int
    numel: int
    is_counted: bool


def slicings(tp: int) -> dict[str, Slicing]:
    """Uneven vocabulary, fused projections, two key-value heads, row slices of 2-d and 3-d."""
    copies = max(1, tp // 2)
    return {
        "embed.weight": Slicing.uneven(0, [10 - 2 * (tp - 1), *[2] * (tp - 1)]),
        "layers.0.qkv.weight": Slicing.fused(
            [
                Slicing.even(1, 8, tp),
                Slicing.even(1, 6, tp, copies=copies),
                Slicing.even(1, 6, tp, copies=copies),
            ]
        ),
        "layers.0.q.weight": Slicing.even(0, 8, tp),
        "layers.0.k.weight": Slicing.even(0, 6, tp, copies=copies),
        "layers.1.o.weight": Slicing.even(1, 8, tp),
        "layers.1.experts": Slicing.even(2, 8, tp),
    }


def stages(name: str, pp: int) -> tuple[int, ...]:
    """Pipeline ranks that hold a parameter: a tied one the first and the last."""
    if name == TIED:
        return tuple(sorted({0, pp - 1}))
    return (0,) if name.startswith("layers.0") else (pp - 1,)


def places(mesh: Mesh) -> Iterator[Place]:
    """What all ranks of a mesh hold, with uneven cuts between data-parallel ranks."""
    for name, shape in SHAPES.items():
        for tp_rank in range(mesh.tp):
            slicing = slicings(mesh.tp).get(name) if mesh.tp > 1 else None
            local = shape if slicing is None else slicing.local_shape(shape, tp_rank)
            first = 0 if slicing is None else slicing.sharers(tp_rank)[0]
            cuts = [
                prod(local) * part * (part + 1) // (mesh.dp * (mesh.dp + 1))
                for part in range(mesh.dp + 1)
            ]
            for stage in stages(name, mesh.pp):
                counts = tp_rank == first and stage == stages(name, mesh.pp)[0]
                for begin, end in pairwise(cuts):
                    yield Place(name, slicing, tp_rank, begin, end - begin, counts)


def full(name: str, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) * 31 + len(kind))
    return torch.randn(SHAPES[name], generator=generator).to(KINDS[kind])


def local_values(place: Place, kind: str) -> torch.Tensor:
    whole = full(place.name, kind)
    local = whole if place.slicing is None else place.slicing.cut(whole, place.tp_rank)
    return local.reshape(-1)[place.start : place.start + place.numel]


def states(mesh: Mesh) -> Iterator[LocalState]:
    for place in places(mesh):
        for kind in KINDS if place.is_counted else ():
            yield LocalState(
                place.name,
                kind,
                SHAPES[place.name],
                place.start,
                place.numel,
                local_values(place, kind),
                place.slicing,
                place.tp_rank,
            )


@pytest.mark.parametrize("written", MESHES, ids=str)
def test_what_any_mesh_wrote_every_mesh_reads_bitwise(written: Mesh, tmp_path: Path) -> None:
    write_states(tmp_path, states(written), {}, world=IDENTITY, max_shard_bytes=300)
    with StateReader(tmp_path) as reader:
        reader.check(SHAPES, kind="master")
        num_stored = sum(prod(p.extents) for e in reader.manifest.entries for p in e.pieces)
        assert num_stored == len(KINDS) * sum(prod(shape) for shape in SHAPES.values())
        for mesh in MESHES:
            for place in places(mesh):
                for kind, dtype in KINDS.items():
                    value = reader.read(
                        place.name,
                        kind,
                        place.start,
                        place.numel,
                        slicing=place.slicing,
                        tp_rank=place.tp_rank,
                    )
                    assert value is not None
                    assert value.dtype == dtype
                    assert torch.equal(value, local_values(place, kind))


def test_of_a_repeated_stretch_only_the_first_holder_writes(tmp_path: Path) -> None:
    heads = Slicing.even(0, 6, 4, copies=2)
    value = torch.zeros(18)
    held = [LocalState("k", "m", (6, 6), 0, 18, value, heads, rank) for rank in (1, 2, 3)]
    with pytest.raises(CheckpointError, match=r"the m of k are bad: 18 of 36 elements are missing"):
        write_states(tmp_path, held, {}, world=IDENTITY)


@pytest.mark.parametrize(
    ("shape", "numel", "message"),
    [
        ((8, 6), 18, r"The m of k does not fit: the whole has shape \(8, 6\).*expects 6 along dim"),
        ((6, 6), 19, r"The m of k does not fit: \[0, 19\) is not within a tensor of shape \(3, 6"),
    ],
)
def test_states_that_are_not_of_their_slice_are_refused(
    shape: tuple[int, ...], numel: int, message: str, tmp_path: Path
) -> None:
    state = LocalState("k", "m", shape, 0, numel, torch.zeros(numel), Slicing.even(0, 6, 2), 0)
    with pytest.raises(CheckpointError, match=message):
        write_states(tmp_path, [state], {}, world=IDENTITY)


def test_reading_by_a_slicing_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_states(tmp_path, states(Mesh()), {}, world=IDENTITY)
    with StateReader(tmp_path) as reader, pytest.raises(CheckpointError, match="of another model"):
        reader.read("layers.0.q.weight", "master", 0, 4, slicing=Slicing.even(0, 6, 2))


def test_checking_what_a_thousand_ranks_wrote_of_one_tensor_takes_a_second_at_most() -> None:
    shape, tp, dp = (8192, 3 * 8192), 16, 64
    slicing = Slicing.fused([Slicing.even(1, 8192, tp)] * 3)
    numel = prod(slicing.local_shape(shape, 0))
    found = []
    for rank in range(tp):
        # Cuts that fall within rows, and on each rank elsewhere: no box lines up with another.
        cuts = [0, *(numel * part // dp + 1001 * rank + 7 for part in range(1, dp)), numel]
        for begin, end in pairwise(cuts):
            found += interval_runs(shape, begin, end - begin, slicing=slicing, rank=rank)
    assert len(found) > 3 * tp * dp
    begin = time.perf_counter()
    assert cover_error(shape, tuple(run.box for run in found)) is None
    assert time.perf_counter() - begin < 1.0
