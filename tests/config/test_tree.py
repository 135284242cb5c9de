"""Every value is checked where it is made; every message names path, value and what is legal."""

from collections.abc import Mapping
from typing import Any

import pytest

from hf_speed.config import (
    LossScaleConfig,
    MeshConfig,
    OffloadConfig,
    PipeConfig,
    SpeedConfig,
    ZeroConfig,
    load_config,
)
from hf_speed.errors import ConfigError


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"mesh": {"dp_replicate": 0}}, r"mesh\.dp_replicate=0 is out of range.*1 to 65536"),
        ({"mesh": {"dp_shard": 65537}}, r"mesh\.dp_shard=65537 is out of range.*1 to 65536"),
        ({"mesh": {"dp_shard": 2.0}}, r"mesh\.dp_shard=2\.0 is of type float.*whole number"),
        ({"mesh": {"pp": 0}}, r"mesh\.pp=0 is out of range: it goes from 1 to 65536"),
        ({"mesh": {"pp": "auto"}}, r"mesh\.pp='auto' is of type str.*whole number"),
        ({"mesh": {"tp": 65537}}, r"mesh\.tp=65537 is out of range: it goes from 1 to 65536"),
        ({"pipe": {"schedule": "zbv"}}, r"pipe\.schedule='zbv' is not a choice.*'zb_v', 'v_half'"),
        ({"pipe": {"microbatches": 0}}, r"pipe\.microbatches=0 is out of range.*1 to 65536"),
        ({"pipe": {"chunks": 65}}, r"pipe\.chunks=65 is out of range: it goes from 1 to 64"),
        ({"pipe": {"balance": "flops"}}, r"pipe\.balance='flops' is not.*'parameters', 'time'"),
        ({"pipe": {"balance": []}}, r"pipe\.balance=\[\] is of type list.*or a list of counts"),
        ({"pipe": {"balance": [2, 0]}}, r"pipe\.balance\[\]=0 is out of range: it goes from 1"),
        ({"pipe": {"balance": 3}}, r"pipe\.balance=3 is of type int.*or a list of counts"),
        ({"pipe": {"gather": "once"}}, r"pipe\.gather='once' is not a choice.*'microbatch'"),
        (
            {"tensor": {"sequence_parallel": 2}},
            r"tensor\.sequence_parallel=2 is of type int.*true or false",
        ),
        ({"zero": {"stage": 4}}, r"zero\.stage=4 is out of range: it goes from 0 to 3"),
        ({"zero": {"stage": -1}}, r"zero\.stage=-1 is out of range"),
        ({"zero": {"stage": True}}, r"zero\.stage=True is of type bool.*whole number from 0 to 3"),
        ({"zero": {"stage": "3"}}, r"zero\.stage='3' is of type str.*without quotes"),
        ({"zero": {"stage": "three"}}, r"zero\.stage='three' is of type str.*0 to 3\.$"),
        (
            {"zero": {"units": "LlamaMLP"}},
            r"zero\.units='LlamaMLP' is of type str.*'auto' or a list",
        ),
        ({"zero": {"units": []}}, r"zero\.units=\[\] names no module class"),
        ({"zero": {"units": [1]}}, r"zero\.units=\[1\] is of type list"),
        ({"zero": {"units": ["A", "B", "A"]}}, r"zero\.units names A more than once"),
        ({"zero": {"prefetch_units": 9}}, r"zero\.prefetch_units=9 is out of range.*0 to 8"),
        ({"zero": {"regather": 1}}, r"zero\.regather=1 is of type int.*true or false"),
        ({"zero": {"generate": "whole"}}, r"zero\.generate='whole' is not.*'gathered', 'streamed'"),
        (
            {"precision": {"working_dtype": "bf16"}},
            r"precision\.working_dtype='bf16'.*'compute', 'own'",
        ),
        (
            {"precision": {"master_dtype": "fp32"}},
            r"precision\.master_dtype='fp32'.*'float32', 'same'",
        ),
        (
            {"precision": {"reduce_dtype": "int8"}},
            r"precision\.reduce_dtype='int8' is not a choice",
        ),
        ({"precision": {"accumulate_dtype": 1}}, r"precision\.accumulate_dtype=1 is not a choice"),
        (
            {"precision": {"loss_scale": {"initial": 0.5}}},
            r"loss_scale\.initial=0\.5 is out of range",
        ),
        (
            {"precision": {"loss_scale": {"initial": "1e6"}}},
            r"initial='1e6' is of type str.*1\.0e\+6",
        ),
        ({"precision": {"loss_scale": {"window": 0}}}, r"loss_scale\.window=0 is out of range"),
        ({"precision": {"loss_scale": {"hysteresis": 0}}}, r"hysteresis=0 is out of range"),
        ({"precision": {"loss_scale": {"floor": 1e6}}}, r"floor=1000000\.0 is out of range.*65536"),
        ({"precision": {"loss_scale": {"floor": float("nan")}}}, r"floor=nan is out of range"),
        (
            {"offload": {"optimizer": "cpu"}},
            r"offload\.optimizer='cpu' is not.*'device', 'host', 'disk'",
        ),
        ({"offload": {"gradients": "nvme"}}, r"offload\.gradients='nvme' is not a choice"),
        ({"offload": {"parameters": True}}, r"offload\.parameters=True is not a choice"),
        ({"offload": {"activations": 1}}, r"offload\.activations=1 is not a choice"),
        (
            {"offload": {"paths": "/fast"}},
            r"offload\.paths='/fast' is of type str.*a list of direct",
        ),
        ({"offload": {"paths": [""]}}, r"offload\.paths=\[''\] is of type list: it must be a list"),
        ({"offload": {"paths": ["a", "a"]}}, r"paths names a more than once.*a disk of its own"),
        ({"offload": {"staging_bytes": 1}}, r"staging_bytes=1 is out of range.*16777216 to"),
        ({"offload": {"host_bytes": 0}}, r"host_bytes=0 is out of range: it goes from 1048576"),
        ({"offload": {"update": "cpu"}}, r"offload\.update='cpu' is not.*'torch', 'fused'"),
        ({"offload": {"moments": "fp8"}}, r"offload\.moments='fp8' is not.*'bfloat16', 'int8'"),
        ({"offload": {"step": "early"}}, r"offload\.step='early' is not.*'speculative', 'delayed'"),
        ({"offload": {"cpu_share": 1.5}}, r"offload\.cpu_share=1\.5 is out of range.*0 to 1"),
        ({"offload": {"activation_min_bytes": 1}}, r"activation_min_bytes=1 is out of range"),
        ({"checkpoint": {"max_shard_bytes": 1}}, r"max_shard_bytes=1 is out of range.*1024 to"),
        ({"checkpoint": {"asynchronous": 1}}, r"checkpoint\.asynchronous=1 is of type int"),
        ({"checkpoint": {"mirror": 1}}, r"checkpoint\.mirror=1 is of type int"),
        ({"checkpoint": {"mirror": "bucket/run"}}, r"mirror='bucket/run' is no address: write it"),
        ({"debug": {"journal": "yes"}}, r"debug\.journal='yes' is of type str.*true or false"),
        (
            {"debug": {"timeout_s": 0}},
            r"debug\.timeout_s=0 is out of range: it goes from 1 to 86400",
        ),
        ({"debug": {"stats": None}}, r"debug\.stats=None is of type NoneType"),
    ],
)
def test_wrong_value_names_path_value_and_range(tree: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tree)


def test_values_are_checked_without_a_file_too() -> None:
    with pytest.raises(ConfigError, match=r"zero\.stage=7 is out of range"):
        ZeroConfig(stage=7)
    with pytest.raises(
        ConfigError, match=r"zero=\{'stage': 1\} is of type dict: it must be a Zero"
    ):
        SpeedConfig(zero={"stage": 1})  # pyrefly: ignore
    with pytest.raises(ConfigError, match=r"precision\.loss_scale\.window=0"):
        LossScaleConfig(window=0)
    with pytest.raises(ConfigError, match=r"mesh\.tp=-1 is out of range"):
        MeshConfig(tp=-1)
    with pytest.raises(ConfigError, match=r"pipe='1f1b' is of type str: it must be a PipeConfig"):
        SpeedConfig(pipe="1f1b")  # pyrefly: ignore
    with pytest.raises(ConfigError, match=r"tensor=2 is of type int: it must be a TensorConfig"):
        SpeedConfig(tensor=2)  # pyrefly: ignore


def test_config_is_a_value() -> None:
    config = SpeedConfig(
        zero=ZeroConfig(stage=3, units=["Block"]),  # pyrefly: ignore
        offload=OffloadConfig(paths=["/fast"]),  # pyrefly: ignore
        pipe=PipeConfig(balance=[2, 3]),  # pyrefly: ignore
    )
    tree = {
        "zero": {"stage": 3, "units": ["Block"]},
        "offload": {"paths": ["/fast"]},
        "pipe": {"balance": [2, 3]},
    }
    assert config == load_config(tree)
    assert hash(config) == hash(load_config(config.to_dict()))
    with pytest.raises(AttributeError):
        config.zero = ZeroConfig()  # pyrefly: ignore
