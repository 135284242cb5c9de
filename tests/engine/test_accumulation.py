"""Several backwards to a step, with and without sync between them."""

import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from tests.engine.toys import (
    Tower,
    assert_same_values,
    mean_over_ranks,
    plain_parameters,
    rank_here,
    ranks_here,
    speed,
    tower_rows,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NUM_MICRO_STEPS = 8


def _gradients(engine: Engine) -> dict[str, Tensor]:
    found = {name: engine.get_full_grad(name) for name in engine.parameter_names}
    return {name: value for name, value in found.items() if value is not None}


def _attached(
    stage: int, model: nn.Module | None = None
) -> tuple[nn.Module, Engine, torch.optim.Optimizer]:
    model = Tower() if model is None else model
    engine = Engine.attach(model, speed(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine.bind_optimizer(optimizer)
    return model, engine, optimizer


def _plain_gradients(losses_of: list) -> dict[str, Tensor]:
    """Mean over ranks of the gradients of the sum of losses, in plain PyTorch."""
    model = Tower()
    for loss_of in losses_of:
        loss_of(model).backward()
    return {name: mean_over_ranks(p.grad.clone()) for name, p in model.named_parameters()}


def _one_and_eight_micro_steps() -> None:
    rows = torch.cat([tower_rows(step) for step in range(NUM_MICRO_STEPS)])
    plain = _plain_gradients([lambda model: model(rows)])
    for stage in STAGES:
        model, engine, _ = _attached(stage)
        engine.backward(model(rows))
        assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)
        for syncs_each in (False, True):
            model, engine, _ = _attached(stage)
            for step, micro in enumerate(rows.chunk(NUM_MICRO_STEPS)):
                engine.sync_gradients = syncs_each or step == NUM_MICRO_STEPS - 1
                engine.backward(model(micro) / NUM_MICRO_STEPS)
            assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)


def test_one_and_eight_micro_steps_give_the_gradients_of_plain_pytorch() -> None:
    run_ranks(_one_and_eight_micro_steps, 2)


def _uneven_rows() -> None:
    """Rank 0 has 1 row, rank 1 has 3; losses are sums over all, as with num_items_in_batch."""
    everything = torch.cat([tower_rows(step, rank=0) for step in range(2)])
    mine = everything[:1] if rank_here() == 0 else everything[1:]
    whole = Tower()
    whole(everything).backward()
    plain = {name: p.grad for name, p in whole.named_parameters()}
    for stage in STAGES:
        model, engine, _ = _attached(stage)
        for micro in mine.chunk(3) if rank_here() else [mine[:1], mine[:0], mine[:0]]:
            # A micro-step without rows takes part, with a loss of zero.
            total = model(micro) * len(micro) if len(micro) else 0.0 * model(mine)
            engine.backward(total / 4 * ranks_here())
        assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)


def test_uneven_shares_and_empty_micro_steps_give_the_gradients_of_the_whole_batch() -> None:
    run_ranks(_uneven_rows, 2)


def _several_backwards() -> None:
    first, second = tower_rows(0), tower_rows(1)
    plain = _plain_gradients([lambda model: model(first), lambda model: 3.0 * model(second)])
    for stage in STAGES:
        model, engine, _ = _attached(stage)
        engine.backward(model(first))
        engine.backward(3.0 * model(second))
        assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)

        # Both forwards first: the second gathers anew what the first backward lets go.
        model, engine, _ = _attached(stage)
        losses = [model(first), 3.0 * model(second)]
        for loss in losses:
            engine.backward(loss)
        assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)

        # Twice through one graph.
        model, engine, _ = _attached(stage)
        loss = model(first)
        engine.backward(loss, retain_graph=True)
        engine.backward(loss)
        twice = _plain_gradients([lambda model: 2.0 * model(first)])
        assert_same_values(_gradients(engine), twice, rtol=1e-5, atol=1e-7)


def test_several_backwards_add_up() -> None:
    run_ranks(_several_backwards, 2)


def _step_after_unsynced() -> None:
    plain = Tower()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for rank in range(ranks_here()):
            (plain(tower_rows(step, rank=rank)) / ranks_here()).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for stage in STAGES:
        model, engine, optimizer = _attached(stage)
        engine.sync_gradients = False
        for step in range(3):
            engine.backward(model(tower_rows(step)))
            optimizer.step()
            optimizer.zero_grad()
        assert_same_values(whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7)


def test_a_step_after_a_backward_without_sync_reduces_first() -> None:
    run_ranks(_step_after_unsynced, 2)


def _unsynced_backwards_send_nothing() -> list[int]:
    sent = []
    for stage in (0, 1):
        model, engine, _ = _attached(stage)
        engine.sync_gradients = False
        engine.backward(model(tower_rows(0)))
        before = engine.mesh.journal.total_bytes_sent
        engine.backward(model(tower_rows(1)))
        sent.append(engine.mesh.journal.total_bytes_sent - before)
    return sent


def test_backwards_without_sync_send_nothing_at_stages_0_and_1() -> None:
    assert run_ranks(_unsynced_backwards_send_nothing, 2) == [[0, 0], [0, 0]]


def _clearing() -> None:
    plain = _plain_gradients([lambda model: model(tower_rows(1))])
    for stage in STAGES:
        for clear in ("optimizer", "model"):
            model, engine, optimizer = _attached(stage)
            engine.backward(model(tower_rows(0)))
            optimizer.zero_grad() if clear == "optimizer" else model.zero_grad()
            engine.backward(model(tower_rows(1)))
            assert_same_values(_gradients(engine), plain, rtol=1e-5, atol=1e-7)


def test_cleared_gradients_do_not_come_back() -> None:
    run_ranks(_clearing, 2)


def _subset() -> None:
    def plain_and_ours(stage: int | None) -> dict[str, Tensor]:
        model = Tower()
        engine = None if stage is None else Engine.attach(model, speed(stage))
        # The rest has requires_grad still, and gradients that nobody clears.
        optimizer = torch.optim.SGD(model.outlet.parameters(), lr=0.1)
        if engine is not None:
            engine.bind_optimizer(optimizer)
        for step in range(3):
            model(tower_rows(step, rank=0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return plain_parameters(model) if engine is None else whole_parameters(engine)

    plain = plain_and_ours(None)
    for stage in STAGES:
        assert_same_values(plain_and_ours(stage), plain, rtol=1e-5, atol=1e-7)


def test_an_optimizer_of_some_parameters_clears_those() -> None:
    run_ranks(_subset, 2)


def _tiny(stage: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    engine = Engine.attach(model, speed(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.bind_optimizer(optimizer)
    for step in range(2):
        for micro in range(2):
            engine.sync_gradients = micro == 1
            engine.backward(model(tower_rows(2 * step + micro, width=4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return whole_parameters(engine)


def _a_rank_without_elements() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        for micro in range(2):
            plain(tower_rows(2 * step + micro, width=4)).square().mean().backward()
        mean_over_ranks(plain.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
    for stage in STAGES:
        assert_same_values(_tiny(stage), plain_parameters(plain), rtol=1e-5, atol=1e-7)


def test_ranks_that_hold_no_element_accumulate_too() -> None:
    run_ranks(_a_rank_without_elements, 3)
