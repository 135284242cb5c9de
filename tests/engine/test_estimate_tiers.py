"""The bytes that are planned for a tier are those that it then holds."""

import tempfile
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_speed.config import TierBytes, Tiers, load_config
from hf_speed.engine import Engine
from hf_speed.engine.estimate import Estimator
from hf_speed.engine.planning import sizes_of
from tests.engine.toys import global_batch, ranks_here, share, toy_model
from tests.support import run_ranks

MIB = 1 << 20
STAGING_BYTES = 16 * MIB


class Case(NamedTuple):
    """A training whose bytes are counted, and settings of its offload section."""

    stage: int
    dtype: torch.dtype | None
    tiers: Tiers
    offload: tuple[tuple[str, Any], ...] = ()
    num_backwards: int = 1


PLACES = [
    Tiers("host", "device", "device"),
    Tiers("disk", "host", "device"),
    Tiers("host", "disk", "disk"),
    Tiers("disk", "disk", "disk"),
    Tiers("device", "disk", "host"),
]
CASES = [
    *(Case(*each) for each in product((0, 2, 3), (None, torch.bfloat16), PLACES)),
    Case(3, torch.bfloat16, PLACES[3], (("moments", "bfloat16"),)),
    Case(3, torch.bfloat16, PLACES[3], (("moments", "int8"),)),
    Case(2, torch.bfloat16, PLACES[1], (("step", "speculative"),)),
    Case(3, torch.bfloat16, PLACES[3], (("step", "speculative"),)),
    Case(0, None, PLACES[1], (("step", "delayed"),)),
    Case(3, torch.bfloat16, PLACES[3], (("step", "delayed"),)),
    *(Case(stage, torch.bfloat16, PLACES[3], (), 2) for stage in (0, 3)),
    Case(0, None, PLACES[1], (), 2),
]


def _model() -> nn.Module:
    return toy_model("llama", num_layers=9, hidden_size=128, intermediate_size=192)


def _held_and_estimated(case: Case) -> tuple[TierBytes, TierBytes]:
    """What three steps have held at most on each tier, and the estimate."""
    with tempfile.TemporaryDirectory() as path:
        offload = {**case.tiers._asdict(), "update": "fused", **dict(case.offload)}
        offload["staging_bytes"] = STAGING_BYTES
        if "disk" in case.tiers:
            offload["paths"] = [path]
        config = load_config({"zero": {"stage": case.stage}, "offload": offload})
        model = _model()
        engine = Engine.attach(model, config, compute_dtype=case.dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        engine.bind_optimizer(optimizer)
        for step in range(3):
            for backward in range(case.num_backwards):
                engine.sync_gradients = backward == case.num_backwards - 1
                engine.backward(model(**share(global_batch("llama", step))).loss)
            held = held_by(engine, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        estimator = Estimator(
            sizes_of(_model(), config, compute_dtype=case.dtype),
            config,
            world_size=ranks_here(),
            device_type="cpu",
        )
        accumulates = case.num_backwards > 1
        estimate = estimator.at(case.stage, case.tiers, accumulates=accumulates).by_tier
        engine.detach()
    return held, estimate


def held_by(engine: Engine, optimizer: torch.optim.Optimizer) -> TierBytes:
    """Bytes after a backward, the pool's free buffers among them: it keeps what it ever needed."""
    parts = engine.parts
    buffers: list[Tensor] = [t for free in parts.pool._free.values() for t in free]
    for group in parts.groups:
        buffers += group.device_buffers()
        buffers += [] if group.grad is None else [group.grad]
    if engine.config.offload.optimizer == "device":
        states = [v for state in optimizer.state.values() for v in state.values()]
        buffers += [each for each in states if isinstance(each, Tensor) and each.numel() > 1]
    storages = [buffer.untyped_storage() for buffer in buffers]
    device = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    peaks = {store.tier: store.peak_bytes for store in parts.tiers.stores}
    host = peaks.get("host", 0) + parts.tiers.staging_bytes
    return TierBytes(device, host, peaks.get("disk", 0))


def _all_cases() -> list[tuple[TierBytes, TierBytes]]:
    return [_held_and_estimated(case) for case in CASES]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_tier_holds_what_was_estimated(world_size: int) -> None:
    for found in run_ranks(_all_cases, world_size):
        wrong = []
        for case, (held, estimated) in zip(CASES, found, strict=True):
            if any(a != pytest.approx(b, rel=0.05) for a, b in zip(held, estimated, strict=True)):
                wrong.append((case, held, estimated))
        assert not wrong, "\n".join(map(str, wrong))
