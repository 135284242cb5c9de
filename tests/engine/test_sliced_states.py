"""Checkpoints of engines that hold slices and stages: names and shapes of the whole model.

One process plays several pipeline and slicing ranks: for each an engine over the parameters that
this rank would have, with its catalogue. Data-parallel ranks are processes.
"""

from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_speed.checkpoint import StateReader, write_states
from hf_speed.engine import Engine, state
from hf_speed.engine.catalogue import Catalogue, ParameterRecord
from hf_speed.engine.rng import load_rng, rng_state
from hf_speed.errors import CheckpointError
from hf_speed.mesh import ParallelMesh
from hf_speed.shard.slicing import Slicing
from hf_speed.zero.states import holdings
from tests.engine.toys import speed
from tests.support import run_ranks

SHAPES = {
    "embed.weight": (10, 4),
    "layers.0.qkv.weight": (4, 16),
    "layers.0.k.weight": (6, 4),
    "layers.1.o.weight": (5, 8),
    "norm.weight": (4,),
}
FROZEN = "norm.weight"
TIED = {"head.weight": "embed.weight"}
MOMENTS = ("exp_avg", "exp_avg_sq")
UNSAVED = 99
"""Seed of ranks before they load."""


class Sizes(NamedTuple):
    """Of the axes that one process plays, and of the one that processes are."""

    pp: int
    tp: int
    dp: int


MESHES = [Sizes(1, 1, 1), Sizes(1, 2, 2), Sizes(2, 2, 1), Sizes(1, 4, 1), Sizes(2, 4, 2)]


def _slicing(name: str, tp: int) -> Slicing | None:
    if tp == 1:
        return None
    copies = max(1, tp // 2)
    key = Slicing.even(1, 4, tp, copies=copies)
    return {
        "embed.weight": Slicing.uneven(0, [10 - 2 * (tp - 1), *[2] * (tp - 1)]),
        "layers.0.qkv.weight": Slicing.fused([Slicing.even(1, 8, tp), key, key]),
        "layers.0.k.weight": Slicing.even(0, 6, tp, copies=copies),
        "layers.1.o.weight": Slicing.even(1, 8, tp),
    }.get(name)


def _stages(name: str, pp: int) -> tuple[int, ...]:
    if name in TIED.values():
        return tuple(sorted({0, pp - 1}))
    return (0,) if name.startswith("layers.0") else (pp - 1,)


def _catalogue(sizes: Sizes, pp_rank: int, tp_rank: int) -> Catalogue:
    records = [
        ParameterRecord(
            name=name,
            shape=shape,
            stages=_stages(name, sizes.pp),
            slicing=_slicing(name, sizes.tp),
            partial=(),
            trainable=name != FROZEN,
            dtype=torch.float32,
        )
        for name, shape in SHAPES.items()
    ]
    aliases = {**{name: name for name in SHAPES}, **TIED}
    return Catalogue(records, aliases, pp_rank=pp_rank, tp_rank=tp_rank)


def _whole(name: str, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) * 31 + len(kind))
    return torch.randn(SHAPES[name], generator=generator)


def _local(record: ParameterRecord, kind: str, tp_rank: int) -> Tensor:
    whole = _whole(record.name, kind)
    return whole if record.slicing is None else record.slicing.cut(whole, tp_rank)


def _module(catalogue: Catalogue) -> nn.Module:
    """What this rank has: nested modules that give its parameters their names."""
    model = nn.Module()
    for record in catalogue.records.values():
        if catalogue.is_here(record.name):
            name = record.name
            if record.name in TIED.values() and catalogue.pp_rank > 0:
                name = next(alias for alias, first in TIED.items() if first == name)
            *path, key = name.split(".")
            module = model
            for each in path:
                if each not in dict(module.named_children()):
                    module.add_module(each, nn.Module())
                module = module.get_submodule(each)
            value = torch.zeros(_local(record, "master", catalogue.tp_rank).shape)
            module.register_parameter(key, nn.Parameter(value, requires_grad=record.trainable))
    return model


def _engines(sizes: Sizes, stage: int) -> Iterator[Engine]:
    """One engine for each pipeline and slicing rank."""
    for pp_rank, tp_rank in product(range(sizes.pp), range(sizes.tp)):
        catalogue = _catalogue(sizes, pp_rank, tp_rank)
        model = _module(catalogue)
        engine = Engine.attach(model, speed(stage), compute_dtype=torch.bfloat16)
        division = engine.parts.division._replace(catalogue=catalogue)
        engine._parts = engine.parts._replace(division=division)
        engine.bind_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
        yield engine


def _expected(engine: Engine) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """Every trained piece, and what belongs in it and its states."""
    catalogue = engine.parts.catalogue
    for _, slot, piece, place in holdings([g for g in engine.parts.groups if g.trainable]):
        record = catalogue.record(slot.name)
        values = {
            kind: _local(record, kind, catalogue.tp_rank)
            .reshape(-1)[place.start : place.start + place.numel]
            .view(piece.shape)
            for kind in (state.MASTER, *MOMENTS)
        }
        yield piece, values


def _fill(engine: Engine) -> None:
    for piece, values in _expected(engine):
        piece.data.copy_(values[state.MASTER])
        moments = {kind: values[kind].clone() for kind in MOMENTS}
        engine.optimizer.state[piece] = {"step": torch.tensor(3.0), **moments}
    engine.optimizer.param_groups[0]["lr"] = 5e-4


def _save(directory: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Save as all played ranks would together; the meta data that each of them has."""
    calls: list[tuple[Any, ...]] = []

    def record(_: str, states: Any, meta: Any, **kwargs: Any) -> None:
        kept = [each._replace(value=each.value.clone()) for each in states]
        calls.append((kept, meta, kwargs))

    for engine in _engines(sizes, stage=3):
        _fill(engine)
        with patch.object(state, "write_states", record):
            engine.save(str(directory))
    scalars: dict[str, Any] = {}
    for call in calls:
        scalars |= call[2]["scalars"]
    states = chain.from_iterable(call[0] for call in calls)
    write_states(directory, states, calls[0][1], **{**calls[0][2], "scalars": scalars})
    return [call[1] for call in calls]


def _save_all(root: str) -> dict[Sizes, list[dict[str, Any]]]:
    here = [sizes for sizes in MESHES if sizes.dp == dist.get_world_size()]
    return {sizes: _save(Path(root) / str(sizes), sizes) for sizes in here}


def _load(directory: Path, sizes: Sizes, stage: int) -> None:
    for engine in _engines(sizes, stage):
        engine.load(str(directory))
        for piece, values in _expected(engine):
            found = engine.optimizer.state[piece]
            assert torch.equal(piece, values[state.MASTER])
            assert all(torch.equal(found[kind], values[kind]) for kind in MOMENTS)
            assert found["step"] == 3
        assert engine.optimizer.param_groups[0]["lr"] == 5e-4


def _load_all(root: str, stage: int) -> None:
    here = [sizes for sizes in MESHES if sizes.dp == dist.get_world_size()]
    for written, sizes in product(MESHES, here):
        _load(Path(root) / str(written), sizes, stage)


def test_engines_of_any_mesh_go_on_bitwise_from_any_other(tmp_path: Path) -> None:
    metas = {}
    for world_size in (1, 2):
        metas |= run_ranks(_save_all, world_size, str(tmp_path))[0]
    assert metas.keys() == set(MESHES)
    trained = {name: list(shape) for name, shape in SHAPES.items() if name != FROZEN}
    for sizes, played in metas.items():
        assert len(played) == sizes.pp * sizes.tp
        assert all(meta[state.PARAMETER_SHAPES] == trained for meta in played)
        assert all(meta["param_groups"] == played[0]["param_groups"] for meta in played)
        with StateReader(tmp_path / str(sizes)) as reader:
            for kind in (state.MASTER, *MOMENTS):
                reader.check({name: SHAPES[name] for name in trained}, kind=kind)
            assert reader.scalars.keys() == trained.keys()
    for world_size, stage in ((1, 1), (2, 3)):
        run_ranks(_load_all, world_size, str(tmp_path), stage)


def _refused(directory: str) -> None:
    _save(Path(directory), Sizes(1, 1, 1))
    engine = next(_engines(Sizes(2, 2, 1), stage=1))
    record = engine.parts.catalogue.records["layers.1.o.weight"]
    engine.parts.catalogue.records[record.name] = record._replace(shape=(6, 8))
    with pytest.raises(CheckpointError, match=r"1 trainable parameters differ.*\(5, 8\) there, \("):
        engine.load(directory)


def test_another_shape_is_refused_by_the_ranks_that_do_not_hold_it(tmp_path: Path) -> None:
    run_ranks(_refused, 1, str(tmp_path))


def _save_rng(directory: str, sizes: dict[str, int]) -> None:
    mesh = ParallelMesh(sizes, device=torch.device("cpu"))
    torch.manual_seed(100 + mesh.rank)
    write_states(
        directory,
        [],
        {"mesh": dict(mesh.sizes)},
        world=mesh.world,
        local=rng_state(mesh.device),
    )


def _load_rng(directory: str, *meshes: dict[str, int]) -> list[tuple[int, list[str]]]:
    """For each mesh: the seed whose stream this rank goes on with, and the warnings."""
    found = []
    for sizes in meshes:
        mesh = ParallelMesh(sizes, device=torch.device("cpu"))
        torch.manual_seed(UNSAVED)
        with (
            StateReader(directory) as reader,
            patch("hf_speed.engine.rng._log.warning") as warning,
        ):
            load_rng(mesh, reader)
        texts = [call.args[0] % call.args[1:] for call in warning.call_args_list]
        found.append((torch.initial_seed(), texts))
    return found


def test_ranks_of_one_batch_share_a_random_state_on_another_mesh(tmp_path: Path) -> None:
    directory, written = str(tmp_path), {"pp": 2, "dp_shard": 2}
    run_ranks(_save_rng, 4, directory, written)
    four = run_ranks(_load_rng, 4, directory, written, {"dp_replicate": 2, "tp": 2})
    assert [[seed for seed, _ in rank] for rank in four] == [
        [100, 100],
        [101, 100],
        [102, 101],
        [103, 101],
    ]
    two = run_ranks(_load_rng, 2, directory, {"pp": 2}, {"dp_shard": 2})
    assert [[seed for seed, _ in rank] for rank in two] == [[100, 100], [100, 101]]
    assert not any(warnings for rank in (*four, *two) for _, warnings in rank)


def test_data_ranks_without_a_saved_random_state_keep_theirs_with_a_warning(
    tmp_path: Path,
) -> None:
    run_ranks(_save_rng, 2, str(tmp_path), {"tp": 2})
    for rank, [(seed, warnings)] in enumerate(
        run_ranks(_load_rng, 2, str(tmp_path), {"dp_shard": 2})
    ):
        assert seed == (100, UNSAVED)[rank]
        assert len(warnings) == 1
        assert "for all of this run's 2 data-parallel ranks (it was saved by 1)" in warnings[0]
