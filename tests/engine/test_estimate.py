"""The bytes that are planned for are those that there then are, on every tier."""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_speed.config import Tiers, load_config
from hf_speed.config.planner import LADDER, ON_DEVICE
from hf_speed.engine import Engine
from hf_speed.engine.estimate import Estimator, GroupSize
from hf_speed.engine.planning import sizes_of
from hf_speed.engine.state import local_states
from tests.engine.toys import global_batch, ranks_here, share, toy_model
from tests.support import run_ranks

NUMEL = 384 * 256
"""Divided by everything: no padding."""


def _mixed(numel: int = NUMEL, *, accumulate: int = 4) -> GroupSize:
    return GroupSize((numel,), 2, 4, 2, accumulate, trained=True)


def _estimator(
    units: list[list[GroupSize]], tree: dict[str, Any] | None = None, *, world_size: int = 4
) -> Estimator:
    return Estimator(units, load_config(tree), world_size=world_size)


def test_states_are_the_papers_but_for_the_parts_that_are_cast() -> None:
    units = [[_mixed(600 * 64)], [_mixed(400 * 64)]]
    states = [_estimator(units).at(stage) for stage in range(4)]
    kept = [(s.parameters / 64, s.gradients / 64, s.optimizer / 64) for s in states]
    assert kept == [
        (2000, 4000, 12_000),
        (2000, 1000, 3000),
        (2000, 1000, 3000),
        (0, 1000, 3000),
    ]


def test_accumulation_keeps_whole_gradients_below_stage_2() -> None:
    estimator = _estimator([[_mixed()], [_mixed()]])
    for stage, more in enumerate((8 * NUMEL, 8 * NUMEL, 0, 0)):
        once, often = estimator.at(stage), estimator.at(stage, accumulates=True)
        assert often.total - once.total == more
        assert estimator.needed(stage, ON_DEVICE) == often.by_tier


def test_float32_has_no_copy_and_the_parameter_is_the_master() -> None:
    plain = GroupSize((NUMEL,), 4, 4, 4, 4, trained=True)
    states = [_estimator([[plain], [plain]]).at(stage) for stage in (0, 3)]
    assert [s.parameters for s in states] == [8 * NUMEL, 2 * NUMEL]
    assert [s.optimizer for s in states] == [16 * NUMEL, 4 * NUMEL]
    moved = _estimator([[plain], [plain]]).at(3, Tiers("disk", "device", "host"))
    assert moved.by_tier.disk == 4 * NUMEL
    assert moved.by_tier.host == 2 * NUMEL + moved.staging


def test_frozen_parameters_have_nothing_but_themselves() -> None:
    frozen = GroupSize((NUMEL,), 2, 2, 2, 2, trained=False)
    states = _estimator([[frozen], [_mixed()]]).at(3)
    assert states.parameters == 2 * NUMEL // 4
    assert states.gradients == 4 * NUMEL // 4
    assert _estimator([[frozen], [frozen]]).at(0).total == 4 * NUMEL


def test_parts_that_leave_the_device_are_kept_in_the_dtype_that_computes() -> None:
    estimator = _estimator([[_mixed()], [_mixed()]])
    assert estimator.at(3).parameters == 0
    for tiers in LADDER[1:]:
        assert estimator.at(3, tiers).parameters == 2 * 2 * NUMEL // 4


@pytest.mark.parametrize(
    ("moments", "num_bytes"), [("float32", 8.0), ("bfloat16", 4.0), ("int8", 2 + 8 / 256)]
)
def test_moments(moments: str, num_bytes: float) -> None:
    estimator = _estimator([[_mixed()], [_mixed()]], {"offload": {"moments": moments}})
    assert estimator.at(1).optimizer == (4 + num_bytes) * 2 * NUMEL / 4


def test_every_byte_is_on_one_tier() -> None:
    units = [[_mixed()], [_mixed()], [_mixed(32_000)]]
    estimator = _estimator(units)
    for tiers in LADDER:
        for stage in range(4):
            state = estimator.at(stage, tiers)
            kept = state.parameters + state.gradients + state.optimizer
            assert sum(state.by_tier) == kept + state.in_flight + state.staging == state.total
            assert (state.staging > 0) == (tiers.optimizer != "device")
            assert (state.by_tier.disk > 0) == ("disk" in tiers)
    assert estimator.at(2, Tiers("device", "device", "host")).in_flight > estimator.at(2).in_flight


@pytest.mark.parametrize(
    ("tiers", "on_device", "on_host"),
    [
        (ON_DEVICE, 0, 0),
        (Tiers("host", "device", "device"), 0, 1),
        (Tiers("disk", "host", "device"), 0, 2),
        (Tiers("device", "host", "device"), 1, 0),
        (Tiers("device", "disk", "device"), 1, 1),
    ],
)
def test_staging_stands_where_a_gpus_chunks_pass(
    tiers: Tiers, on_device: int, on_host: int
) -> None:
    mib = 1 << 20
    little, much = (
        _estimator([[_mixed()]], {"offload": {"staging_bytes": n * mib}}).at(2, tiers)
        for n in (16, 17)
    )
    assert much.in_flight - little.in_flight == on_device * mib
    assert much.staging - little.staging == on_host * mib
    config = load_config({"offload": {"optimizer": "host", "cpu_share": 0.5}})
    alone = load_config({"offload": {"optimizer": "host"}})
    host = Tiers("host", "device", "device")
    both, one = (Estimator([[_mixed()]], c, world_size=4).at(2, host) for c in (config, alone))
    assert both.in_flight - one.in_flight == 256 * mib


def test_gradients_that_torch_reads_wider_are_copied_for_the_step() -> None:
    units = [[_mixed(accumulate=2)], [_mixed(accumulate=2)]]
    fused = _estimator(units, {"offload": {"update": "fused"}})
    torch_reads = _estimator(units)
    assert torch_reads.at(2).in_flight - fused.at(2).in_flight == 4 * 2 * NUMEL // 4


class Case(NamedTuple):
    """A training whose bytes are counted."""

    stage: int
    dtype: torch.dtype | None
    num_backwards: int = 1
    sections: Mapping[str, Any] = {}


CASES = [
    *(Case(*each) for each in product(range(4), (None, torch.bfloat16), (1, 2))),
    *(Case(3, torch.bfloat16, 1, {"zero": {"prefetch_units": n}}) for n in (0, 3)),
    *(Case(3, dtype, 1, {"zero": {"regather": False}}) for dtype in (None, torch.bfloat16)),
    Case(3, torch.bfloat16, 1, {"precision": {"reduce_dtype": "float32"}}),
    Case(2, torch.bfloat16, 1, {"precision": {"accumulate_dtype": "same"}}),
]


def _model() -> nn.Module:
    return toy_model("llama", num_layers=6, hidden_size=64, intermediate_size=96)


class Bytes(NamedTuple):
    """What there is, and what was estimated: in memory, and for a save behind the training."""

    alive: int
    estimated: int
    saved: int
    saved_estimated: int


def _count(case: Case) -> Bytes:
    """Bytes of what an engine holds at the end of its second backward, and the estimates."""
    model = _model()
    tree = {section: dict(values) for section, values in case.sections.items()}
    tree.setdefault("zero", {})["stage"] = case.stage
    config = load_config(tree)
    engine = Engine.attach(model, config, compute_dtype=case.dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    for step in range(2):
        for backward in range(case.num_backwards):
            engine.sync_gradients = backward == case.num_backwards - 1
            engine.backward(model(**share(global_batch("llama", step))).loss)
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    engine._parts.stepper.make_ready()  # As far as the update itself.
    estimator = Estimator(
        sizes_of(_model(), config, compute_dtype=case.dtype), config, world_size=ranks_here()
    )
    estimate = estimator.at(case.stage, accumulates=case.num_backwards > 1)
    # All is one file of the model, the first rank's.
    num_elements = sum(value.numel() for value in _model().parameters())
    files = num_elements * (case.dtype or torch.float32).itemsize
    states = sum(each.value.nbytes for each in local_states(engine.parts, optimizer))
    return Bytes(
        bytes_alive(engine, optimizer),
        estimate.total,
        states + files,
        estimator.copied_by_save(case.stage, num_elements=num_elements),
    )


def bytes_alive(engine: Engine, optimizer: torch.optim.Optimizer) -> int:
    """Storages of parameters, gradients, optimizer state and the pool, each counted once."""
    parts = engine._parts
    tensors: list[Tensor | None] = [t for free in parts.pool._free.values() for t in free]
    for group in parts.groups:
        tensors += [group.full, group.master, group.grad]
        for piece in group.pieces:
            state = optimizer.state[piece].values()
            tensors += [piece.grad, *(each for each in state if each.numel() > 1)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _all_cases() -> list[Bytes]:
    return [_count(case) for case in CASES]


@pytest.mark.parametrize("world_size", [1, 2])
def test_device_tier_holds_what_was_estimated(world_size: int) -> None:
    ranks = run_ranks(_all_cases, world_size)
    for found in ranks:
        for case, each in zip(CASES, found, strict=True):
            assert each.alive == each.estimated, case
    for case, each in zip(CASES, ranks[0], strict=True):
        assert each.saved <= each.saved_estimated <= 1.001 * each.saved, case


def test_a_save_behind_copies_its_states_and_its_files() -> None:
    """Of 64,000 elements on 4 ranks: a quarter's 12 bytes and files of 2, or 8 and files of 4."""
    units = [[_mixed(600 * 64)], [_mixed(400 * 64)]]
    for limit, a_sixty_fourth in (
        (1 << 30, 2000 + 4000),  # One file, of all; of float32, for it may hold the masters.
        (1000 * 64, 3000 + 1000),  # One of two files; one of four would hold as much.
        (250 * 64, 3000 + 2 * 250),  # Two of eight.
    ):
        estimator = _estimator(units, {"checkpoint": {"max_shard_bytes": limit}})
        assert estimator.copied_by_save(3, num_elements=1000 * 64) == a_sixty_fourth * 64
