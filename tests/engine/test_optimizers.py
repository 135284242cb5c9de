"""The user's optimizer stays the user's, and updates what it would in plain PyTorch."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError, EngineError
from tests.engine.toys import (
    Tower,
    assert_same_values,
    global_batch,
    plain_parameters,
    speed,
    tower_rows,
    toy_model,
    train_engine,
    train_plain,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
MAKERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "groups": lambda p: _two_groups(list(p)),
}
WHOLE: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "Adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
    "Muon": lambda p: torch.optim.Muon([each for each in p if each.dim() == 2], lr=1e-3),
}


def _two_groups(parameters: list[nn.Parameter]) -> Optimizer:
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 3e-2}], lr=1e-2
    )


def _elementwise() -> None:
    batches = [global_batch("llama", step) for step in range(4)]
    for name, make in MAKERS.items():
        plain = train_plain(toy_model("llama"), batches, make)
        first = None
        for stage in STAGES:
            run = train_engine(toy_model("llama"), batches, speed(stage), make)
            torch.testing.assert_close(run.losses, plain.losses, rtol=1e-5, atol=0.0, msg=name)
            first = first or run
            assert_same_values(run.parameters, first.parameters)


def test_elementwise_optimizers_train_at_every_stage_as_in_plain_pytorch() -> None:
    run_ranks(_elementwise, 2)


def _whole_tensors() -> None:
    batches = [global_batch("gpt2", step) for step in range(3)]
    for name, make in WHOLE.items():
        plain = train_plain(toy_model("gpt2"), batches, make)
        run = train_engine(toy_model("gpt2"), batches, speed(0), make)
        torch.testing.assert_close(run.losses, plain.losses, rtol=1e-5, atol=0.0, msg=name)
        for stage in (1, 2, 3):
            with pytest.raises(ConfigError, match=rf"zero.stage={stage} .*{name}.*zero.stage=0"):
                train_engine(toy_model("gpt2"), batches, speed(stage), make)


def test_optimizers_of_whole_tensors_work_at_stage_0_and_raise_above() -> None:
    run_ranks(_whole_tensors, 2)


def _steps(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        model(tower_rows(step, rank=0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _late_and_second() -> None:
    plain = Tower()
    with torch.no_grad():
        plain_loss = plain(tower_rows(9, rank=0))
    for make in (MAKERS["sgd with momentum"], MAKERS["fused adamw"]):
        _steps(plain, make(plain.parameters()), range(2))
    for stage in STAGES:
        model = Tower()
        engine = Engine.attach(model, speed(stage))
        with torch.no_grad():
            assert torch.equal(model(tower_rows(9, rank=0)), plain_loss)
        first = MAKERS["sgd with momentum"](model.parameters())
        # A backward may come before the optimizer.
        engine.backward(model(tower_rows(0, rank=0)))
        engine.bind_optimizer(first)
        first.step()
        first.zero_grad()
        _steps(model, first, [1])
        second = MAKERS["fused adamw"](model.parameters())
        engine.bind_optimizer(second)
        assert engine.optimizer is second
        # The old one has whole parameters and whole states again.
        assert first.param_groups[0]["params"] == list(model.parameters())
        assert {p.shape for p in first.state} == {
            first.state[p]["momentum_buffer"].shape for p in first.state
        }
        _steps(model, second, range(2))
        assert_same_values(whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7)


def test_optimizers_bound_late_and_one_after_the_other_train_as_in_plain_pytorch() -> None:
    run_ranks(_late_and_second, 2)


def _with_state_before() -> None:
    plain = Tower()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    _steps(plain, plain_optimizer, range(4))
    for stage in STAGES:
        model = Tower()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        _steps(model, optimizer, range(2))
        engine = Engine.attach(model, speed(stage))
        engine.bind_optimizer(optimizer)
        _steps(model, optimizer, [2, 3])
        assert_same_values(whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_has_stepped_before_goes_on_from_its_state() -> None:
    run_ranks(_with_state_before, 2)


def _groups_stay() -> None:
    for stage in STAGES:
        model = Tower()
        engine = Engine.attach(model, speed(stage))
        optimizer = _two_groups(list(model.parameters()))
        groups = list(optimizer.param_groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        engine.bind_optimizer(optimizer)
        _steps(model, optimizer, [0])
        scheduler.step()
        assert all(now is then for now, then in zip(optimizer.param_groups, groups, strict=True))
        assert [group["lr"] for group in optimizer.param_groups] == [0.5e-2, 1.5e-2]


def test_param_groups_are_repointed_in_place_so_that_schedulers_go_on() -> None:
    run_ranks(_groups_stay, 2)


def test_an_optimizer_of_another_model_is_refused() -> None:
    engine = Engine.attach(Tower(), speed(1))
    stranger = torch.optim.SGD(Tower().parameters(), lr=0.1)
    with pytest.raises(EngineError, match="no parameter of the prepared model"):
        engine.bind_optimizer(stranger)


def test_a_step_with_a_closure_is_refused() -> None:
    model = Tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Engine.attach(model, speed(1)).bind_optimizer(optimizer)
    optimizer.step(None)
    with pytest.raises(EngineError, match=r"SGD.step\(closure\) computes gradients after"):
        optimizer.step(lambda: 0.0)


def test_a_model_is_attached_once() -> None:
    model = Tower()
    Engine.attach(model, speed(2))
    with pytest.raises(EngineError, match="an engine already"):
        Engine.attach(model, speed(2))
