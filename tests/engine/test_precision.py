"""16-bit training with fp32 masters, against the same written out in plain torch."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError
from tests.engine.toys import (
    Tower,
    assert_same_values,
    global_batch,
    rank_here,
    ranks_here,
    share,
    speed,
    tower_rows,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NUM_STEPS = 5
NUM_MICRO_STEPS = 2


def _reference(kind: str, dtype: torch.dtype, *, scale: float = 1.0) -> dict[str, Tensor]:
    """All ranks' batches in one process: 16-bit gradients of each, summed in fp32, fp32 AdamW."""
    masters = toy_model(kind)
    working = copy.deepcopy(masters)
    for parameter in working.parameters():
        # Not buffers: rotary frequencies lose their meaning in 16 bit.
        parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-2)
    for step in range(NUM_STEPS):
        sums = [torch.zeros_like(p) for p in masters.parameters()]
        for micro in range(NUM_MICRO_STEPS):
            batch = global_batch(kind, NUM_MICRO_STEPS * step + micro)
            for rank in range(ranks_here()):
                working.zero_grad()
                (working(**share(batch, rank=rank)).loss * scale).backward()
                for total, parameter in zip(sums, working.parameters(), strict=True):
                    total.add_(parameter.grad.float() / ranks_here())
        for master, total in zip(masters.parameters(), sums, strict=True):
            master.grad = total / scale
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), working.parameters(), strict=True):
                parameter.copy_(master)
    return {name: p.detach() for name, p in masters.named_parameters()}


def _trained(kind: str, dtype: torch.dtype, stage: int, **precision: object) -> dict[str, Tensor]:
    model = toy_model(kind)
    engine = Engine.attach(model, speed(stage, precision=precision), compute_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    for step in range(NUM_STEPS):
        for micro in range(NUM_MICRO_STEPS):
            engine.sync_gradients = micro == NUM_MICRO_STEPS - 1
            engine.backward(model(**share(global_batch(kind, NUM_MICRO_STEPS * step + micro))).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert not engine.step_was_skipped
    assert {p.dtype for p in model.parameters()} == {dtype}
    return whole_parameters(engine)


def _bf16() -> None:
    plain = _reference("llama", torch.bfloat16)
    for stage in (2, 3):
        assert_same_values(_trained("llama", torch.bfloat16, stage), plain, rtol=1e-6, atol=1e-8)
    # Stages 0 and 1 add micro-steps up before the wire, so the sum is rounded to bf16 once.
    for stage in (0, 1):
        exact = _trained("llama", torch.bfloat16, stage, reduce_dtype="float32")
        assert_same_values(exact, plain, rtol=1e-6, atol=1e-8)


def test_bf16_with_fp32_masters_is_what_plain_torch_computes() -> None:
    run_ranks(_bf16, 2)


def _fp16() -> None:
    scale = {"initial": 1024.0}
    plain = _reference("gpt2", torch.float16, scale=1024.0)
    for stage in (2, 3):
        run = _trained("gpt2", torch.float16, stage, loss_scale=scale)
        assert_same_values(run, plain, rtol=1e-6, atol=1e-8)


def test_fp16_with_fp32_masters_and_loss_scale_is_what_plain_torch_computes() -> None:
    run_ranks(_fp16, 2)


def _without_masters() -> list[torch.dtype]:
    model = toy_model("llama")
    config = speed(3, precision={"master_dtype": "same", "accumulate_dtype": "same"})
    engine = Engine.attach(model, config, compute_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    engine.backward(model(**share(global_batch("llama", 0))).loss)
    optimizer.step()
    return sorted({group.master.dtype for group in engine.parts.groups}, key=str)


def test_master_dtype_same_keeps_no_fp32_copy() -> None:
    assert run_ranks(_without_masters, 2) == [[torch.bfloat16]] * 2


class Kept(Tower):
    """A tower whose inlet stays in fp32, as the models of transformers say it."""

    _keep_in_fp32_modules = ("inlet",)

    def forward(self, x: Tensor, skip: Sequence[int] = ()) -> Tensor:
        """(rows, width) -> 0-d loss; casts after the inlet."""
        x = self.inlet(x).to(self.outlet.weight.dtype)
        for block in self.blocks[len(skip) :]:
            x = x + block(x)
        return self.outlet(x).square().mean()


def _kept_modules() -> list[dict[str, torch.dtype]]:
    found = []
    for stage in STAGES:
        model = Kept()
        engine = Engine.attach(model, speed(stage), compute_dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(optimizer)
        engine.backward(model(tower_rows(0)))
        optimizer.step()
        found.append({name: p.dtype for name, p in model.named_parameters()})
        engine.detach()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    return found


def test_modules_that_a_model_keeps_in_fp32_stay_so() -> None:
    for found in run_ranks(_kept_modules, 2):
        for dtypes in found:
            for name, dtype in dtypes.items():
                assert dtype == (torch.float32 if name.startswith("inlet") else torch.bfloat16)


def _wire_bytes() -> list[int]:
    sent = []
    for reduce_dtype in (None, "float32"):
        precision = {} if reduce_dtype is None else {"reduce_dtype": reduce_dtype}
        model = toy_model("llama")
        engine = Engine.attach(model, speed(2, precision=precision), compute_dtype=torch.bfloat16)
        engine.backward(model(**share(global_batch("llama", 0))).loss)
        sent.append(engine.mesh.journal.bytes_sent["reduce_scatter"])
    return sent


def test_reduce_dtype_float32_doubles_the_bytes_of_bf16_gradients() -> None:
    for narrow, wide in run_ranks(_wire_bytes, 2):
        assert wide == 2 * narrow > 0


def _accumulate_same() -> None:
    for stage in (0, 2, 3):
        results = []
        for warm in (False, True):
            model = toy_model("llama")
            config = speed(stage, precision={"accumulate_dtype": "same"})
            engine = Engine.attach(model, config, compute_dtype=torch.bfloat16)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine.bind_optimizer(optimizer)
            if warm:
                engine.backward(model(**share(global_batch("llama", 1))).loss)
                optimizer.zero_grad()
            engine.backward(model(**share(global_batch("llama", 0))).loss)
            assert {g.grad.dtype for g in engine.parts.groups if g.grad is not None} <= {
                torch.bfloat16
            }
            optimizer.step()
            results.append(whole_parameters(engine))
        assert_same_values(*results)


def test_accumulate_dtype_same_sums_in_bf16_and_forgets_what_is_cleared() -> None:
    run_ranks(_accumulate_same, 2)


def _overflow_on_one_rank() -> list[tuple[list[float], list[bool], bool]]:
    """Ten steps of which rank 1 alone overflows in some: floor 4, window 2, hysteresis 2."""
    results = []
    bad_steps = {1, 2, 3, 6}
    for stage in STAGES:
        model = Tower()
        loss_scale = {"initial": 16.0, "window": 2, "hysteresis": 2, "floor": 4.0}
        config = speed(stage, precision={"loss_scale": loss_scale})
        engine = Engine.attach(model, config, compute_dtype=torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine.bind_optimizer(optimizer)
        scales, skipped, held = [], [], True
        for step in range(10):
            before = whole_parameters(engine)
            loss = model(tower_rows(step).half())
            bad = step in bad_steps and rank_here() == 1
            engine.backward(loss * float("inf") if bad else loss)
            norm = engine.clip_grad_norm_(1e9)
            optimizer.step()
            optimizer.zero_grad()
            after = whole_parameters(engine)
            moved = any(not torch.equal(after[name], before[name]) for name in after)
            held &= moved == (step not in bad_steps)
            held &= bool(torch.isfinite(norm)) or step in bad_steps
            scales.append(engine.loss_scale)
            skipped.append(engine.step_was_skipped)
        results.append((scales, skipped, held))
    return results


def test_all_ranks_skip_and_rescale_when_one_overflows() -> None:
    everyone = run_ranks(_overflow_on_one_rank, 2)
    assert everyone[0] == everyone[1]
    for scales, skipped, held in everyone[0]:
        assert held
        assert skipped == [step in {1, 2, 3, 6} for step in range(10)]
        # Step 1 is borne, 2 and 3 halve to the floor, two good steps double, and again.
        assert scales == [16.0, 16.0, 8.0, 4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


def test_loss_scale_outside_fp16_is_an_error() -> None:
    config = speed(1, precision={"loss_scale": {"initial": 8.0}})
    with pytest.raises(ConfigError, match=r"precision\.loss_scale is set, but .* bfloat16"):
        Engine.attach(Tower(), config, compute_dtype=torch.bfloat16)


def _norms() -> None:
    for stage in STAGES:
        model, plain = toy_model("llama"), toy_model("llama")
        engine = Engine.attach(model, speed(stage))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine.bind_optimizer(optimizer)
        batch = global_batch("llama", 0)
        plain(**batch).loss.backward()
        engine.backward(model(**share(batch)).loss)
        for norm_type in (2.0, 1.0, float("inf")):
            expected = nn.utils.get_total_norm([p.grad for p in plain.parameters()], norm_type)
            norm = engine.clip_grad_norm_(1e9, norm_type)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
        engine.clip_grad_norm_(0.01)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        engine.clip_grad_value_(1e-4)
        nn.utils.clip_grad_value_(plain.parameters(), 1e-4)
        for name, parameter in plain.named_parameters():
            ours = engine.get_full_grad(name)
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-9)


def test_clipping_by_norm_and_by_value_is_plain_pytorch_at_every_stage() -> None:
    run_ranks(_norms, 2)
