"""16-bit training on pipelines and slices: what one process computes in the same dtypes."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.meshes import BOTH, PIPE, SLICES, Mesh, attach, mean_over_data, own_rows, toy
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    rank_here,
    ranks_here,
    whole_parameters,
)
from tests.support import run_ranks

NUM_STEPS = 4
BF16, FP16 = torch.bfloat16, torch.float16
EXACT = {"reduce_dtype": "float32"}
"""Else the sum over microbatches is rounded once more before it is sent."""


def _reference(
    kind: str,
    dtype: torch.dtype | None,
    *,
    num_data: int = 1,
    num_pieces: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One process, the parts of each batch one by one: 16-bit gradients, summed in fp32.

    Args:
        kind: of the model.
        dtype: that computes.
        num_data: ranks with a part of the batch each.
        num_pieces: microbatches of each.
        scale: of the loss.
    """
    masters = toy(kind)
    working = copy.deepcopy(masters)
    if dtype is not None:
        for parameter in working.parameters():
            # Not buffers: rotary frequencies lose their meaning in 16 bit.
            parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-2)
    losses = []
    for step in range(NUM_STEPS):
        total = torch.zeros(())
        for master in masters.parameters():
            master.grad = torch.zeros_like(master)
        for part in _cut(global_batch(kind, step), num_data):
            sums = [torch.zeros_like(p) for p in masters.parameters()]
            for piece in _cut(part, num_pieces):
                working.zero_grad()
                loss = working(**piece).loss / num_pieces
                (loss * scale).backward()
                total += loss.detach() / num_data
                for each, parameter in zip(sums, working.parameters(), strict=True):
                    each.add_(parameter.grad.float())
            for master, each in zip(masters.parameters(), sums, strict=True):
                master.grad.add_(each / (scale * num_data))
        losses.append(total)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), working.parameters(), strict=True):
                parameter.copy_(master)
    return torch.stack(losses), {name: p.detach() for name, p in masters.named_parameters()}


def _cut(batch: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [{name: value.chunk(count)[i] for name, value in batch.items()} for i in range(count)]


def _trained(
    kind: str,
    mesh: Mesh,
    stage: int,
    dtype: torch.dtype | None,
    *,
    autocasts: bool = False,
    **sections: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the whole batches and final masters."""
    model = toy(kind)
    engine = attach(model, mesh, stage, dtype=dtype, **sections)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    losses = []
    for step in range(NUM_STEPS):
        with torch.autocast("cpu", dtype, enabled=autocasts):
            loss = model(**own_rows(engine, global_batch(kind, step))).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert not engine.step_was_skipped
        losses.append(mean_over_data(engine, loss))
    values = whole_parameters(engine)
    engine.detach()
    return torch.stack(losses), values


def _pipelines() -> None:
    num_data = ranks_here() // 2
    for kind, dtype in (("llama", BF16), ("llama", FP16), ("gpt2", FP16)):
        scale = 1024.0 if dtype is FP16 else 1.0
        losses, plain = _reference(kind, dtype, num_data=num_data, num_pieces=2, scale=scale)
        precision = EXACT | ({"loss_scale": {"initial": scale}} if dtype is FP16 else {})
        for stage, schedule in ((1, "zb_h1"), (3, "zb_v")):
            pipe = {"schedule": schedule}
            ours, values = _trained(kind, PIPE, stage, dtype, pipe=pipe, precision=precision)
            # The two gradients of a tied weight, on two ranks, are added in fp32 and not in fp16.
            rtol = 1e-3 if kind == "gpt2" else 1e-6
            torch.testing.assert_close(ours, losses, rtol=rtol, atol=0.0)
            if kind != "gpt2":
                assert_same_values(values, plain, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("world_size", [2, 4])
def test_16_bit_pipelines_are_what_plain_torch_computes(world_size: int) -> None:
    run_ranks(_pipelines, world_size)


def _slices() -> None:
    """A sum over slices is rounded elsewhere, so: as near to fp32 as one process is."""
    precise, _ = _reference("llama", None)
    for dtype in (FP16, BF16):
        scale = {"loss_scale": {"initial": 1024.0}} if dtype is FP16 else {}
        plain, _ = _reference("llama", dtype, scale=1024.0 if scale else 1.0)
        for mesh, stage in ((SLICES, 1), (SLICES, 3)) if ranks_here() == 2 else ((BOTH, 1),):
            ours, _ = _trained("llama", mesh, stage, dtype, precision=scale)
            allowed = 2 * (plain - precise).abs().max() + torch.finfo(dtype).eps
            assert (ours - precise).abs().max() <= allowed
    own = {"working_dtype": "own"}
    for mesh in (SLICES,) if ranks_here() == 2 else (PIPE, BOTH):
        ours, _ = _trained("llama", mesh, 3, BF16, autocasts=True, precision=own)
        assert (ours - precise).abs().max() <= allowed


@pytest.mark.parametrize("world_size", [2, 4])
def test_16_bit_slices_are_as_near_to_fp32_as_one_process_is(world_size: int) -> None:
    run_ranks(_slices, world_size)


class Island(nn.Module):
    """Multiplies in fp32, whatever autocast says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float()).to(x.dtype) @ self.linear.weight.to(x.dtype)


def _with_island() -> Any:
    model: Any = toy()
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp.add_module("down_proj", nn.Sequential(layer.mlp.down_proj, Island(16)))
    return model


def _autocast() -> None:
    """Parameters stay fp32; autocast around the model's call, as accelerate puts it."""
    own = {"working_dtype": "own"}
    steps = [global_batch("llama", step) for step in range(NUM_STEPS)]
    plain = _with_island()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    losses = []
    for batch in steps:
        total = torch.zeros(())
        for piece in _cut(batch, 2):
            with torch.autocast("cpu", BF16):
                loss = plain(**piece).loss / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    expected = torch.stack(losses)
    for stage, schedule in ((1, "1f1b"), (3, "zb_v")):
        model = _with_island()
        engine = attach(model, PIPE, stage, dtype=BF16, pipe={"schedule": schedule}, precision=own)
        ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(ours)
        found = []
        for batch in steps:
            with torch.autocast("cpu", BF16):
                loss = model(**batch).loss
            engine.backward(loss)
            ours.step()
            ours.zero_grad()
            found.append(loss.detach())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-6, atol=0.0)
        theirs = {name: p.detach() for name, p in plain.named_parameters()}
        assert_same_values(whole_parameters(engine), theirs, rtol=1e-6, atol=1e-8)
        engine.detach()


def test_autocast_within_a_pipeline_is_what_plain_torch_computes() -> None:
    run_ranks(_autocast, 2)


def _to_bf16(module: nn.Module, args: object, output: Tensor) -> Tensor:  # noqa: ARG001
    return output.to(BF16)


def _kept() -> None:
    for mesh in (PIPE, SLICES):
        model: Any = toy()
        model._keep_in_fp32_modules = ["norm", "input_layernorm"]
        for norm in [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]:
            norm.register_forward_hook(_to_bf16)
        engine = attach(model, mesh, 3, dtype=BF16)
        for name, value in engine.full_parameters():
            kept = "norm" in name.split(".") or "input_layernorm" in name
            assert value.dtype == (torch.float32 if kept else BF16), name
        engine.backward(model(**global_batch("llama", 0)).loss)
        for name in engine.parameter_names:
            assert engine.get_full_grad(name).dtype == torch.float32
        engine.detach()
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_modules_kept_in_fp32_are_known_on_every_stage() -> None:
    run_ranks(_kept, 2)


def _bytes() -> list[dict[str, int]]:
    found = []
    for dtype in (None, BF16):
        model = toy()
        engine = attach(model, PIPE, 1, dtype=dtype, pipe={"schedule": "1f1b"})
        journal = engine.mesh.journal
        for step in range(2):
            before = journal.bytes_sent["send"]
            engine.backward(model(**global_batch("llama", step)).loss)
        found.append(journal.bytes_sent["send"] - before)
        engine.detach()
    return found


def test_hidden_states_and_their_gradients_travel_in_the_compute_dtype() -> None:
    hidden = 4 * 6 * 16
    first, last = run_ranks(_bytes, 2)
    assert first == [4 * hidden, 2 * hidden]
    # Gradients, and the loss: one fp32 number.
    assert last == [4 * hidden + 4, 2 * hidden + 4]


def _overflows(mesh: Mesh, bad_rank: int, where: str) -> tuple[list[float], list[bool]]:
    """Steps of which one rank's gradients of one parameter overflow in some."""
    bad_steps, now = {1, 2, 4}, [0]
    model: Any = toy()
    scale = {"initial": 16.0, "window": 2, "hysteresis": 2, "floor": 4.0}
    engine = attach(model, mesh, 3, dtype=FP16, precision={"loss_scale": scale})
    if rank_here() == bad_rank:
        parameter = model.get_parameter(where)
        parameter.register_hook(lambda g: g * float("inf") if now[0] in bad_steps else g)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine.bind_optimizer(optimizer)
    scales, skipped = [], []
    for step in range(7):
        now[0] = step
        before = whole_parameters(engine)
        engine.backward(model(**own_rows(engine, global_batch("llama", step))).loss)
        norm = engine.clip_grad_norm_(1e9)
        optimizer.step()
        optimizer.zero_grad()
        after = whole_parameters(engine)
        moved = any(not torch.equal(after[name], before[name]) for name in after)
        assert moved == (step not in bad_steps)
        assert bool(torch.isfinite(norm)) == (step not in bad_steps)
        scales.append(engine.loss_scale)
        skipped.append(engine.step_was_skipped)
    engine.detach()
    return scales, skipped


def _all_overflows(world_size: int) -> list[tuple[list[float], list[bool]]]:
    first, last = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
    if world_size == 2:
        cases = [(PIPE, 0, first), (PIPE, 1, last), (SLICES, 1, first)]
    else:
        cases = [(PIPE, 1, first), (BOTH, 3, last)]
    return [_overflows(*case) for case in cases]


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_overflow_on_one_stage_or_slice_skips_the_step_on_all_ranks(world_size: int) -> None:
    for rank in run_ranks(_all_overflows, world_size, world_size):
        for scales, skipped in rank:
            assert skipped == [False, True, True, False, True, False, False]
            # Step 1 is borne, 2 and 4 halve; two good steps in a row double.
            assert scales == [16.0, 16.0, 8.0, 8.0, 4.0, 4.0, 8.0]
