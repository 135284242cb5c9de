"""What `parameter.grad` shows where the optimizer's parts hold the gradient."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_speed.engine import Engine, engine_of
from hf_speed.errors import EngineError, ShardedParameterError
from hf_speed.zero.stand_ins import ShardedGradient
from tests.engine.toys import (
    Tower,
    assert_same_values,
    mean_over_ranks,
    plain_parameters,
    speed,
    tower_rows,
    whole_parameters,
)
from tests.support import run_ranks

NAMES_THE_WAY = r"needs the gradient of .* Clip with accelerator.clip_grad_norm_ .*get_full_grad"


def _after_a_backward(stage: int, dtype: torch.dtype | None = None) -> tuple[nn.Module, Engine]:
    model = Tower()
    engine = Engine.attach(model, speed(stage), compute_dtype=dtype)
    model(tower_rows(0).to(dtype or torch.float32)).float().backward()
    return model, engine


def _reads(model: nn.Module) -> list[Callable[[], object]]:
    bias = model.outlet.bias
    return [
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda: nn.utils.get_total_norm([each.grad for each in model.parameters()]),
        lambda: torch._foreach_norm([each.grad for each in model.parameters()]),
        bias.grad.norm,
        lambda: bias.grad.float().norm(),
        lambda: bias.grad.mul_(0.5),
        lambda: bias.grad + torch.ones(1),
        lambda: copy.deepcopy(bias.grad),
    ]


def _read_everywhere() -> None:
    for stage, dtype in ((1, None), (2, None), (3, None), (0, torch.bfloat16)):
        model, engine = _after_a_backward(stage, dtype)
        assert "outlet.bias, shape=(1,)" in repr(model.outlet.bias.grad)
        for read in _reads(model):
            with pytest.raises(ShardedParameterError, match=NAMES_THE_WAY):
                read()
        for parameter in model.parameters():
            gradient = parameter.grad
            assert isinstance(gradient, ShardedGradient)
            assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
            assert gradient.untyped_storage().nbytes() == 0
        engine.detach()
        assert all(parameter.grad is None for parameter in model.parameters())
    model, _ = _after_a_backward(0)
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)) > 1e-3
    torch.testing.assert_close(
        nn.utils.get_total_norm([each.grad for each in model.parameters()]), torch.tensor(1e-3)
    )


def test_clipping_with_torch_raises_where_it_would_find_no_gradient() -> None:
    run_ranks(_read_everywhere, 2)


def _clear_all(model: nn.Module, step: int) -> None:
    match step % 4:
        case 0:
            for parameter in model.parameters():
                parameter.grad = None
        case 1:
            for child in model.children():
                child.zero_grad()
        case 2:
            model.zero_grad(set_to_none=False)
        case _:
            model.zero_grad()


def _clear_some(model: nn.Module) -> None:
    """As self-distillation does with its last layer: no step for these."""
    for parameter in model.blocks[1].parameters():
        parameter.grad = None


def _cleared_loop(stage: int | None, model: nn.Module, *, accumulate: bool) -> None:
    engine = None if stage is None else Engine.attach(model, speed(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if engine is not None:
        engine.bind_optimizer(optimizer)
    for step in range(5):
        for micro in range(2):
            if engine is not None:
                engine.sync_gradients = micro == 1 or not accumulate
            model(tower_rows(2 * step + micro)).backward()
            if micro == 0 and step == 3:
                _clear_all(model, 0)
        if step == 2:
            _clear_some(model)
        if engine is None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    mean_over_ranks(parameter.grad)
        optimizer.step()
        _clear_all(model, step)


def _cleared_as_in_plain_pytorch() -> None:
    plain = Tower()
    _cleared_loop(None, plain, accumulate=False)
    for stage in range(4):
        for accumulate in (False, True):
            model = Tower()
            _cleared_loop(stage, model, accumulate=accumulate)
            engine = engine_of(model)
            assert engine is not None
            whole = whole_parameters(engine)
            assert_same_values(whole, plain_parameters(plain), rtol=1e-5, atol=1e-7)


def test_gradients_cleared_on_parameters_are_cleared() -> None:
    run_ranks(_cleared_as_in_plain_pytorch, 2)


def _unannounced() -> None:
    """A backward that no module's output announces, after one that left stand-ins."""
    for stage in (1, 2):
        model, engine = _after_a_backward(stage)
        before = engine.get_full_grad("outlet.bias")
        (3.0 * model.outlet.bias).sum().backward()
        after = engine.get_full_grad("outlet.bias")
        assert isinstance(before, Tensor)
        assert isinstance(after, Tensor)
        torch.testing.assert_close(after, before + 3.0)
        assert model.cpu() is model
        model(tower_rows(1)).backward()


def test_a_backward_that_no_output_announces_adds_to_what_is_there() -> None:
    run_ranks(_unannounced, 2)


def _set() -> None:
    """Cleared, then computed again without an announcement; or put there by hand."""
    model, engine = _after_a_backward(1)
    for parameter in model.parameters():
        parameter.grad = None
    (3.0 * model.outlet.bias).sum().backward(create_graph=True)
    gradient = engine.get_full_grad("outlet.bias")
    assert isinstance(gradient, Tensor)
    assert gradient.tolist() == [3.0]
    assert engine.get_full_grad("inlet.weight") is None
    model.outlet.bias.grad = torch.ones(1)
    with pytest.raises(EngineError, match=r"outlet\.bias was set to a tensor.*set_full_grad"):
        engine.clip_grad_norm_(1.0)


def test_a_gradient_set_by_hand_is_refused_and_a_new_one_after_clearing_counts() -> None:
    run_ranks(_set, 2)


def _moved() -> None:
    model, _ = _after_a_backward(2)
    model.half()
    model(tower_rows(1).half())


def test_a_model_moved_after_a_backward_is_still_caught_by_the_engine() -> None:
    with pytest.raises(AssertionError, match="was moved or resized"):
        run_ranks(_moved, 2)


@pytest.mark.gpu
def test_stand_ins_work_on_a_gpu() -> None:
    model = Tower().to("cuda")
    engine = Engine.attach(model, speed(1), compute_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.bind_optimizer(optimizer)
    for step in range(2):
        model(tower_rows(step).to("cuda", torch.bfloat16)).backward()
        with pytest.raises(ShardedParameterError, match=NAMES_THE_WAY):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert float(engine.clip_grad_norm_(1.0)) > 0
        optimizer.step()
        for parameter in model.parameters():
            assert isinstance(parameter.grad, ShardedGradient)
            assert parameter.grad.device == parameter.device
            parameter.grad = None
    (3.0 * model.outlet.bias).sum().backward()
    gradient = engine.get_full_grad("outlet.bias")
    assert isinstance(gradient, Tensor)
    assert gradient.tolist() == [3.0]
