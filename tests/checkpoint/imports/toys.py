"""Fixtures of foreign checkpoints, and small ones made here in the same layouts."""

import contextlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def expected(name: str) -> dict[str, Any]:
    """What the framework that wrote a fixture said of it."""
    return json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))


class FragmentAddress:
    """As DeepSpeed pickles where a parameter's part lies."""

    def __init__(self, start: int, numel: int) -> None:
        self.numel = numel
        self.start = start


class DynamicLossScaler:
    """As DeepSpeed pickles its loss scaler."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


_NAMES = {
    FragmentAddress: ("deepspeed.utils.tensor_fragment", "fragment_address"),
    DynamicLossScaler: ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
}


@contextlib.contextmanager
def deepspeed_names() -> Iterator[None]:
    """Let the classes above be pickled under DeepSpeed's names, whether it is installed or not."""
    paths = {module: module.split(".") for module, _ in _NAMES.values()}
    packages = {".".join(path[: n + 1]) for path in paths.values() for n in range(len(path))}
    before = {name: sys.modules.get(name) for name in packages}
    sys.modules.update({name: types.ModuleType(name) for name in packages})
    for kind, (module, name) in _NAMES.items():
        setattr(sys.modules[module], name, kind)
        kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    try:
        yield
    finally:
        for name, found in before.items():
            del sys.modules[name]
            if found is not None:
                sys.modules[name] = found


def zero2_trees(
    weights: dict[str, Tensor], ranks: int = 2, **more: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(model states, optimizer states by rank) of ZeRO stage 2: one group, moments 2x and 3x."""
    flat = torch.cat([value.reshape(-1) for value in weights.values()])
    share = -(-flat.numel() // ranks)
    flat = torch.cat([flat, torch.zeros(share * ranks - flat.numel())])
    model = {
        "module": dict(weights),
        "buffer_names": [],
        "param_shapes": [{name: value.shape for name, value in weights.items()}],
        "shared_params": {},
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "lr_scheduler": None,
        "global_steps": 4,
        "dp_world_size": ranks,
        "ds_config": {},
        "ds_version": "0.0.toy",
    }
    optims = []
    for rank in range(ranks):
        mine = flat[rank * share : (rank + 1) * share].clone()
        addresses, begin = {}, 0
        for name, value in weights.items():
            first, last = max(begin, rank * share), min(begin + value.numel(), (rank + 1) * share)
            if first < last:
                addresses[name] = FragmentAddress(first - rank * share, last - first)
            begin += value.numel()
        state = {
            "loss_scaler": None,
            "zero_stage": 2,
            "partition_count": [ranks],
            "single_partition_of_fp32_groups": [mine],
            "param_slice_mappings": [addresses],
            "base_optimizer_state": {
                "state": {0: {"step": 4, "exp_avg": mine * 2, "exp_avg_sq": mine * 3}},
                "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0]}],
            },
        }
        optims.append({"optimizer_state_dict": state | more, "ds_config": {}})
    return model, optims


def write_zero2(root: Path, model: dict[str, Any], optims: list[dict[str, Any]]) -> Path:
    """Write the files of a save, with the tag; returns the directory of the save."""
    save = root / "global_step4"
    save.mkdir(parents=True)
    (root / "latest").write_text(save.name)
    with deepspeed_names():
        torch.save(model, save / "mp_rank_00_model_states.pt")
        for rank, tree in enumerate(optims):
            torch.save(tree, save / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return save


def toy_weights() -> dict[str, Tensor]:
    """Uneven over two ranks; one crosses their border."""
    generator = torch.Generator().manual_seed(3)
    return {
        "first.weight": torch.randn(5, 3, generator=generator),
        "middle.weight": torch.randn(4, 4, generator=generator),
        "last.bias": torch.randn(6, generator=generator),
    }
