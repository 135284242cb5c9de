"""An optimizer goes on from what it, or another one, has left in a checkpoint."""

import tempfile
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.engine import Engine
from hf_speed.errors import CheckpointError
from hf_speed.optim import Lion
from tests.engine.toys import Tower, assert_same_values, speed, tower_rows, whole_parameters
from tests.support import run_ranks

Maker = Callable[[Iterable[nn.Parameter]], Optimizer]

HOST = {"offload": {"update": "fused", "optimizer": "host", "gradients": "host"}}


class Rows(torch.optim.SGD):
    """Elementwise, but keeps something of another shape beside."""

    def step(self, closure: Any = None) -> Any:
        """As SGD."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("rows", torch.ones(3))
        return super().step(closure)


def _run(stage: int, make: Maker, **sections: Any) -> tuple[Tower, Engine]:
    model = Tower()
    engine = Engine.attach(model, speed(stage, **sections))
    engine.bind_optimizer(make(model.parameters()))
    return model, engine


def _steps(model: Tower, engine: Engine, steps: range) -> dict[str, Tensor]:
    for step in steps:
        engine.backward(model(tower_rows(step)))
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    return whole_parameters(engine)


def _moved(
    there: tuple[int, Maker, dict[str, Any]], here: tuple[int, Maker, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Engine, str]:
    """Three steps, a save, two steps; and the same two after a load into another run."""
    with tempfile.TemporaryDirectory() as mine:
        directory = _shared(mine)
        model, engine = _run(there[0], there[1], **there[2])
        _steps(model, engine, range(3))
        engine.save(directory)
        weights = whole_parameters(engine)
        went_on = _steps(model, engine, range(3, 5))
        model, engine = _run(here[0], here[1], **here[2])
        _steps(model, engine, range(7, 9))
        engine.load_full_parameters(weights.get)
        with patch("hf_speed.engine.optimizer_state._log.warning") as warning:
            engine.load(directory)
        torch.distributed.barrier()
    text = "\n".join(call.args[0] % call.args[1:] for call in warning.call_args_list)
    return went_on, _steps(model, engine, range(3, 5)), engine, text


def _shared(mine: str) -> str:
    found = [mine]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def _adam(**settings: Any) -> Maker:
    return lambda parameters: torch.optim.Adam(parameters, lr=1e-2, **settings)


def _same_class() -> None:
    cases: list[tuple[int, Maker]] = [
        (2, lambda parameters: torch.optim.NAdam(parameters, lr=1e-2)),
        (1, lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)),
        (3, _adam(amsgrad=True)),
        # Keeps rows and columns of matrices, which are not of their shape.
        (0, lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2)),
    ]
    for stage, make in cases:
        went_on, again, _, text = _moved((stage, make, {}), (stage, make, {}))
        assert_same_values(again, went_on)
        assert text == ""


def test_optimizers_go_on_bitwise_with_counters_and_states_of_any_shape() -> None:
    run_ranks(_same_class, 2)


def _other_class() -> None:
    adam, decay = _adam(), {"weight_decay": 0.0}
    adamw: Maker = lambda parameters: torch.optim.AdamW(parameters, lr=7.0, **decay)  # noqa: E731
    for there, here in (((2, adam, {}), (2, adamw, {})), ((1, adam, HOST), (1, adamw, HOST))):
        went_on, again, engine, text = _moved(there, here)
        # Without weight decay the two are one rule; the learning rate is the checkpoint's.
        assert_same_values(again, went_on)
        assert engine.optimizer.param_groups[0]["lr"] == 1e-2
        assert engine.optimizer.param_groups[0]["decoupled_weight_decay"] is True
        assert "AdamW goes on from the Adam state in" in text
        assert "kept exp_avg, exp_avg_sq, step; begun anew nothing; dropped nothing" in text
        assert "of this run, not of the checkpoint: decoupled_weight_decay=True (False" in text
    _, _, engine, text = _moved((2, adam, {}), (1, torch.optim.NAdam, {}))
    assert "made from the number of steps mu_product" in text
    products = [state["mu_product"] for state in engine.optimizer.state.values()]
    assert all(each.dim() == 0 and 0.0 < float(each) < 0.5**5 for each in products)
    _, _, engine, text = _moved((3, adam, {}), (3, _adam(amsgrad=True), {}))
    assert text == ""
    assert engine.optimizer.param_groups[0]["amsgrad"] is False
    made: Maker = lambda p: torch.optim.AdamW(p, amsgrad=True)  # noqa: E731
    _, _, engine, text = _moved((3, adam, {}), (3, made, {}))
    assert "begun anew max_exp_avg_sq" in text
    assert all("max_exp_avg_sq" in state for state in engine.optimizer.state.values())
    _, _, engine, text = _moved((2, adam, {}), (2, lambda p: Lion(p, lr=1e-4), {}))
    assert "kept exp_avg, step; begun anew nothing; dropped exp_avg_sq" in text
    assert "lr=0.0001 (0.01 there)" in text
    assert engine.optimizer.param_groups[0]["lr"] == 1e-4
    assert all(float(state["step"]) == 5.0 for state in engine.optimizer.state.values())


def test_another_optimizer_goes_on_with_what_means_the_same_and_says_so() -> None:
    run_ranks(_other_class, 2)


def _forgotten() -> None:
    with tempfile.TemporaryDirectory() as mine:
        directory = _shared(mine)
        for sections in ({}, HOST):
            model, engine = _run(2, _adam(), **sections)
            engine.save(directory)
            first = _steps(model, engine, range(2))
            weights = whole_parameters(_run(2, _adam())[1])
            engine.load_full_parameters(weights.get)
            engine.load(directory)
            assert_same_values(_steps(model, engine, range(2)), first)
            torch.distributed.barrier()


def test_a_checkpoint_from_before_the_first_step_brings_that_back() -> None:
    run_ranks(_forgotten, 2)


def _refused() -> None:
    make: Maker = lambda parameters: Rows(parameters, lr=1e-2)  # noqa: E731
    with tempfile.TemporaryDirectory() as mine:
        directory = _shared(mine)
        model, engine = _run(2, make)
        _steps(model, engine, range(1))
        with pytest.raises(CheckpointError, match=r"Rows keeps rows of shape \(3,\) for .*stage=0"):
            engine.save(directory)
        model, engine = _run(0, make)
        _steps(model, engine, range(1))
        engine.save(directory)
        _, sharded = _run(2, make)
        with pytest.raises(CheckpointError, match=r"has rows of .* in a shape of its own, \(3,\)"):
            sharded.load(directory)
        two: Maker = lambda parameters: Rows(  # noqa: E731
            [{"params": [each]} for each in parameters], lr=1e-2
        )
        with pytest.raises(CheckpointError, match="has 1 optimizer groups, this run has 16"):
            _run(0, two)[1].load(directory)
        torch.distributed.barrier()


def test_states_that_parts_cannot_hold_and_other_groups_are_refused() -> None:
    run_ranks(_refused, 2)
