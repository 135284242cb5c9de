"""Make the checkpoints of DeepSpeed and FSDP that the importers are tested with.

    python scripts/dev/make_foreign_checkpoints.py tests/checkpoint/imports/fixtures [NAME ...]

Needs the extra `bench` (DeepSpeed) and a CPU. Two ranks train a GPT-2 of 5 thousand parameters for
three steps, save, and go on for three more. Beside each checkpoint, `expected.json` has what the
framework itself says: the batches and losses of the steps after the save, and SHA-256 sums of whole
masters and moments as its own API gives them.

What DeepSpeed puts beside its checkpoints that is code (zero_to_fp32.py) is not kept.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

RANKS, BEFORE, AFTER, ROWS, TOKENS = 2, 3, 3, 2, 8
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "architectures": ["GPT2LMHeadModel"],
}
LEARNING_RATE = 1e-2
MOMENTS = ("exp_avg", "exp_avg_sq")


def build_model(*, frozen: tuple[str, ...] = (), **sizes: Any) -> Any:
    """The same weights everywhere; what has one of `frozen` in its name is not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(CONFIG | sizes)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model.train()


def batches() -> list[list[list[list[int]]]]:
    """Token numbers by step, rank, row and place."""
    generator = torch.Generator().manual_seed(7)
    shape = (BEFORE + AFTER, RANKS, ROWS, TOKENS)
    return torch.randint(3, CONFIG["vocab_size"], shape, generator=generator).tolist()


def groups(model: Any) -> list[dict[str, Any]]:
    """Two groups, as the Trainer makes them: matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def checksum(value: Any) -> str:
    """Of a whole tensor's bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def train(step: Callable[[torch.Tensor], torch.Tensor], first: int, last: int) -> list[float]:
    """Losses of steps [first, last), averaged over the ranks."""
    losses = []
    for number in range(first, last):
        loss = step(torch.tensor(batches()[number][dist.get_rank()])).detach().double()
        dist.all_reduce(loss)
        losses.append(loss.item() / RANKS)
    return losses


def write_expected(out: Path, losses: list[float], tensors: Any, **more: Any) -> None:
    """What a reader should find and compute."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__} | more.pop(
        "versions", {}
    )
    body = {
        "batches": batches()[BEFORE:],
        "losses": losses,
        "tensors": tensors,
        "versions": versions,
        "step": BEFORE,
        **more,
    }
    (out / "expected.json").write_text(json.dumps(body, indent=1) + "\n")


def deepspeed_run(
    out: Path, *, stage: int, dtype: str = "float32", frozen: tuple[str, ...] = (), **options: Any
) -> None:
    """Train with DeepSpeed and save."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = build_model(frozen=frozen)
    config = _deepspeed_config(stage, dtype, options)
    deepspeed.init_distributed(dist_backend="gloo")
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=scheduler
    )

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss

    train(step, 0, BEFORE)
    if stage < 3:
        # It links states to parameters after the first group's first step, when others have none.
        zero: Any = engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    tensors = {
        name: {
            "fp32": checksum(safe_get_full_fp32_param(parameter)),
            **{kind: checksum(safe_get_full_optimizer_state(parameter, kind)) for kind in MOMENTS},
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if options.get("round_robin_gradients"):
        # Its API mistakes one parameter for another then; losses are what tells.
        tensors = {name: {} for name in tensors}
    engine.save_checkpoint(str(out))
    losses = train(step, BEFORE, BEFORE + AFTER)
    if dist.get_rank() == 0:
        model.config.save_pretrained(out)
        write_expected(
            out,
            losses,
            tensors,
            dtype=dtype,
            frozen=[name for name, p in model.named_parameters() if not p.requires_grad],
            versions={"deepspeed": deepspeed.__version__},
        )


def _deepspeed_config(stage: int, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 64,
            "sub_group_size": 3000,
            "reduce_bucket_size": 4096,
            **options,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def _rate(step: int) -> float:
    return 1.0 / (1 + step)


def universal_run(out: Path, **options: Any) -> None:
    """Train with DeepSpeed, save, and convert to a universal checkpoint with its own tool."""
    source = out / "source"
    deepspeed_run(source, **options)
    dist.barrier()
    if dist.get_rank() == 0:
        save = f"global_step{BEFORE}"
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        folders = ["--input_folder", source / save, "--output_folder", out / f"{save}_universal"]
        more = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        subprocess.run([*command, *map(str, folders), *more], check=True)
        for name in ("config.json", "expected.json"):
            shutil.copyfile(source / name, out / name)
        shutil.rmtree(source)


def fsdp_run(out: Path, *, version: int, full: bool = False) -> None:
    """Train with FSDP and save with accelerate's functions, as the Trainer does."""
    from accelerate import PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard

    PartialState(cpu=True)  # Its log needs one.
    model = build_model(n_embd=8)  # Every tensor is an archive of its own, which adds up.
    wrapped: Any = model
    if version == 2:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        kinds = {type(model.transformer.h[0])}
        policy = functools.partial(
            torch.distributed.fsdp.wrap.transformer_auto_wrap_policy, transformer_layer_cls=kinds
        )
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = torch.optim.AdamW(groups(wrapped), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    train(step, 0, BEFORE)
    kind = StateDictType.FULL_STATE_DICT if full else StateDictType.SHARDED_STATE_DICT
    plugin = SimpleNamespace(
        fsdp_version=version, state_dict_type=kind, state_dict_config=None,
        optim_state_dict_config=None,
    )  # fmt: skip
    if version == 1 or full:
        _set_configs(plugin, full=full)
    host = SimpleNamespace(num_processes=RANKS, process_index=dist.get_rank())
    out.mkdir(parents=True, exist_ok=True)
    save_fsdp_model(plugin, host, wrapped, str(out))
    save_fsdp_optimizer(plugin, host, optimizer, wrapped, str(out))
    tensors = _whole_states(wrapped, optimizer, version)
    losses = train(step, BEFORE, BEFORE + AFTER)
    if dist.get_rank() == 0:
        torch.save({**scheduler.state_dict(), "last_epoch": BEFORE}, out / "scheduler.pt")
        model.config.save_pretrained(out)
        write_expected(out, losses, tensors, dtype="float32", frozen=[])


def _set_configs(plugin: Any, *, full: bool) -> None:
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
    )

    if full:
        plugin.state_dict_config = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
        plugin.optim_state_dict_config = FullOptimStateDictConfig(
            offload_to_cpu=True, rank0_only=True
        )
    else:
        plugin.state_dict_config = ShardedStateDictConfig()
        plugin.optim_state_dict_config = ShardedOptimStateDictConfig()


def _whole_states(model: Any, optimizer: Any, version: int) -> dict[str, dict[str, str]]:
    """By torch's own state dict functions."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=version == 2)
    weights = get_model_state_dict(model, options=options)
    # Empty on ranks other than the first where torch moves it to the host.
    states: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return {
        name: {
            "fp32": checksum(weights[name]),
            **{kind: checksum(values[kind]) for kind in MOMENTS},
        }
        for name, values in states.items()
    }


RUNS: dict[str, Callable[[Path], None]] = {
    "zero1_bf16": functools.partial(deepspeed_run, stage=1, dtype="bfloat16"),
    "zero2_fp32": functools.partial(deepspeed_run, stage=2),
    "zero2_round_robin": functools.partial(deepspeed_run, stage=2, round_robin_gradients=True),
    "zero3_bf16_frozen": functools.partial(
        deepspeed_run, stage=3, dtype="bfloat16", frozen=("wpe", "h.0.attn")
    ),
    "universal_zero2": functools.partial(universal_run, stage=2, frozen=("wpe",)),
    "universal_zero3": functools.partial(universal_run, stage=3, dtype="bfloat16"),
    "fsdp1": functools.partial(fsdp_run, version=1),
    "fsdp2": functools.partial(fsdp_run, version=2),
    "fsdp2_full": functools.partial(fsdp_run, version=2, full=True),
}


def _rank(rank: int, name: str, out: str, store: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
        ACCELERATE_USE_CPU="1",
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    RUNS[name](Path(out))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Make the named checkpoints, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []])
    arguments = parser.parse_args()
    for name in arguments.names or RUNS:
        out = arguments.out / name
        shutil.rmtree(out, ignore_errors=True)
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(
                _rank, args=(name, str(out), f"{directory}/store"), nprocs=RANKS
            )
        for path in [*out.rglob("*.py"), *out.rglob("README.md"), *out.rglob("tmp")]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"{name}: {size:,} bytes")


if __name__ == "__main__":
    main()
