"""The systems that benches compare: plain PyTorch, DDP, FSDP2, DeepSpeed ZeRO-1/2/3, and ours.

Each builder takes the same freshly built model and gives a `System`: `backward(ids)` runs forward
and backward, `update()` steps and clears the gradients. All use `torch.optim.AdamW(fused=True)`
with the same settings; each system's own knobs stay at their defaults. In bfloat16, plain PyTorch
and DDP run under autocast (their way of keeping fp32 masters), FSDP2 with MixedPrecisionPolicy,
DeepSpeed with its bf16 section.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from workload import LEARNING_RATE, Shape, build_model


class Offload(NamedTuple):
    """Where a system keeps what it does not compute with.

    `tier`: cpu or nvme for DeepSpeed, host or disk for us; `path`: a directory for the last ones.
    """

    tier: str
    path: str


class System(NamedTuple):
    """One way to train the model."""

    model: nn.Module
    backward: Callable[[Tensor], Tensor]
    """(batch, length) ids -> the loss, 0-d."""
    update: Callable[[], None]
    """Step the optimizer and clear the gradients."""
    optimizer: Optimizer | None = None
    """Where it is the user's own object, as the model is."""


def _adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def _torch_system(model: nn.Module, optimizer: Optimizer, device: str, autocast: str) -> System:
    def backward(ids: Tensor) -> Tensor:
        with _autocast(device, autocast):
            loss = _loss(model, ids)
        loss.backward()
        return loss.detach()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return System(model, backward, update, optimizer)


def plain(shape: Shape, dtype: str, device: str) -> System:
    """One process, no wrapper: the model, autograd and the optimizer."""
    model = build_model(shape, device)
    return _torch_system(model, _adamw(model), device, dtype)


def ddp(shape: Shape, dtype: str, device: str) -> System:
    """DistributedDataParallel as it comes, with gradients as views of its buckets."""
    from torch.nn.parallel import DistributedDataParallel

    model = build_model(shape, device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _torch_system(wrapped, _adamw(wrapped), device, dtype)


def fsdp2(shape: Shape, dtype: str, device: str) -> System:
    """`fully_shard` on each block and on the root, gathered again in the backward: ZeRO-3."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = build_model(shape, device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return _torch_system(model, _adamw(model), device, "float32")


def deepspeed(
    shape: Shape,
    dtype: str,
    device: str,
    *,
    stage: int,
    small_bucket: bool = False,
    offload: Offload | None = None,
) -> System:
    """`deepspeed.initialize` with a ZeRO stage, all else left at its defaults.

    `small_bucket`: the default bucket of 5e8 elements is allocated whole and would hide the state
    of a small model; take the size that transformers' own DeepSpeed integration chooses ("auto").
    `offload`: parameters and optimizer state live there, updated by its own DeepSpeedCPUAdam.
    """
    import deepspeed as package

    zero: dict[str, object] = {"stage": stage}
    if offload is not None:
        target: dict[str, object] = {"device": offload.tier}
        if offload.tier == "nvme":
            target["nvme_path"] = offload.path
        zero["offload_optimizer"] = dict(target)
        zero["offload_param"] = {**target, "buffer_size": 2 * shape.vocab * shape.hidden}
    if small_bucket:
        zero["reduce_bucket_size"] = shape.hidden**2
    config = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    package.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")
    model = build_model(shape, device)
    optimizer: Optimizer = _adamw(model)
    if offload is not None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = package.initialize(model=model, optimizer=optimizer, config=config)

    def backward(ids: Tensor) -> Tensor:
        loss = _loss(engine, ids)
        engine.backward(loss)
        return loss.detach()

    return System(engine, backward, engine.step)


def ours(
    shape: Shape,
    dtype: str,
    device: str,
    *,
    stage: int,
    accumulate_same: bool = False,
    offload: Offload | None = None,
    checkpoint: dict[str, object] | None = None,
) -> System:
    """hf_speed at a ZeRO stage, defaults otherwise; `checkpoint` is that part of its config."""
    from hf_speed.config import load_config
    from hf_speed.engine import Engine

    config: dict[str, dict[str, object]] = {"zero": {"stage": stage}}
    if checkpoint is not None:
        config["checkpoint"] = checkpoint
    if accumulate_same:
        config["precision"] = {"accumulate_dtype": "same"}
    if offload is not None:
        kinds = ("optimizer", "gradients", "parameters")
        tiers: dict[str, object] = dict.fromkeys(kinds, offload.tier)
        if offload.tier == "disk":
            tiers["paths"] = [offload.path]
        config["offload"] = tiers
    model = build_model(shape, device)
    compute = torch.bfloat16 if dtype == "bfloat16" else None
    optimizer = _adamw(model)
    engine = Engine.attach(model, load_config(config), compute_dtype=compute)
    engine.bind_optimizer(optimizer)

    def backward(ids: Tensor) -> Tensor:
        loss = _loss(model, ids)
        engine.backward(loss)
        return loss.detach()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return System(model, backward, update)


def build(name: str, shape: Shape, dtype: str, device: str) -> System:
    """Build a system by name: plain, ddp, fsdp2, deepspeed-K[-lean], ours-K[-same].

    Args:
        name: K is the ZeRO stage; `-same` accumulates gradients in the compute dtype, as the paper
            counts; `-lean` makes DeepSpeed's bucket small; `-offload-TIER:DIRECTORY` moves
            parameters, gradients and optimizer state to a tier.
        shape: the model and the batch.
        dtype: float32 or bfloat16.
        device: cpu or cuda.

    Raises:
        ValueError: no such system.
    """
    name, _, path = name.partition(":")
    kind, _, rest = name.partition("-")
    _, _, tier = rest.partition("-offload-")
    offload = Offload(tier, path) if tier else None
    if kind == "deepspeed":
        lean = rest.endswith("-lean")
        return deepspeed(
            shape, dtype, device, stage=int(rest[0]), small_bucket=lean, offload=offload
        )
    if kind == "ours":
        same = rest.endswith("-same")
        return ours(shape, dtype, device, stage=int(rest[0]), accumulate_same=same, offload=offload)
    simple = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2}
    if kind not in simple:
        raise ValueError(f"no system {name!r}; known: plain, ddp, fsdp2, deepspeed-K, ours-K.")
    return simple[kind](shape, dtype, device)
