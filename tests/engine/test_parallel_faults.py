"""Pipelines and slices that fail: an error on every rank in time, and a good step after it."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError, DivergenceError, EngineError, MeshError
from tests.engine.meshes import BOTH, PIPE, SLICES, Mesh, attach, own_rows, toy
from tests.engine.toys import (
    VOCAB,
    assert_same_values,
    global_batch,
    plain_parameters,
    rank_here,
    whole_parameters,
)
from tests.support import RankError, run_ranks

TIMEOUT_S = 3.0
HEADER_BYTES = 72


class Bomb(nn.Module):
    """An MLP that raises in some call of its forward, or in a backward, once it is armed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls_left: int | None = None
        self.in_backward = False
        self.explode: Callable[[], None] = self._raise

    def _raise(self) -> None:
        raise ValueError("the bomb went off")

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP says."""
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.explode()
        y = self.inner(x)
        if self.in_backward and y.requires_grad:
            y.register_hook(lambda _: self.explode())
        return y


def _with_bombs(kind: str = "llama", **overrides: Any) -> tuple[Any, list[Bomb]]:
    """A toy with a bomb in each layer."""
    model: Any = toy(kind, **overrides)
    layers = model.model.layers if kind == "llama" else model.transformer.h
    bombs = []
    for layer in layers:
        layer.mlp = Bomb(layer.mlp)
        bombs.append(layer.mlp)
    return model, bombs


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _step(engine: Engine, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    loss = engine.model(**own_rows(engine, global_batch("llama", step))).loss
    engine.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _journalled(cases: list[tuple[Mesh, int, dict[str, Any]]]) -> None:
    """Everything that there is to do, with every collective compared."""
    for mesh, stage, sections in cases:
        debug = {"journal": True, "timeout_s": 20.0}
        model: Any = toy()
        engine = attach(model, mesh, stage, debug=debug, **sections)
        optimizer = torch.optim.AdamW(model.parameters())
        engine.bind_optimizer(optimizer)
        _step(engine, optimizer, 0)
        engine.clip_grad_norm_(1.0)
        engine.get_full_grad("lm_head.weight")
        engine.get_full_optimizer_state("lm_head.weight", "exp_avg")
        tokens = own_rows(engine, global_batch("llama", 0))["input_ids"]
        with torch.no_grad():
            model.eval()(input_ids=tokens)
        # The ranks that see different batches stop at different lengths.
        data = engine.mesh.axis("dp_replicate", "dp_shard").rank
        model.generate(tokens, max_new_tokens=2 + data, do_sample=False, pad_token_id=0)
        engine.detach()


def test_the_journal_raises_no_false_alarm_on_pipelines_and_slices() -> None:
    run_ranks(_journalled, 2, [(SLICES, 1, {})])
    rows = {"tensor": {"sequence_parallel": True}}
    run_ranks(_journalled, 4, [(BOTH, 1, rows), (PIPE, 3, {})])


def _diverges(mesh: Mesh, how: str) -> str:
    debug = {"journal": True, "timeout_s": TIMEOUT_S}
    model: Any = toy()
    engine = attach(model, mesh, 1, debug=debug)
    optimizer = _sgd(model)
    engine.bind_optimizer(optimizer)
    _step(engine, optimizer, 0)
    try:
        if how == "batch":
            batch = own_rows(engine, global_batch("llama", 1 + rank_here()))
            engine.backward(model(**batch).loss)
        elif rank_here() != 1:
            engine.clip_grad_norm_(1.0)
        else:
            time.sleep(2 * TIMEOUT_S)
    except DivergenceError as error:
        return str(error)
    return ""


def test_the_journal_names_ranks_of_one_batch_that_were_given_two() -> None:
    for mesh, label in ((PIPE, "pp x tp"), (SLICES, "tp")):
        for message in run_ranks(_diverges, 2, mesh, "batch"):
            assert f"Ranks [0, 1] of {label}/control are about to run different" in message
            assert "rank 0: model(input_ids=(4, 6):" in message
            assert "rank 1: model(input_ids=(4, 6):" in message
            assert "test_parallel_faults.py" in message


def test_the_journal_names_the_stage_that_did_not_come() -> None:
    message = run_ranks(_diverges, 2, PIPE, "absent")[0]
    assert "[1] did not come to all_reduce" in message


def _train_until_one_fails(mesh: Mesh, stage: int, how: str) -> str:
    """Rank 1 fails in its second step; what the others raise, and after how long."""
    model, bombs = _with_bombs()
    engine = attach(model, mesh, stage, debug={"timeout_s": TIMEOUT_S})
    optimizer = _sgd(model)
    engine.bind_optimizer(optimizer)
    _step(engine, optimizer, 0)
    if rank_here() == 1:
        for bomb in bombs:
            bomb.calls_left = 1
            if how == "killed":
                bomb.explode = lambda: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for step in range(1, 4):
            _step(engine, optimizer, step)
    except MeshError as error:
        # Alive, but out of the run: nobody's connection to this rank is closed.
        time.sleep(2 * TIMEOUT_S if how == "stays" else 0)
        notes = "".join(getattr(error, "__notes__", ()))
        return f"{time.monotonic() - started:.1f} s, {error} {notes}"
    except EngineError as error:
        if how == "raises":
            raise
        time.sleep(3 * TIMEOUT_S)
        return str(error)
    raise AssertionError("nobody failed")


def test_the_other_stages_raise_in_time_and_say_where_when_one_stays_away() -> None:
    first, second = run_ranks(_train_until_one_fails, 2, PIPE, 1, "stays")
    assert "ValueError: the bomb went off" in second
    assert ">F1" in second
    waited = float(first.split(" s, ")[0]) - 2 * TIMEOUT_S
    assert waited < TIMEOUT_S + 3.0
    assert "look for the first traceback among the ranks" in first
    # The grid, with what this rank was waiting for.
    assert "rank 1" in first
    assert ">" in first


@pytest.mark.parametrize(
    ("mesh", "stage", "how"),
    [(Mesh(4, 1), 1, "killed"), (BOTH, 3, "killed"), (BOTH, 1, "raises")],
    ids=["stages killed", "slices killed", "slices raise"],
)
def test_every_rank_raises_in_time_when_one_dies(mesh: Mesh, stage: int, how: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_train_until_one_fails, 4, mesh, stage, how, timeout_s=60.0)
    assert time.monotonic() - started < 40.0
    reports = caught.value.reports
    assert "still running" not in "".join(reports.values())
    assert ("exit code -9" if how == "killed" else "the bomb went off") in reports[1]


def _compare_with_plain(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Two good steps after the faults are the first two of a plain run."""
    plain = toy()
    plain_optimizer = _sgd(plain)
    count = engine.config.pipe.microbatches or 1
    for step in range(2):
        optimizer.zero_grad()
        _step(engine, optimizer, step)
        for index in range(count):
            part = {k: v.chunk(count)[index] for k, v in global_batch("llama", step).items()}
            (plain(**part).loss / count).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    ours = {k.replace(".inner", ""): v for k, v in whole_parameters(engine).items()}
    assert_same_values(ours, plain_parameters(plain), rtol=1e-5, atol=1e-6)


def _fail_at_once(model: Any, bombs: list[Bomb], *, num_sent: int) -> None:
    """The first stage fails when it has sent some messages, the second one at the first of them."""
    first = rank_here() == 0
    for bomb in bombs[:1] if first else bombs:
        bomb.calls_left = num_sent if first else 0
    # Microbatches of 2, 2, 1 and 1 rows: the third one's shape has to be told.
    tokens = global_batch("llama", 7)["input_ids"].repeat(2, 1)[:6]
    with pytest.raises(EngineError, match=r"(?s)FORWARD of.*the bomb went off.*>F\d"):
        model(input_ids=tokens, labels=tokens)
    for bomb in bombs:
        bomb.calls_left = None


def _good_steps_after_faults() -> None:
    away = {"offload": {"parameters": "host", "optimizer": "device", "gradients": "device"}}
    for schedule, num_sent, sections in (("gpipe", 3, {}), ("zb_v", 1, away), ("zb_h1", 1, {})):
        model, bombs = _with_bombs()
        pipe = {"schedule": schedule, "microbatches": 4}
        engine = attach(model, PIPE, 3, pipe=pipe, debug={"timeout_s": 20.0}, **sections)
        optimizer = _sgd(model)
        engine.bind_optimizer(optimizer)
        # Before the shapes of messages are known, and when they are; evaluating too.
        for is_known in (False, True):
            if is_known:
                engine.backward(model(**global_batch("llama", 0)).loss)
            for trains in (True, False):
                model.train(trains)
                _fail_at_once(model, bombs, num_sent=num_sent)
            model.train()
            with pytest.raises(ConfigError, match="needs a batch of at least 4 rows"):
                model(**{k: v[:2] for k, v in global_batch("llama", 7).items()})
        assert all(unit.pins == 0 for unit in engine.parts.units)
        _compare_with_plain(engine, optimizer)
        engine.detach()


def test_a_step_after_an_exception_on_all_stages_is_a_good_step() -> None:
    run_ranks(_good_steps_after_faults, 2)


def _without_tags() -> None:
    """As over NCCL: what is left of a failed run could not be told from the next one's messages."""
    model, bombs = _with_bombs()
    engine = attach(model, PIPE, 1, pipe={"schedule": "gpipe", "microbatches": 4})
    vars(model)["forward"]._runtime.links._has_tags = False
    _fail_at_once(model, bombs, num_sent=3)
    with pytest.raises(MeshError, match=r"failed with messages under way.*engine\.detach\(\)"):
        model(**global_batch("llama", 0))
    engine.detach()
    engine = attach(model, PIPE, 1, pipe={"schedule": "gpipe", "microbatches": 4})
    engine.backward(model(**global_batch("llama", 0)).loss)
    engine.detach()


def test_where_messages_have_no_tags_a_failed_run_is_the_last() -> None:
    run_ranks(_without_tags, 2)


def _good_steps_on_slices() -> None:
    for stage in (1, 3):
        model, bombs = _with_bombs()
        engine = attach(model, SLICES, stage, debug={"timeout_s": 20.0})
        optimizer = _sgd(model)
        engine.bind_optimizer(optimizer)
        for in_backward in (False, True):
            bombs[2].in_backward = in_backward
            bombs[2].calls_left = None if in_backward else 0
            with pytest.raises(ValueError, match="went off"):
                engine.backward(model(**global_batch("llama", 7)).loss)
            bombs[2].in_backward, bombs[2].calls_left = False, None
        _compare_with_plain(engine, optimizer)
        engine.detach()


def test_a_step_after_an_exception_on_all_slices_is_a_good_step() -> None:
    run_ranks(_good_steps_on_slices, 2)


def _random_numbers() -> list[float]:
    """After a fault within a region whose dropout is each slice's own."""
    model, bombs = _with_bombs("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    engine = attach(model, SLICES, 1)
    bombs[1].calls_left = 0
    torch.manual_seed(3)
    found = []
    for explodes in (True, False):
        if explodes:
            with pytest.raises(ValueError, match="went off"):
                model(**global_batch("gpt2", 0))
            bombs[1].calls_left = None
        else:
            model(**global_batch("gpt2", 0))
        found.append(float(torch.rand(())))
    engine.detach()
    return found


def test_ranks_of_one_batch_draw_the_same_numbers_after_an_exception() -> None:
    first, second = run_ranks(_random_numbers, 2)
    assert first == second


def _seeds() -> list[float | str]:
    """A gradient that both ranks have; each has seeds of its own before it attaches, and after."""
    torch.manual_seed(rank_here())
    debug = {"journal": True, "timeout_s": 20.0}
    model = toy("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    engine = attach(model, SLICES, 1, debug=debug)
    found: list[float | str] = []
    name = "transformer.h.1.ln_1.weight"
    for seed in (None, rank_here()):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            engine.backward(model(**global_batch("gpt2", 0)).loss)
            found.append(float(model.get_parameter(name).grad.sum()))
        except DivergenceError as error:
            found.append(str(error))
    return found


def test_ranks_of_one_batch_share_random_numbers_or_are_told() -> None:
    first, second = run_ranks(_seeds, 2)
    assert first[0] == second[0]
    assert isinstance(first[0], float)
    for _, message in (first, second):
        assert "Ranks [0, 1] of tp/control are about to run different" in message
        assert "random_numbers=" in message


def _headers() -> list[int]:
    """Headers sent in each step, of batches whose shapes change."""
    model = toy()
    engine = attach(model, PIPE, 1, pipe={"schedule": "1f1b"})
    sizes: list[int] = []
    count = engine.mesh.journal.count

    def counting(operation: str, sent: int) -> None:
        sizes.append(sent)
        count(operation, sent)

    engine.mesh.journal.count = counting  # pyrefly: ignore
    found = []
    for step, shape in enumerate([(4, 6), (4, 6), (3, 6), (3, 6), (4, 5), (4, 6), (3, 5)]):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(1, VOCAB, shape, generator=generator)
        theirs = toy()(input_ids=tokens, labels=tokens).loss
        loss = model(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(loss.detach(), theirs.detach(), rtol=1e-5, atol=0.0)
        engine.backward(loss)
        model.zero_grad()
        found.append(sizes.count(HEADER_BYTES))
        # Besides: two hidden states, or their two gradients and the loss.
        assert len(sizes) == found[-1] + 2 + rank_here()
        sizes.clear()
    engine.detach()
    return found


def test_shapes_are_told_once_and_again_only_when_they_change() -> None:
    first, last = run_ranks(_headers, 2)
    # Microbatches of 2 x 6; of 1 x 6; of 2 x 5; of 1 x 5.
    assert first == [1, 0, 1, 0, 1, 0, 1]
    assert last == [0] * 7


def _uneven_data() -> None:
    """Pipelines side by side whose batches have other rows and lengths, and other microbatches."""
    for stage in (1, 3):
        model, plain = toy(), toy()
        engine = attach(model, PIPE, stage, pipe={"schedule": "zb_h1", "microbatches": None})
        mine = engine.mesh.axis("dp_replicate", "dp_shard").rank
        for step in range(2):
            batches = []
            for rank, shape in enumerate([(4, 6), (1, 3 + step)]):
                generator = torch.Generator().manual_seed(10 * step + rank)
                tokens = torch.randint(1, VOCAB, shape, generator=generator)
                batches.append({"input_ids": tokens, "labels": tokens})
                (plain(**batches[-1]).loss / 2).backward()
            engine.backward(model(**batches[mine]).loss)
            for name, parameter in plain.named_parameters():
                found = engine.get_full_grad(name)
                torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
            model.zero_grad()
            plain.zero_grad()
        engine.detach()


def _uneven_evaluation() -> None:
    """Gathers for every microbatch are collective: all ranks have as many, whatever their rows."""
    model, whole = toy(), toy().eval()
    pipe = {"gather": "microbatch", "schedule": "1f1b"}
    engine = attach(model, PIPE, 3, pipe=pipe, debug={"timeout_s": 20.0})
    mine = engine.mesh.axis("dp_replicate", "dp_shard").rank
    for rows in ((4, 3), (1, 4)):
        tokens = global_batch("llama", mine)["input_ids"][: rows[mine]]
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens).logits
            expected = whole(input_ids=tokens).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    engine.detach()


def test_pipelines_side_by_side_may_have_batches_of_other_shapes() -> None:
    run_ranks(_uneven_data, 4)
    run_ranks(_uneven_evaluation, 4)
