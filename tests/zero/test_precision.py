"""Dtypes of parameters and the loss scale: pure."""

import pytest
import torch
from torch import nn

from hf_speed.config import LossScaleConfig
from hf_speed.zero.precision import LossScaler, PrecisionPlan, fp32_module_names, precision_table
from hf_speed.zero.spec import Dtypes
from tests.engine.toys import toy_model

FP32, BF16 = torch.float32, torch.bfloat16


def _plan(compute: torch.dtype | None, **changes: object) -> PrecisionPlan:
    plan = PrecisionPlan(compute=compute, master=FP32, wire=None, accumulate=FP32)
    return plan._replace(**changes)


def _parameter(dtype: torch.dtype, *, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=trained)


@pytest.mark.parametrize(
    ("plan", "parameter", "expected"),
    [
        (_plan(BF16), _parameter(FP32), Dtypes(BF16, FP32, BF16, FP32)),
        (_plan(None), _parameter(FP32), Dtypes(FP32, FP32, FP32, FP32)),
        (_plan(None), _parameter(BF16), Dtypes(BF16, FP32, BF16, FP32)),
        (_plan(BF16, wire=FP32), _parameter(FP32), Dtypes(BF16, FP32, FP32, FP32)),
        (_plan(None, wire=BF16), _parameter(FP32), Dtypes(FP32, FP32, BF16, FP32)),
        (_plan(BF16, master=None), _parameter(FP32), Dtypes(BF16, BF16, BF16, BF16)),
        (_plan(BF16, accumulate=None), _parameter(FP32), Dtypes(BF16, FP32, BF16, BF16)),
        (_plan(BF16), _parameter(FP32, trained=False), Dtypes(BF16, BF16, BF16, BF16)),
        (
            _plan(BF16, keep_fp32=frozenset({"norm"})),
            _parameter(FP32),
            Dtypes(FP32, FP32, FP32, FP32),
        ),
    ],
)
def test_dtypes_follow_the_plan(
    plan: PrecisionPlan, parameter: nn.Parameter, expected: Dtypes
) -> None:
    assert plan.dtypes_of("layers.0.norm.weight", parameter) == expected


def test_kept_names_match_whole_parts_only() -> None:
    plan = _plan(BF16, keep_fp32=frozenset({"wo"}))
    assert plan.dtypes_of("block.wo.weight", _parameter(FP32)).compute == FP32
    assert plan.dtypes_of("block.two.weight", _parameter(FP32)).compute == BF16


def test_t5_keeps_what_its_class_lists() -> None:
    assert "wo" in fp32_module_names(toy_model("t5"))
    assert fp32_module_names(nn.Linear(2, 2)) == frozenset()


def test_the_table_has_a_line_for_each_combination() -> None:
    wide, narrow = Dtypes(FP32, FP32, FP32, FP32), Dtypes(BF16, FP32, BF16, FP32)
    rows = [("a", 1000, narrow, True), ("b", 2000, narrow, True), ("c", 5, wide, False)]
    _, first, second = precision_table(rows).splitlines()
    assert first.split() == ["3,000", "bfloat16", "float32", "bfloat16", "float32", "yes"]
    assert second.split() == ["5", "float32", "-", "-", "-", "no"]


def _scales(config: LossScaleConfig, overflows: str) -> list[float]:
    scaler = LossScaler(config)
    scales = []
    for each in overflows:
        scaler.update(overflowed=each == "x")
        scales.append(scaler.scale)
    return scales


def test_scale_doubles_after_a_window_of_good_steps() -> None:
    config = LossScaleConfig(initial=8.0, window=3)
    assert _scales(config, ".....x...") == [8, 8, 16, 16, 16, 16, 16, 16, 32]


def test_scale_halves_once_hysteresis_is_used_up_and_a_window_restores_it() -> None:
    config = LossScaleConfig(initial=64.0, window=2, hysteresis=3)
    assert _scales(config, "xxxx..xx") == [64, 64, 32, 16, 16, 32, 32, 32]


def test_scale_never_falls_below_the_floor() -> None:
    config = LossScaleConfig(initial=8.0, hysteresis=1, floor=2.0)
    assert _scales(config, "xxxx") == [4, 2, 2, 2]


def test_a_loaded_scaler_goes_on_where_the_saved_one_was() -> None:
    config = LossScaleConfig(initial=64.0, window=3, hysteresis=2)
    saved, loaded = LossScaler(config), LossScaler(config)
    for each in "x..":
        saved.update(overflowed=each == "x")
    loaded.load(saved.state())
    for each in ".xxx...":
        saved.update(overflowed=each == "x")
        loaded.update(overflowed=each == "x")
        assert saved.state() == loaded.state()
