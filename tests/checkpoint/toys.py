"""A small whole checkpoint, made in milliseconds by one process: weights, states, RNG, configs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_speed.checkpoint import (
    LocalState,
    ModelPlan,
    PlannedFile,
    TensorGroup,
    TensorSpec,
    write_model,
    write_states,
)
from hf_speed.checkpoint.digest import digest_of
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.strict_json import load_json
from hf_speed.checkpoint.written import WrittenFiles
from hf_speed.mesh.axes import IDENTITY

WEIGHTS = {
    "embed": torch.arange(24.0).view(6, 4),
    "head": torch.arange(8.0).view(2, 4).to(torch.bfloat16),
}
STATES = {
    ("embed", "exp_avg"): torch.arange(24.0) / 7,
    ("head", "master"): torch.arange(8.0) / 3,
    ("head", "exp_avg"): torch.arange(8.0) / 5,
}
STATE_FILE = "hf_speed/state-001-rank00000-00000.safetensors"
LOCAL_FILE = "hf_speed/local-001-rank00000.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
META = {
    "stage": 2,
    "mesh": {"dp_shard": 1},
    "optimizer": "AdamW",
    "param_groups": [{"lr": 0.1, "betas": [0.9, 0.99]}],
    "parameters": {"embed": [6, 4], "head": [2, 4]},
}


def make_checkpoint(directory: Path, *, knows: bool = True) -> None:
    """Write it; `knows`: by the checksums that the model's writer noted."""
    specs = [TensorSpec(name, tuple(v.shape), v.dtype) for name, v in WEIGHTS.items()]
    files = tuple(PlannedFile(name, (spec,)) for name, spec in zip(SHARDS, specs, strict=True))
    groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in WEIGHTS)
    plan = ModelPlan(files, groups, dict, {}, 32)
    written = WrittenFiles() if knows else None
    write_model(directory, plan, WEIGHTS.items(), world=IDENTITY, extras=_config, written=written)
    states = [
        LocalState(name, kind, tuple(WEIGHTS[name].shape), 0, value.numel(), value)
        for (name, kind), value in STATES.items()
    ]
    write_states(
        directory,
        states,
        META,
        world=IDENTITY,
        scalars={name: {"step": 5.0} for name in WEIGHTS},
        local={"cpu_rng": torch.arange(16, dtype=torch.uint8)},
        written=written,
    )


def _config(staging: Path) -> None:
    (staging / "config.json").write_text('{"hidden_size": 4}')


def flip(path: Path, at: int) -> None:
    """Flip one bit of a byte; negative `at` counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def resigned(body: dict[str, Any]) -> str:
    """The text of a manifest with the checksum that it should have."""
    unsigned = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(unsigned).removesuffix("}")
    return f'{text}, "digest": "{digest_of(text.encode())}"}}\n'


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as one who knows how would."""
    path = directory / MANIFEST_PATH
    body = load_json(path.read_text(), str(path))
    edit(body)
    path.write_text(resigned(body))
