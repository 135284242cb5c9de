"""What is left open is chosen from world, dtypes and bytes; what cannot take effect is refused."""

from typing import Any

import pytest
import torch

from hf_speed.config import ResolvedConfig, load_config, resolve
from hf_speed.errors import ConfigError

STATES = (1600, 1000, 600, 400)


def _resolved(tree: dict[str, Any], **given: Any) -> ResolvedConfig:
    return resolve(
        load_config(tree),
        **{"world_size": 4, "state_bytes": STATES, "memory_bytes": 4000, **given},
    )


@pytest.mark.parametrize(
    ("memory_bytes", "stage"),
    [(2000, 0), (1999, 1), (1250, 1), (1249, 2), (750, 2), (749, 3), (1, 3)],
)
def test_open_stage_is_the_smallest_that_fits_80_percent(memory_bytes: int, stage: int) -> None:
    assert _resolved({}, memory_bytes=memory_bytes).stage == stage


def test_stage_says_why() -> None:
    assert _resolved({"zero": {"stage": 2}}).stage_reason == "set"
    assert "fit in 80% of" in _resolved({}).stage_reason
    assert "exceed 80% of" in _resolved({}, memory_bytes=1).stage_reason


def test_open_stage_needs_the_memory() -> None:
    with pytest.raises(ConfigError, match=r"memory to plan for is unknown\. Set zero\.stage to 0"):
        _resolved({}, memory_bytes=None)
    assert _resolved({"zero": {"stage": 1}}, memory_bytes=None, state_bytes=None).stage == 1


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


def test_the_rest_passes_through() -> None:
    resolved = _resolved(
        {
            "zero": {"units": ["Block"]},
            "checkpoint": {"max_shard_bytes": 4096},
            "debug": {"journal": True, "timeout_s": 5, "stats": False},
        }
    )
    assert resolved.units == ("Block",)
    assert resolved.max_shard_bytes == 4096
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
