"""Tiers around a GPU: bytes to the bit, copies beside the compute, pages locked and let go."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_speed.errors import OffloadError
from hf_speed.offload import (
    ActivationOffload,
    DeviceStore,
    DiskStore,
    HostStore,
    StagingPool,
    Store,
)
from hf_speed.offload.pinned import Pins
from hf_speed.ops.aio import aligned_empty
from tests.offload.test_activations import Block, _gradients
from tests.offload.tiers import Step, play

MIB = 1 << 20
TIERS = ("device", "host, pinned", "host", "disk")
gpu = pytest.mark.gpu


def _store(tier: str, path: Path) -> Store:
    if tier == "device":
        return DeviceStore(torch.device("cuda"))
    if tier == "disk":
        return DiskStore([path], staging=StagingPool(4 * 32768, num_buffers=4, pin=True))
    return HostStore(pin=tier == "host, pinned")


@gpu
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_store_is_a_dict_of_tensors(tier: str, place: str, tmp_path: Path) -> None:
    verbs = ("allocate", "fetch", "fetch", "commit", "commit", "free")
    for seed in range(10):
        rng = random.Random(seed)
        steps = [
            Step(rng.choice(verbs), rng.random(), rng.random(), rng.random(), rng.random() < 0.5)
            for _ in range(80)
        ]
        store = _store(tier, tmp_path)
        play(store, steps, torch.device(place))
        store.close()


@gpu
@pytest.mark.parametrize("tier", TIERS)
def test_transfers_keep_their_place_among_kernels(tier: str, tmp_path: Path) -> None:
    # Long kernels before and after each transfer: one that overtook them would move other numbers.
    store = _store(tier, tmp_path)
    store.allocate("row", 4 * MIB, torch.float32)
    matrix = torch.rand(3000, 3000, device="cuda")
    value = torch.zeros(4 * MIB, device="cuda")
    for index in range(5):
        for _ in range(4):
            matrix = (matrix @ matrix).clamp_(0, 1)
        value.add_(matrix[0, 0] * 0 + index)
        ticket = store.commit("row", value)
        out = torch.full((4 * MIB,), -1.0, device="cuda")
        fetched = store.fetch("row", out)
        ticket.wait()
        expected = sum(range(index + 1))
        fetched.wait()
        assert float((out - expected).abs().max()) == 0
    store.close()


@gpu
def test_a_view_waits_for_what_is_on_its_way() -> None:
    store = HostStore(pin=True)
    store.allocate("row", 16 * MIB, torch.float32)
    view = store.view("row")
    assert view.is_pinned()
    store.commit("row", torch.full((16 * MIB,), 2.0, device="cuda"))
    assert (store.view("row") == 2).all()
    out = torch.empty(16 * MIB, device="cuda")
    store.fetch("row", out).wait()
    store.view("row").fill_(3)  # after the fetch has read it
    assert (out == 2).all()
    store.close()
    assert not view.is_pinned()


@gpu
def test_locked_pages_are_let_go() -> None:
    memory = aligned_empty(MIB, torch.uint8)
    pins = Pins()
    pins.add(memory)
    assert memory.is_pinned()
    with pytest.raises(
        OffloadError, match=r"CUDA cannot lock 1048576 bytes of host memory \(error"
    ):
        Pins().add(memory)
    pins.clear()
    assert not memory.is_pinned()
    pool = StagingPool(MIB, num_buffers=4, pin=True)
    with pool.borrow() as buffer:
        assert buffer.is_pinned()
    pool.close()


@gpu
@pytest.mark.parametrize("tier", ["host, pinned", "disk"])
def test_activations_leave_the_gpu_and_gradients_are_the_same(tier: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    store = HostStore(pin=True, reuse=True) if tier == "host, pinned" else _store("disk", tmp_path)
    offload = ActivationOffload(store, min_bytes=1024, window_bytes=64 * 1024)
    with torch.device("cuda"):
        model = nn.ModuleList(Block(32) for _ in range(3))
        for checkpoints in ("none", "reentrant", "not reentrant"):
            plain = _gradients(model, torch.enable_grad(), checkpoints)
            for _ in range(3):
                moved = _gradients(model, offload.hooks(), checkpoints)
                assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
    assert offload.num_bytes == 0
    hidden = torch.rand(2 * MIB, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with offload.hooks():
        loss = hidden
        for _ in range(8):
            loss = (loss * 1.01).sin()  # each keeps its input
    assert torch.cuda.memory_allocated() - before < 4 * 8 * MIB
    assert offload.num_bytes == 8 * 8 * MIB
    loss.sum().backward()
    assert hidden.grad is not None
    assert offload.num_bytes == 0
    offload.close()
