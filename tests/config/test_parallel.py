"""The axes beyond data parallelism: read, filled in, and refused where they would be ignored."""

import json
from typing import Any, get_args

import pytest

from hf_speed.config import (
    Memory,
    MeshSizes,
    ResolvedConfig,
    TierBytes,
    check_world,
    load_config,
    resolve,
)
from hf_speed.config.parallel import CHUNKS_OF, DEFAULT_CHUNKS
from hf_speed.config.tree import Schedule
from hf_speed.errors import ConfigError
from hf_speed.pipe import schedules
from hf_speed.pipe.schedules import registry


def _resolved(tree: dict[str, Any], *, world_size: int = 8) -> ResolvedConfig:
    stage = {"stage": 1, **tree.get("zero", {})}
    return resolve(load_config({**tree, "zero": stage}), world_size=world_size)


def _pipe(world_size: int = 8, *, pp: int = 2, **pipe: Any) -> ResolvedConfig:
    return _resolved({"mesh": {"pp": pp}, "pipe": pipe}, world_size=world_size)


def test_schedules_are_those_of_the_pipeline_with_as_many_stages_a_rank() -> None:
    assert get_args(Schedule) == tuple(schedules.SCHEDULES)
    assert {name: entry.chunks for name, entry in schedules.SCHEDULES.items()} == CHUNKS_OF
    assert registry.DEFAULT_CHUNKS == DEFAULT_CHUNKS


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ({}, (1, 1, 8, 1)),
        ({"pp": 2}, (2, 1, 4, 1)),
        ({"tp": 4}, (1, 1, 2, 4)),
        ({"pp": 2, "tp": 2}, (2, 1, 2, 2)),
        ({"pp": 2, "tp": 2, "dp_replicate": 2}, (2, 2, 1, 2)),
        ({"pp": 8}, (8, 1, 1, 1)),
        ({"pp": 2, "tp": 2, "dp_replicate": 2, "dp_shard": 1}, (2, 2, 1, 2)),
    ],
)
def test_axes_fill_the_world(mesh: dict[str, int], sizes: tuple[int, ...]) -> None:
    config = load_config({"mesh": mesh, "zero": {"stage": 1}})
    found = check_world(config, 8)
    assert found == MeshSizes(*sizes)
    assert found.data == found.dp_replicate * found.dp_shard
    resolved = resolve(config, world_size=8)
    assert (resolved.pp, resolved.dp_replicate, resolved.dp_shard, resolved.tp) == sizes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            {"pp": 3, "tp": 2},
            (
                r"^mesh\.pp=3 x mesh\.dp_replicate=1 x mesh\.tp=2 does not divide the world of 8 "
                r"processes\. Launch a multiple of 6 processes, for example 6,"
            ),
        ),
        ({"pp": 16}, r"mesh\.pp=16 x mesh\.dp_replicate=1 does not divide .*for example 16,"),
        ({"tp": 3}, r"mesh\.dp_replicate=1 x mesh\.tp=3 does not divide the world of 8"),
        (
            {"pp": 2, "tp": 2, "dp_shard": 3},
            (
                r"^mesh\.pp=2 x mesh\.dp_replicate=1 x mesh\.tp=2 x mesh\.dp_shard=3 asks for 12 "
                r"processes, but the world has 8\. .*launch -n 12`, or leave mesh\.dp_shard out"
            ),
        ),
    ],
)
def test_another_world_than_the_product_is_an_error(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _resolved({"mesh": mesh})


def test_an_open_pipeline_waits_little_for_the_memory_of_1f1b() -> None:
    pipe = _pipe().pipe
    assert (pipe.schedule, pipe.microbatches, pipe.chunks) == ("zb_h1", None, 1)
    assert (pipe.balance, pipe.gather) == ("parameters", "step")


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_each_schedule_has_its_stages_a_rank(schedule: Schedule) -> None:
    fixed = CHUNKS_OF[schedule]
    assert _pipe(schedule=schedule).pipe.chunks == (fixed or DEFAULT_CHUNKS)
    if fixed is None:
        assert _pipe(schedule=schedule, chunks=3).pipe.chunks == 3
        return
    assert _pipe(schedule=schedule, chunks=fixed).pipe.chunks == fixed
    with pytest.raises(
        ConfigError,
        match=rf"pipe\.chunks=3 takes no effect with pipe\.schedule='{schedule}', which has "
        rf"{fixed} a rank\. Remove pipe\.chunks, or use 'interleaved' or 'looped_bfs'",
    ):
        _pipe(schedule=schedule, chunks=3)


def test_what_is_set_of_the_pipeline_passes_through() -> None:
    tree = {
        "mesh": {"pp": 2},
        "zero": {"stage": 3, "prefetch_units": 2, "regather": False},
        "pipe": {
            "schedule": "interleaved",
            "microbatches": 6,
            "chunks": 3,
            "balance": [1, 2, 2, 2, 2, 1],
            "gather": "microbatch",
        },
    }
    resolved = _resolved(tree)
    pipe = resolved.pipe
    assert (pipe.schedule, pipe.microbatches, pipe.chunks) == ("interleaved", 6, 3)
    assert pipe.balance == (1, 2, 2, 2, 2, 1)
    assert pipe.gather == "microbatch"
    assert (resolved.prefetch_units, resolved.regather) == (2, False)
    assert _pipe(balance="time").pipe.balance == "time"


def test_a_list_of_layers_has_one_count_a_stage() -> None:
    with pytest.raises(
        ConfigError,
        match=r"pipe\.balance=\[3, 3\] lists 2 stages, but mesh\.pp=4 x 2 a rank makes 8\. List",
    ):
        _pipe(pp=4, schedule="zb_v", balance=[3, 3])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        *(
            (
                {"pipe": pipe},
                (
                    rf"pipe\.{name}=.* takes effect only where mesh\.pp is above 1, but "
                    r"mesh\.pp=1\. Remove it, or set mesh\.pp"
                ),
            )
            for name, pipe in (
                ("schedule", {"schedule": "zb_v"}),
                ("microbatches", {"microbatches": 4}),
                ("chunks", {"chunks": 2}),
                ("balance", {"balance": "time"}),
                ("gather", {"gather": "microbatch"}),
            )
        ),
        (
            {"tensor": {"sequence_parallel": True}, "mesh": {"pp": 2}},
            r"tensor\.sequence_parallel=True takes effect only where mesh\.tp is above 1",
        ),
        (
            {"mesh": {"pp": 2}, "pipe": {"gather": "microbatch"}, "zero": {"stage": 2}},
            r"pipe\.gather='microbatch' takes effect at stage 3 only, but zero\.stage=2",
        ),
        (
            {"mesh": {"pp": 2}, "zero": {"stage": 3, "prefetch_units": 0}},
            (
                r"zero\.prefetch_units=0 takes no effect with pipe\.gather='step' \(mesh\.pp=2\)"
                r".*set pipe\.gather='microbatch'"
            ),
        ),
        (
            {"mesh": {"pp": 2}, "zero": {"stage": 3, "regather": False}},
            r"zero\.regather=False takes no effect with pipe\.gather='step'",
        ),
        (
            {"mesh": {"pp": 2}, "offload": {"optimizer": "host", "step": "speculative"}},
            r"offload\.step='speculative' takes no effect with mesh\.pp=2: a pipeline reduces",
        ),
    ],
)
def test_what_takes_no_effect_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _resolved(tree)


def test_what_only_a_stage_that_may_come_reads_is_not_refused() -> None:
    tree = {"mesh": {"pp": 2}, "pipe": {"gather": "microbatch"}}
    resolved = resolve(load_config({**tree, "zero": {"stage": 3, "regather": False}}), world_size=2)
    assert not resolved.regather
    # Left open, the stage may become 3.
    open_stage = resolve(
        load_config(tree),
        world_size=2,
        needed=lambda stage, _: TierBytes(10 - stage, 0, 0),
        memory=Memory(9),
    )
    assert open_stage.stage == 3
    assert open_stage.pipe.gather == "microbatch"


def test_a_step_that_is_one_late_goes_with_a_pipeline() -> None:
    tree = {"mesh": {"pp": 2}, "offload": {"optimizer": "host", "step": "delayed"}}
    assert _resolved(tree).offload.step == "delayed"


def test_the_sequence_is_divided_where_asked() -> None:
    assert not _resolved({"mesh": {"tp": 2}}).sequence_parallel
    tree = {"mesh": {"tp": 2}, "tensor": {"sequence_parallel": True}}
    assert _resolved(tree).sequence_parallel


def _rows(tree: dict[str, Any]) -> dict[str, str]:
    return {path: value for path, value, _ in _resolved(tree).rows()}


def test_the_table_shows_what_there_is_of_the_axes() -> None:
    plain = _rows({})
    assert not {"mesh.pp", "mesh.tp"} & set(plain)
    assert not any(path.startswith(("pipe.", "tensor.")) for path in plain)
    pipe = _rows({"mesh": {"pp": 2}, "pipe": {"microbatches": 6, "balance": [3, 5]}})
    found = {path: value for path, value in pipe.items() if path.startswith(("mesh.", "pipe."))}
    assert found == {
        "mesh.pp": "2",
        "pipe.schedule": "zb_h1",
        "pipe.microbatches": "6",
        "pipe.chunks": "1",
        "pipe.balance": "[3, 5]",
        "mesh.dp_replicate": "1",
        "mesh.dp_shard": "4",
    }
    assert _rows({"mesh": {"pp": 2}})["pipe.microbatches"] == "auto"
    tree = {"mesh": {"tp": 2}, "tensor": {"sequence_parallel": True}}
    tensor = _rows(tree)
    assert (tensor["mesh.tp"], tensor["tensor.sequence_parallel"]) == ("2", "true")
    assert _rows({"mesh": {"tp": 2}})["tensor.sequence_parallel"] == "false"


def test_the_table_shows_how_a_pipeline_gathers_at_stage_3() -> None:
    stage_3 = {"mesh": {"pp": 2}, "zero": {"stage": 3}}
    step = _rows(stage_3)
    assert step["pipe.gather"] == "step"
    assert not {"zero.prefetch_units", "zero.regather"} & set(step)
    microbatch = _rows({**stage_3, "pipe": {"gather": "microbatch"}})
    assert microbatch["pipe.gather"] == "microbatch"
    assert (microbatch["zero.prefetch_units"], microbatch["zero.regather"]) == ("1", "true")
    assert "zero.generate" in step


def test_sections_of_the_axes_round_trip_through_json() -> None:
    tree = {
        "mesh": {"pp": 2, "tp": 4, "dp_replicate": 2, "dp_shard": 3},
        "pipe": {
            "schedule": "v_min",
            "microbatches": 5,
            "chunks": 2,
            "balance": [4, 5, 6, 7],
            "gather": "microbatch",
        },
        "tensor": {"sequence_parallel": True},
    }
    config = load_config(tree)
    whole = config.to_dict()
    assert {section: whole[section] for section in tree} == tree
    assert load_config(json.dumps(whole)) == config
    left_open = {"pipe": {"schedule": "auto", "microbatches": "auto", "chunks": "auto"}}
    assert load_config(left_open) == load_config({})
