"""Whole tensors by name, copies, moves, and the way back to plain PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import (
    Engine,
    engine_of,
    gathered,
    get_full_grad,
    get_full_optimizer_state,
    get_full_parameter,
    set_full_grad,
    set_full_optimizer_state,
    set_full_parameter,
)
from hf_speed.errors import ConfigError, EngineError, ShardedParameterError
from tests.engine.toys import (
    Tower,
    assert_same_values,
    global_batch,
    plain_parameters,
    rank_here,
    share,
    speed,
    tower_rows,
    toy_model,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NAME = "blocks.1.0.weight"


def _prepared(
    stage: int, model: nn.Module | None = None
) -> tuple[nn.Module, Engine, torch.optim.Optimizer]:
    model = Tower() if model is None else model
    engine = Engine.attach(model, speed(stage))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    return model, engine, optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step on rows that all ranks share, so that plain PyTorch is the reference."""
    model(tower_rows(step, rank=0)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _plain(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        _step(model, optimizer, step)
    return model, optimizer


def _reads_and_writes() -> None:
    plain, plain_optimizer = _plain(2)
    parameter = plain.get_parameter(NAME)
    for stage in STAGES:
        model, _, optimizer = _prepared(stage)
        for step in range(2):
            _step(model, optimizer, step)
        torch.testing.assert_close(get_full_parameter(model, NAME), parameter.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            ours = get_full_optimizer_state(model, NAME, key)
            torch.testing.assert_close(ours, plain_optimizer.state[parameter][key])
        with pytest.raises(EngineError, match=r"AdamW keeps no 'sum' .*exp_avg"):
            get_full_optimizer_state(model, NAME, "sum")
        with pytest.raises(EngineError, match=r"Did you mean 'blocks\.1\.0\.weight'"):
            get_full_parameter(model, "blocks.1.0.weights")

        # Writing all three steers the next step.
        value = torch.arange(35.0).view(7, 5)
        set_full_parameter(model, NAME, value)
        set_full_optimizer_state(model, NAME, "exp_avg", value / 7)
        model(tower_rows(2, rank=0)).backward()
        set_full_grad(model, NAME, value / 3)
        assert torch.equal(get_full_grad(model, NAME), value / 3)
        assert torch.equal(get_full_optimizer_state(model, NAME, "exp_avg"), value / 7)
        expected = _adamw_step(
            value, value / 3, value / 7, get_full_optimizer_state(model, NAME, "exp_avg_sq")
        )
        optimizer.step()
        torch.testing.assert_close(get_full_parameter(model, NAME), expected)


def _adamw_step(value: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The third AdamW step with its defaults and lr=1e-2."""
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient.square()
    update = (first / (1 - 0.9**3)) / ((second / (1 - 0.999**3)).sqrt() + 1e-8)
    return value * (1 - 1e-2 * 1e-2) - 1e-2 * update


def test_whole_parameters_gradients_and_states_are_read_and_written_by_name() -> None:
    run_ranks(_reads_and_writes, 2)


def _gathered() -> None:
    start = plain_parameters(Tower())
    for stage in STAGES:
        model, engine, _ = _prepared(stage)
        weight = model.get_parameter(NAME)
        with gathered(model):
            assert_same_values(plain_parameters(model), start)
        with gathered(model, [NAME]):
            assert torch.equal(weight, start[NAME])
            # Evaluation inside, and the values still there after it.
            with torch.no_grad():
                model(tower_rows(0))
            assert torch.equal(weight, start[NAME])
        with gathered(model, [NAME], modify=True), torch.no_grad():
            # Rank 0's change counts.
            weight.fill_(1.0 + rank_here())
        assert torch.equal(get_full_parameter(model, NAME), torch.ones(7, 5))
        untouched = {
            name: value for name, value in whole_parameters(engine).items() if name != NAME
        }
        assert all(torch.equal(value, start[name]) for name, value in untouched.items())
        with torch.no_grad():
            other = Tower()
            other.get_parameter(NAME).fill_(1.0)
            torch.testing.assert_close(model(tower_rows(0)), other(tower_rows(0)))
        assert gathered(Tower()).__enter__() is None


def test_gathered_shows_whole_parameters_and_keeps_rank_zeros_changes() -> None:
    run_ranks(_gathered, 2)


def _precise_masters() -> None:
    for stage in STAGES:
        model = Tower()
        engine = Engine.attach(model, speed(stage), compute_dtype=torch.bfloat16)
        with gathered(model, [NAME], modify=True), torch.no_grad():
            model.get_parameter(NAME)[0, 0] = 2.0
        expected = Tower().get_parameter(NAME).detach().clone()
        expected[0, 0] = 2.0
        # What was not changed keeps the precision of its master.
        assert torch.equal(engine.get_full_parameter(NAME), expected)


def test_gathered_modify_leaves_masters_of_unchanged_elements_alone() -> None:
    run_ranks(_precise_masters, 2)


def _released() -> None:
    model, _, _ = _prepared(3)
    weight = model.get_parameter(NAME)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((7, 5), torch.float32, "cpu")
    assert (weight.numel(), weight.dim(), len(weight), weight.grad) == (35, 2, 7, None)
    assert weight.requires_grad
    assert weight.is_leaf
    assert NAME in repr(weight)
    assert torch.zeros_like(weight).tolist() == [[0.0] * 5] * 7
    reads = (
        weight.sum,
        lambda: weight + 1,
        lambda: torch.cat([torch.zeros(1), weight.view(-1)]),
        lambda: weight.data,
        lambda: weight[0, 0],
        weight.numpy,
        weight.tolist,
        weight.untyped_storage,
        weight.data_ptr,
        lambda: copy.deepcopy(weight),
        lambda: nn.init.zeros_(weight),
        model.state_dict,
    )
    for read in reads[:-1]:
        with pytest.raises(
            ShardedParameterError, match=rf"{NAME}.* of shape \(7, 5\).*hf_speed.gathered"
        ):
            read()
    with pytest.raises(ShardedParameterError, match=r"inlet\.weight"):
        reads[-1]()


def test_reading_a_released_parameter_raises_with_its_name_and_metadata_answers() -> None:
    run_ranks(_released, 2)


def _copies() -> None:
    for stage in (0, 1, 2):
        model, _, optimizer = _prepared(stage)
        _step(model, optimizer, 0)
        copied = copy.deepcopy(model)
        assert engine_of(copied) is None
        copied_optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        before = plain_parameters(model)
        _step(copied, copied_optimizer, 1)
        copied.zero_grad()
        assert_same_values(plain_parameters(model), before)
        plain, _ = _plain(1)
        _step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 1)
        assert_same_values(plain_parameters(copied), plain_parameters(plain), rtol=1e-5, atol=1e-7)
        # The original trains on.
        _step(model, optimizer, 1)
    model, _, optimizer = _prepared(3)
    with pytest.raises(ShardedParameterError, match=r"hf_speed\.gathered"):
        copy.deepcopy(model)
    with gathered(model):
        copied = copy.deepcopy(model)
    assert_same_values(plain_parameters(copied), plain_parameters(Tower()))
    _step(copied, torch.optim.SGD(copied.parameters(), lr=0.1), 0)
    _step(model, optimizer, 0)


def test_a_copy_is_a_plain_model_and_at_stage_3_needs_gathered() -> None:
    run_ranks(_copies, 2)


def _moves_to_where_it_is() -> None:
    for stage in STAGES:
        model, _, optimizer = _prepared(stage)
        _step(model, optimizer, 0)
        assert model.cpu() is model.to("cpu") is model.float() is model
        _step(model, optimizer, 1)
    model, _, _ = _prepared(3)
    assert model.to("cpu:0", torch.float32) is model
    with pytest.raises(ShardedParameterError, match=r"hf_speed\.gathered"):
        model.to("meta")


def test_moving_a_model_to_where_it_is_changes_nothing() -> None:
    run_ranks(_moves_to_where_it_is, 2)


def _moves() -> None:
    rows = tower_rows(0)
    for stage in STAGES:
        model, _, _ = _prepared(stage)
        with pytest.raises((EngineError, ShardedParameterError), match="hf_speed"):
            model.half()(rows)
        model, _, _ = _prepared(stage)
        with pytest.raises((EngineError, ShardedParameterError), match="hf_speed"):
            model.to(torch.float64)(rows.double())
        model, _, _ = _prepared(stage)
        model.blocks[1].requires_grad_(requires_grad=False)
        with pytest.raises(EngineError, match=rf"{NAME} had requires_grad set to False after"):
            model(rows)
        model, _, _ = _prepared(stage)
        model.blocks[1][0].weight = nn.Parameter(torch.zeros(7, 5))
        with pytest.raises(EngineError, match=rf"{NAME} was replaced"):
            model(rows)


def test_moves_casts_replacements_and_freezing_behind_the_engine_are_caught() -> None:
    run_ranks(_moves, 2)


def _freezing_inside() -> None:
    for stage in STAGES:
        model, engine, optimizer = _prepared(stage)
        _step(model, optimizer, 0)
        with gathered(model, modify=True):
            model.blocks[1].requires_grad_(requires_grad=False)
        before = engine.get_full_parameter(NAME)
        other = engine.get_full_parameter("inlet.weight")
        _step(model, optimizer, 1)
        assert torch.equal(engine.get_full_parameter(NAME), before)
        assert not torch.equal(engine.get_full_parameter("inlet.weight"), other)


def test_freezing_inside_gathered_modify_is_taken_over() -> None:
    run_ranks(_freezing_inside, 2)


def _detached() -> None:
    plain, plain_optimizer = _plain(4)
    for stage in STAGES:
        model, engine, optimizer = _prepared(stage)
        objects = list(model.parameters())
        for step in range(2):
            _step(model, optimizer, step)
        engine.detach()
        assert engine_of(model) is None
        assert [id(p) for p in model.parameters()] == [id(p) for p in objects]
        assert optimizer.param_groups[0]["params"] == objects
        for step in (2, 3):
            _step(model, optimizer, step)
        assert_same_values(plain_parameters(model), plain_parameters(plain), rtol=1e-5, atol=1e-7)
        for parameter, reference in zip(objects, plain.parameters(), strict=True):
            ours, theirs = optimizer.state[parameter], plain_optimizer.state[reference]
            assert set(ours) == set(theirs)
            assert ours["step"] == theirs["step"]
            torch.testing.assert_close(
                ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-5, atol=1e-9
            )
        # And again under an engine.
        engine = Engine.attach(model, speed(3 - stage))
        engine.bind_optimizer(optimizer)
        _step(model, optimizer, 4)


def test_detach_gives_a_plain_model_and_optimizer_that_train_on_as_plain_pytorch() -> None:
    run_ranks(_detached, 2)


def _resized(when: str, stage: int | None, kind: str) -> list[Tensor]:
    model = toy_model(kind)
    if when == "before":
        model.resize_token_embeddings(70, mean_resizing=False)
    engine = None if stage is None else Engine.attach(model, speed(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if engine is not None:
        engine.bind_optimizer(optimizer)
    losses = []
    for step in range(4):
        if when == "inside" and step == 2:
            with gathered(model, modify=True):
                torch.manual_seed(5)
                model.resize_token_embeddings(70, mean_resizing=False)
            if engine is None:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = dict(global_batch(kind, step))
        if when == "before" or step >= 2:
            batch["input_ids"] = batch["input_ids"] + 9  # The new tokens are used.
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        del loss  # A graph that outlives the resize would keep the old shape alive.
    assert model.get_input_embeddings().weight.shape[0] == 70
    return losses


def _resizing() -> None:
    for kind in ("llama", "gpt2"):
        for when in ("before", "inside"):
            plain = _resized(when, None, kind)
            for stage in STAGES:
                torch.testing.assert_close(_resized(when, stage, kind), plain, rtol=1e-5, atol=0.0)


def test_resized_embeddings_train_as_in_plain_pytorch_before_and_inside_gathered() -> None:
    run_ranks(_resizing, 2)


def _tied() -> list[int]:
    counts = []
    for stage in STAGES:
        model = toy_model("gpt2")
        engine = Engine.attach(model, speed(stage))
        head, embedding = model.lm_head.weight, model.transformer.wte.weight
        assert head is embedding
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(optimizer)
        model(**share(global_batch("gpt2", 0))).loss.backward()
        optimizer.step()
        assert torch.equal(
            engine.get_full_parameter("lm_head.weight"),
            engine.get_full_parameter("transformer.wte.weight"),
        )
        assert "lm_head.weight" not in engine.parameter_names
        counts.append(sum(group.layout.numel for group in engine.parts.groups))
    return counts


def test_tied_weights_are_held_once_and_stay_tied() -> None:
    numel = sum(parameter.numel() for parameter in toy_model("gpt2").parameters())
    for counts in run_ranks(_tied, 2):
        assert counts == [numel] * 4


def test_a_prepared_model_needs_plain_parameters() -> None:
    class Fancy(nn.Parameter):
        pass

    model = nn.Linear(2, 2)
    model.weight = Fancy(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="weight is a Fancy: hf_speed flattens plain parameters"):
        Engine.attach(model, speed(3))
