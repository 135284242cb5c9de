"""A callback that counts, once, the bytes of training state alive on each rank before an update.

Storages are counted, each once and whole: what is reachable from the optimizer's state, from the
gradients and from the parameters, in this order. Whatever else is alive (a batch, buffers, the
library's own) is `other`, so that nothing can hide. What waits on a disk is asked of the engine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from census import live_storages, storages_of

COUNT_AT = 3
"""The step whose update is looked at: by the third, all optimizer state exists."""


def _parameters(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    groups = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [*model.parameters(), *groups]


def _gradients(model: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None] + _gradients_between(model)


def count(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Give the bytes alive per kind, on this rank."""
    parameters = _parameters(model, optimizer)
    state = chain.from_iterable(values.values() for values in optimizer.state.values())
    kinds: list[tuple[str, Iterable[Tensor]]] = [
        ("optimizer state", (x for x in state if isinstance(x, Tensor))),
        ("gradients", _gradients(model, parameters)),
        ("parameters", parameters),
    ]
    everything = live_storages(model)
    counted: dict[str, int] = {}
    for kind, tensors in kinds:
        found = {at: everything.pop(at, 0) for at in storages_of(tensors)}
        counted[kind] = sum(found.values())
    counted["other"] = sum(everything.values())
    engine = _engine_of(model)
    counted["disk"] = 0 if engine is None else engine.stats().peak_bytes.get("disk", 0)
    return counted


def _engine_of(model: nn.Module) -> Any:
    """Give the engine, if there is one; plain PyTorch needs no hf_speed to say so."""
    if "hf_speed" not in sys.modules:
        return None
    from hf_speed import engine_of

    return engine_of(model)


def _gradients_between(model: nn.Module) -> list[Tensor]:
    """Give the reduced gradients that wait for the step in memory, where parameters show none."""
    engine = _engine_of(model)
    if engine is None:
        return []
    cells = [group.gradient_cell for group in engine.parts.groups]
    views = [cell.view() for cell in cells if cell is not None]
    waiting = [group.grad for group in engine.parts.groups]
    return [each for each in (*views, *waiting) if each is not None]


class BytesAlive(TrainerCallback):
    """Write `count` of every rank to a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count when the gradients of step COUNT_AT are complete."""
        if state.global_step + 1 != COUNT_AT:
            return
        optimizer = kwargs["optimizer"]
        mine = count(kwargs["model"], getattr(optimizer, "optimizer", optimizer))
        ranks: list[Any] = [mine]
        if torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        if state.is_world_process_zero:
            self.path.write_text(json.dumps(ranks, indent=1))
