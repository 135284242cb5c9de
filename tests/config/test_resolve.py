"""What is left open is chosen from world, dtypes and bytes; what cannot take effect is refused."""

from typing import Any

import pytest
import torch

from hf_speed.config import Memory, ResolvedConfig, TierBytes, Tiers, load_config, resolve
from hf_speed.errors import ConfigError


def _needed(stage: int, tiers: Tiers) -> TierBytes:
    """Of bytes that stand for any model: parameters shrink at stage 3, the rest before."""
    amounts = {"device": 0, "host": 0, "disk": 0}
    for tier, num_bytes in zip(tiers, OF_STAGE[stage], strict=True):
        amounts[tier] += num_bytes
    return TierBytes(**amounts)


OF_STAGE = ((1200, 200, 200), (600, 200, 200), (300, 100, 200), (200, 100, 100))
"""Optimizer, gradients and parameters at each stage: 1600, 1000, 600 and 400 in all."""


def _resolved(tree: dict[str, Any], *, memory_bytes: int = 4000, **given: Any) -> ResolvedConfig:
    memory = Memory(memory_bytes, shared=True)
    return resolve(
        load_config(tree), **{"world_size": 4, "needed": _needed, "memory": memory, **given}
    )


@pytest.mark.parametrize(
    ("memory_bytes", "stage"),
    [(2000, 0), (1999, 1), (1250, 1), (1249, 2), (750, 2), (749, 3), (500, 3)],
)
def test_open_stage_is_the_smallest_that_fits_80_percent(memory_bytes: int, stage: int) -> None:
    assert _resolved({}, memory_bytes=memory_bytes).stage == stage


def test_stage_says_why() -> None:
    assert _resolved({"zero": {"stage": 2}}).stage_reason == "set"
    assert _resolved({}, memory_bytes=3 << 30).stage_reason == (
        "auto: 1.5e-06 GiB a rank fit in 2.40 of 3.00 GiB"
    )
    assert _resolved({}, memory_bytes=500).stage_reason.endswith("the first of 4 plans that does")


def test_open_stage_needs_the_memory() -> None:
    with pytest.raises(ConfigError, match=r"memory to plan for is unknown\. Set zero\.stage to 0"):
        _resolved({}, memory=None)
    resolved = _resolved({"zero": {"stage": 1}}, memory=None, needed=None)
    assert resolved.stage == 1
    assert resolved.offload.tiers == ("device", "device", "device", "device")


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ({}, (1, 4)),
        ({"dp_replicate": 2}, (2, 2)),
        ({"dp_replicate": 4}, (4, 1)),
        ({"dp_shard": 4}, (1, 4)),
    ],
)
def test_open_axis_takes_the_rest_of_the_world(mesh: dict[str, int], axes: tuple[int, int]) -> None:
    resolved = _resolved({"mesh": mesh})
    assert (resolved.dp_replicate, resolved.dp_shard) == axes


def test_another_world_than_asked_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"dp_replicate=3 does not divide the world of 4"):
        _resolved({"mesh": {"dp_replicate": 3}})
    with pytest.raises(ConfigError, match=r"asks for 6 processes.*has 4.*hf-speed launch -n 6"):
        _resolved({"mesh": {"dp_replicate": 2, "dp_shard": 3}})


@pytest.mark.parametrize(
    ("key", "value"), [("prefetch_units", 2), ("regather", False), ("generate", "streamed")]
)
def test_what_only_stage_3_reads_is_refused_elsewhere(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"zero\.{key}=.*stage 3 only, but zero\.stage=2"):
        _resolved({"zero": {"stage": 2, key: value}})
    assert getattr(_resolved({"zero": {"stage": 3, key: value}}), key) == value
    _resolved({"zero": {key: value}}, memory_bytes=4000)  # An open stage may become 3 elsewhere.


def test_loss_scale_is_for_fp16_only() -> None:
    tree = {"precision": {"loss_scale": {"window": 10}}}
    with pytest.raises(ConfigError, match="loss_scale is set, but the model computes in bfloat16"):
        _resolved(tree, compute_dtype=torch.bfloat16)
    scale = _resolved(tree, compute_dtype=torch.float16).loss_scale
    assert scale is not None
    assert scale.window == 10
    assert _resolved({}).loss_scale is None
    assert _resolved({}, param_dtype=torch.float16).loss_scale is not None


def test_dtypes() -> None:
    default = _resolved({}, compute_dtype=torch.bfloat16)
    assert default.master_dtype is torch.float32
    assert default.reduce_dtype is torch.bfloat16
    assert default.accumulate_dtype is torch.float32
    assert _resolved({}).reduce_dtype is None
    precision = {"master_dtype": "same", "reduce_dtype": "float16", "accumulate_dtype": "same"}
    changed = _resolved({"precision": precision}, compute_dtype=torch.bfloat16)
    assert changed.master_dtype is None
    assert changed.reduce_dtype is torch.float16
    assert changed.accumulate_dtype is None


def test_working_parameters_keep_their_own_dtype_where_asked() -> None:
    own = {"precision": {"working_dtype": "own", "loss_scale": {"window": 10}}}
    resolved = _resolved(own, compute_dtype=torch.float16)
    assert resolved.compute_dtype is None
    assert resolved.reduce_dtype is None
    # The loss is computed in fp16 all the same.
    assert resolved.loss_scale is not None
    assert _resolved({}, compute_dtype=torch.float16).compute_dtype is torch.float16


def test_the_rest_passes_through() -> None:
    resolved = _resolved(
        {
            "zero": {"units": ["Block"]},
            "checkpoint": {"max_shard_bytes": 4096, "asynchronous": True, "mirror": "s3://b/run"},
            "debug": {"journal": True, "timeout_s": 5, "stats": False},
        }
    )
    assert resolved.units == ("Block",)
    assert (resolved.max_shard_bytes, resolved.asynchronous) == (4096, True)
    assert resolved.mirror == "s3://b/run"
    assert (resolved.journal, resolved.timeout_s, resolved.stats) == (True, 5, False)


def test_table_has_one_aligned_row_a_choice() -> None:
    resolved = _resolved({"zero": {"stage": 3}}, compute_dtype=torch.float16)
    lines = resolved.table().splitlines()
    assert len(lines) == len(resolved.rows()) == 13
    assert any(line.startswith("zero.prefetch_units") for line in lines)
    assert any("65536, dynamic" in line for line in lines)
    column = lines[0].index("1")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert not any(line.startswith("zero.prefetch") for line in _resolved({}).table().splitlines())
