"""The largest model that is said to fit does, and one block more does not."""

import pytest

from hf_speed.config import Memory, load_config
from hf_speed.config.planner import candidates, limits_of
from hf_speed.engine.capacity import what_fits
from hf_speed.engine.estimate import Estimator, GroupSize

MIB = 1 << 20
BLOCK = GroupSize((3 * MIB, MIB), 2, 4, 2, 4, trained=True)
ROOT = GroupSize((2 * MIB,), 2, 4, 2, 4, trained=True)
CONFIG = load_config({"offload": {"paths": ["/fast"]}})


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_the_largest_model_fits_and_one_block_more_does_not(world_size: int, shared: bool) -> None:  # noqa: FBT001
    memory = Memory(1000 * MIB, 3000 * MIB, 9000 * MIB, shared=shared)
    rows = what_fits([[BLOCK], [BLOCK], [ROOT]], CONFIG, world_size=world_size, memory=memory)
    assert [row.tiers for row in rows] == list(candidates(CONFIG.offload, shared=shared))
    limits = limits_of(CONFIG.offload, memory, is_open=True)
    for row in rows:
        for stage, numel in enumerate(row.numels):
            num_blocks = (numel - 2 * MIB) // (4 * MIB)
            assert num_blocks > 3
            for more, fits in ((0, True), (1, False)):
                units = [[BLOCK]] * (num_blocks + more) + [[ROOT]]
                kind = "cpu" if shared else "cuda"
                estimator = Estimator(units, CONFIG, world_size=world_size, device_type=kind)
                device, host, disk = estimator.needed(stage, row.tiers)
                both = (device + host, 0) if shared else (device, host)
                within = both[0] <= limits.device and both[1] <= limits.host
                assert (within and disk <= limits.disk) is fits


def test_where_not_even_a_block_fits_there_is_none() -> None:
    rows = what_fits([[BLOCK], [ROOT]], CONFIG, world_size=1, memory=Memory(4 * MIB))
    assert {numel for row in rows for numel in row.numels} == {0}


def test_in_a_pipeline_every_rank_has_as_many_blocks_as_the_fullest() -> None:
    config = load_config({"mesh": {"pp": 4, "dp_shard": 2}})
    memory = Memory(1000 * MIB, 3000 * MIB)
    here, whole = [[BLOCK], [BLOCK], [ROOT]], [[BLOCK]] * 8 + [[ROOT]]
    piped = what_fits(here, config, world_size=8, memory=memory, whole=whole)
    for row in piped:
        for stage, numel in enumerate(row.numels):
            num_blocks, rest = divmod(numel - 2 * MIB, 4 * 4 * MIB)
            assert rest == 0
            limits = limits_of(config.offload, memory, is_open=True)
            for more, fits in ((0, True), (1, False)):
                units = [[BLOCK]] * (num_blocks + more) + [[ROOT]]
                needed = Estimator(units, config, world_size=8).needed(stage, row.tiers)
                assert all(n <= m for n, m in zip(needed, limits, strict=True)) is fits
