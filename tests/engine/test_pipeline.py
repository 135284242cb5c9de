"""A pipeline trains, evaluates and generates as one process does; what it cannot do, it refuses."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_speed.config.tree import SCHEDULES
from hf_speed.engine import Engine
from hf_speed.errors import ConfigError, EngineError
from tests.engine.pipelines import (
    NUM_LAYERS,
    Trained,
    batches,
    own_rows,
    pipeline_engine,
    toy,
    train_in_microbatches,
    train_pipeline,
)
from tests.engine.toys import (
    adamw,
    assert_same_values,
    global_batch,
    plain_parameters,
    rank_here,
    whole_parameters,
)
from tests.support import run_ranks

STEPS = 3


def _same(ours: Trained, theirs: Trained, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=rtol, atol=0.0)
    # Of a sum over stages, in another order than a sum over parameters.
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-6, atol=0.0)
    assert_same_values(ours.parameters, theirs.parameters, rtol=rtol, atol=atol)


def _every_schedule() -> None:
    for kind in ("llama", "qwen3"):
        plain = train_in_microbatches(toy(kind), batches(kind, STEPS))
        for schedule in SCHEDULES if kind == "llama" else ("zb_h1", "zb_v"):
            stage = 3 if schedule in ("zb_h1", "interleaved", "gpipe") else 1
            engine = pipeline_engine(toy(kind), stage=stage, schedule=schedule)
            _same(train_pipeline(engine, batches(kind, STEPS)), plain)
            engine.detach()


def test_every_schedule_trains_bitwise_as_one_process() -> None:
    run_ranks(_every_schedule, 2)


def _tied() -> None:
    for kind in ("gpt2", "bert"):
        plain = train_in_microbatches(toy(kind), batches(kind, STEPS))
        for schedule, stage in (("1f1b", 1), ("zb_h1", 3), ("zb_v", 0)):
            engine = pipeline_engine(toy(kind), stage=stage, schedule=schedule)
            trained = train_pipeline(engine, batches(kind, STEPS))
            # The tied weight's gradient is a sum over two ranks: same maths in another order.
            torch.testing.assert_close(trained.losses, plain.losses, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(trained.norms, plain.norms, rtol=1e-5, atol=0.0)
            assert_same_values(trained.parameters, plain.parameters, rtol=1e-4, atol=1e-4)
            tied = [group for group in engine.parts.groups if group.axes.num_sharers == 2]
            assert len(tied) == (0 if schedule == "zb_v" else 1)
            assert all(group.is_counted == (rank_here() == 0) for group in tied)
            engine.detach()


def test_a_tied_weight_has_one_owner_and_the_sum_of_its_gradients() -> None:
    run_ranks(_tied, 2)


def _sharded() -> None:
    plain = train_in_microbatches(toy("llama"), batches("llama", STEPS), count=2)
    for stage in (0, 1, 2, 3):
        pipe = {"gather": "microbatch", "schedule": "1f1b"} if stage == 3 else {}
        engine = pipeline_engine(toy("llama"), stage=stage, **{"microbatches": 2, **pipe})
        trained = train_pipeline(engine, batches("llama", STEPS))
        torch.testing.assert_close(trained.norms, plain.norms, rtol=1e-5, atol=0.0)
        assert_same_values(trained.parameters, plain.parameters, rtol=1e-5, atol=1e-5)
        engine.detach()


def test_stages_0_to_3_within_a_pipeline_train_as_one_process() -> None:
    run_ranks(_sharded, 4)


def _sent(stage: int, **pipe: Any) -> dict[str, int]:
    engine = pipeline_engine(toy("llama"), stage=stage, **{"microbatches": 2, **pipe})
    train_pipeline(engine, batches("llama", 1))
    before = dict(engine.mesh.journal.bytes_sent)
    loss = engine.model(**own_rows(engine, global_batch("llama", 1))).loss
    engine.backward(loss)
    engine.parts.stepper.make_ready()
    now = dict(engine.mesh.journal.bytes_sent)
    part = sum(group.layout.part_numel * 4 for group in engine.parts.groups)
    engine.detach()
    return {name: now[name] - before.get(name, 0) for name in now} | {"part": part}


def _counted() -> None:
    for stage, pipe in ((1, {}), (2, {}), (3, {}), (3, {"schedule": "zb_v"})):
        sent = _sent(stage, **pipe)
        # Of two ranks each sends the other's half: once a step, whatever the microbatches.
        assert sent["reduce_scatter"] == sent["part"]
        assert sent.get("all_gather", 0) == (sent["part"] if stage == 3 else 0)
    sent = _sent(3, gather="microbatch", schedule="1f1b")
    assert sent["reduce_scatter"] == sent["part"]
    assert sent["all_gather"] > 2 * sent["part"]


def test_gradients_are_reduced_once_a_step_and_parameters_gathered_as_the_policy_says() -> None:
    run_ranks(_counted, 4)


def _uneven() -> None:
    # GPT-2 says no loss type, BERT shifts nothing; a microbatch may have no token that counts.
    for kind, count in (("gpt2", 4), ("bert", 3), ("llama", 3)):
        _weighs_tokens(kind, count)


def _weighs_tokens(kind: str, count: int) -> None:
    model, batch = toy(kind), dict(global_batch(kind, 0))
    labels = batch["labels"].clone()
    labels[0, 2:] = -100
    labels[1] = -100
    batch["labels"] = labels
    whole = toy(kind)
    loss = whole(**batch).loss
    loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    engine = pipeline_engine(model, microbatches=count)
    ours = model(**batch).loss
    engine.backward(ours)
    torch.testing.assert_close(ours.detach(), loss.detach(), rtol=1e-6, atol=0.0)
    for name, gradient in expected.items():
        found = engine.get_full_grad(name)
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
    if kind == "llama":
        # A count given from outside divides as in one process.
        num_items = torch.tensor(7)
        model.zero_grad()
        ours = model(**batch, num_items_in_batch=num_items).loss
        engine.backward(ours)
        theirs = whole(**batch, num_items_in_batch=num_items).loss
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=0.0)
    engine.detach()


def test_the_loss_weighs_tokens_exactly_whatever_the_microbatches_hold() -> None:
    run_ranks(_uneven, 2)


def _accumulated() -> None:
    """Two batches a step, each loss halved, under no_sync for the first."""
    model = toy("llama")
    engine = pipeline_engine(model, stage=1, microbatches=2)
    optimizer = adamw(model.parameters())
    engine.bind_optimizer(optimizer)
    whole = toy("llama")
    theirs = adamw(whole.parameters())
    for step in range(2):
        for micro in range(2):
            batch = global_batch("llama", 2 * step + micro)
            engine.sync_gradients = micro == 1
            engine.backward(model(**own_rows(engine, batch)).loss / 2)
            (whole(**batch).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
        theirs.zero_grad()
    assert_same_values(whole_parameters(engine), plain_parameters(whole), rtol=1e-5, atol=1e-5)
    # Each loss of a step may have its own factor.
    for micro, factor in enumerate((0.25, -2.0, 0.0, 1.0)):
        batch = global_batch("llama", 9 + micro)
        engine.sync_gradients = micro == 3
        engine.backward(model(**own_rows(engine, batch)).loss * factor)
        (whole(**batch).loss * factor).backward()
    for name, parameter in whole.named_parameters():
        found = engine.get_full_grad(name)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
    engine.detach()


def test_batches_accumulate_and_the_factor_of_a_loss_is_heeded() -> None:
    run_ranks(_accumulated, 4)


def _evaluated() -> None:
    for kind, schedule in (("llama", "zb_v"), ("gpt2", "1f1b"), ("bert", "interleaved")):
        model, whole = toy(kind).eval(), toy(kind).eval()
        engine = pipeline_engine(model, stage=3, schedule=schedule)
        batch = global_batch(kind, 0)
        with torch.no_grad():
            ours, theirs = model(**batch), whole(**batch)
            alone = model(input_ids=batch["input_ids"])
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0.0, atol=0.0)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0.0)
        assert torch.equal(alone.logits, theirs.logits)
        assert alone.loss is None
        if kind != "bert":
            _generates(model, whole, batch["input_ids"])
        engine.detach()


def _generates(model: Any, whole: Any, tokens: Tensor) -> None:
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = whole.generate(tokens, **kwargs)
    assert torch.equal(model.generate(tokens, **kwargs), expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **kwargs), expected)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    padded = whole.generate(tokens, attention_mask=mask, **kwargs)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **kwargs), padded)


def test_evaluation_and_generation_are_those_of_one_process_on_every_rank() -> None:
    run_ranks(_evaluated, 2)


def _with_dropout(pp: int) -> Tensor:
    """Losses and final weights of a model with every kind of dropout, on `pp` ranks."""
    torch.manual_seed(5)
    drops = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    model = toy("gpt2", **drops)
    engine = pipeline_engine(model, mesh={"pp": pp}, schedule="zb_h1", microbatches=4)
    torch.manual_seed(11)
    trained = train_pipeline(engine, batches("gpt2", 2))
    state = torch.rand(1)
    engine.detach()
    return torch.cat([trained.losses, state])


def test_dropout_does_not_depend_on_how_a_model_is_cut() -> None:
    two = run_ranks(_with_dropout, 2, 2)
    four = run_ranks(_with_dropout, 4, 4)
    for each in (*two, *four):
        torch.testing.assert_close(each, two[0], rtol=1e-6, atol=0.0)


def _checkpointed() -> None:
    plain = train_in_microbatches(toy("llama"), batches("llama", 2))
    for reentrant, schedule in ((False, "zb_h1"), (True, "1f1b")):
        model: Any = toy("llama")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        engine = pipeline_engine(model, stage=3, schedule=schedule)
        _same(train_pipeline(engine, batches("llama", 2)), plain)
        engine.detach()


def test_gradient_checkpointing_of_both_kinds_works_within_a_pipeline() -> None:
    run_ranks(_checkpointed, 2)


def _balanced() -> None:
    engine = pipeline_engine(toy("llama"), schedule="1f1b", balance=[1, 3])
    layers = [name for name in whole_parameters(engine) if "layers" in name]
    own = {slot.name for group in engine.parts.groups for slot in group.layout.slots}
    held = {name.split(".")[2] for name in layers if name in own}
    assert held == ({"0"} if rank_here() == 0 else {"1", "2", "3"})
    assert len(layers) == len(set(layers)) == 9 * NUM_LAYERS
    engine.detach()
    engine = pipeline_engine(toy("llama"), schedule="1f1b", balance="time")
    assert sum(len(stage.modules) for stage in engine.parts.division.split.stages.values()) >= 2
    engine.detach()


def test_layers_are_dealt_out_as_the_config_says() -> None:
    run_ranks(_balanced, 2)


def _sees_its_part() -> None:
    model = toy("llama")
    optimizer = adamw(model.parameters())
    whole = plain_parameters(model)
    engine = pipeline_engine(model)
    engine.bind_optimizer(optimizer)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert len(held) < len(whole)
    assert list(engine.parameter_names) == list(whole)
    assert_same_values(whole_parameters(engine), whole)
    loss = model(**global_batch("llama", 0)).loss
    engine.backward(loss)
    optimizer.step()
    moment = engine.get_full_optimizer_state("lm_head.weight", "exp_avg")
    assert moment.shape == whole["lm_head.weight"].shape
    engine.set_full_parameter("model.embed_tokens.weight", torch.ones(61, 16))
    assert torch.equal(engine.get_full_parameter("model.embed_tokens.weight"), torch.ones(61, 16))
    with pytest.raises(AttributeError, match=r"is on another pipeline stage \(mesh\.pp > 1\)"):
        (model.lm_head if rank_here() == 0 else model.model.embed_tokens).weight  # noqa: B018
    engine.detach()
    # Whole again, states included.
    assert list(plain_parameters(model)) == list(whole)
    states = {id(each) for each in optimizer.state}
    assert states == {id(each) for each in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_a_rank_holds_its_stages_and_whole_values_are_read_and_written_by_name() -> None:
    run_ranks(_sees_its_part, 2)


def _refusals() -> None:
    def attach(model: nn.Module, pipe: Mapping[str, Any] | None = None, **mesh: int) -> Engine:
        return pipeline_engine(model, mesh={"pp": 2, **mesh}, **(pipe or {}))

    with pytest.raises(ConfigError, match=r"6 stages, but the model has 4 layers.*at most 4"):
        attach(toy("llama"), {"schedule": "interleaved", "chunks": 3})
    with pytest.raises(ConfigError, match=r"cannot cut T5.*decoder reads the end of its encoder"):
        attach(toy("t5"))
    with pytest.raises(ConfigError, match=r"Linear has no nn\.ModuleList or nn\.Sequential"):
        attach(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"deals out 3 layers, but Llama.* has 4"):
        attach(toy("llama"), {"balance": [1, 2], "schedule": "1f1b"})
    with pytest.raises(ConfigError, match=r"gather='microbatch' lets go of parameters"):
        pipeline_engine(toy("llama"), stage=3, gather="microbatch", schedule="zb_h1")
    model = toy("llama")
    engine = pipeline_engine(model, microbatches=8)
    batch = global_batch("llama", 0)
    with pytest.raises(ConfigError, match=r"microbatches=8 needs a batch of at least 8.*has 4"):
        model(**batch)
    with pytest.raises(ConfigError, match=r"output_attentions cannot be served"):
        model(**batch, output_attentions=True)
    with pytest.raises(ConfigError, match=r"called in training without labels\. Under a pipeline"):
        model(input_ids=batch["input_ids"])
    engine.detach()


def test_what_a_pipeline_cannot_do_is_refused_with_the_numbers() -> None:
    run_ranks(_refusals, 2)


def _order_of_calls() -> None:
    """Losses without a backward, and gradients cleared between a forward and its backward."""
    for stage in (1, 3):
        model, whole = toy("llama"), toy("llama")
        engine = pipeline_engine(model, stage=stage, microbatches=2)
        optimizer, theirs = adamw(model.parameters()), adamw(whole.parameters())
        engine.bind_optimizer(optimizer)
        for step in range(4):
            batch = global_batch("llama", step)
            # Read and thrown away.
            model(**own_rows(engine, global_batch("llama", 20 + step)))
            loss, expected = model(**own_rows(engine, batch)).loss, whole(**batch).loss
            for each in (optimizer, theirs):
                match step:
                    case 0 | 3:
                        each.zero_grad()
                    case 1:
                        each.zero_grad(set_to_none=False)
                    case 2:
                        # Not cleared: the gradients of the step before are added to.
                        pass
            if step == 3:
                model.zero_grad()
            engine.backward(loss)
            expected.backward()
            for name, parameter in whole.named_parameters():
                found = engine.get_full_grad(name)
                torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)
            optimizer.step()
            theirs.step()
        assert_same_values(whole_parameters(engine), plain_parameters(whole), rtol=1e-3, atol=1e-3)
        engine.detach()


def test_gradients_count_from_the_backward_on_as_in_plain_pytorch() -> None:
    run_ranks(_order_of_calls, 2)
    run_ranks(_order_of_calls, 4)


def _twice() -> None:
    model = toy("llama")
    engine = pipeline_engine(model)
    batch = global_batch("llama", 0)
    first = model(**batch).loss
    second = model(**batch).loss
    with pytest.raises(EngineError, match=r"Another batch has gone through.*were dropped then"):
        engine.backward(first)
    engine.backward(second)
    with pytest.raises(EngineError, match=r"has had its backward\(\) already"):
        engine.backward(second)
    engine.detach()


def test_a_loss_after_another_batch_and_a_second_backward_are_errors() -> None:
    run_ranks(_twice, 2)


def _lets_go() -> None:
    """Hidden states and key-value caches are gone when the results of a run are."""
    model: Any = toy("llama")
    engine = pipeline_engine(model)
    alive: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
        cache = kwargs.get("past_key_values")
        alive.extend(weakref.ref(each) for each in (output, cache) if each is not None)

    own = next(each for each in model.model.layers if next(each.parameters(), None) is not None)
    own.register_forward_hook(note, with_kwargs=True)
    tokens = global_batch("llama", 0)["input_ids"]
    engine.backward(model(input_ids=tokens, labels=tokens).loss)
    counts = [len(alive)]
    with torch.no_grad():
        model.eval()(input_ids=tokens)
        counts.append(len(alive))
        model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    # Four microbatches each, then one of two things for each token.
    assert [*counts, len(alive)] == [4, 8, 8 + 3 * 2]
    gc.collect()
    assert all(each() is None for each in alive)
    engine.detach()


def test_nothing_of_a_batch_outlives_it() -> None:
    run_ranks(_lets_go, 2)
