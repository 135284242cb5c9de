"""The public names and config keys, as a snapshot: changing them changes this file, knowingly."""

import json

import pytest

import hf_speed
from hf_speed.config import SpeedConfig

NAMES = [
    "Accelerator",
    "SpeedConfig",
    "Trainer",
    "TrainingArguments",
    "disable",
    "enable",
    "engine_of",
    "export",
    "from_config",
    "from_pretrained",
    "gathered",
    "get_full_grad",
    "get_full_optimizer_state",
    "get_full_parameter",
    "import_checkpoint",
    "integrate_args",
    "integrate_trainer",
    "offload_states",
    "reload_states",
    "set_full_grad",
    "set_full_optimizer_state",
    "set_full_parameter",
]

CONFIG = """
{"mesh": {"pp": 1, "tp": 1, "dp_replicate": 1, "dp_shard": null},
 "pipe": {"schedule": null, "microbatches": null, "chunks": null, "balance": "parameters",
          "gather": "step"},
 "tensor": {"sequence_parallel": false},
 "zero": {"stage": null, "units": "auto", "prefetch_units": 1, "regather": true,
          "generate": "gathered"},
 "precision": {"working_dtype": "compute", "master_dtype": "float32", "reduce_dtype": null,
               "accumulate_dtype": "float32",
               "loss_scale": {"initial": 65536.0, "window": 1000, "hysteresis": 2, "floor": 1.0}},
 "offload": {"optimizer": null, "gradients": null, "parameters": null, "activations": null,
             "paths": [], "staging_bytes": 268435456, "host_bytes": null, "update": null,
             "moments": "float32", "step": "after", "cpu_share": 1.0,
             "activation_min_bytes": 1048576},
 "checkpoint": {"max_shard_bytes": 5368709120, "asynchronous": false, "mirror": null},
 "debug": {"journal": false, "timeout_s": 600.0, "stats": true}}
"""


def test_public_names_are_these() -> None:
    assert hf_speed.__all__ == NAMES
    assert set(NAMES) <= set(dir(hf_speed))


@pytest.mark.parametrize("name", NAMES)
def test_public_name_loads_and_is_documented(name: str) -> None:
    assert getattr(hf_speed, name).__doc__


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_speed' has no attribute 'Trainr'"):
        _ = hf_speed.Trainr  # pyrefly: ignore


def test_config_keys_and_defaults_are_these() -> None:
    assert SpeedConfig().to_dict() == json.loads(CONFIG)
