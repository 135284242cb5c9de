"""More ranks, replicas, other prefetching; what it sends and what it holds."""

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_speed.engine import Engine
from tests.engine.toys import (
    Run,
    Tower,
    adamw,
    assert_same_values,
    global_batch,
    plain_parameters,
    rank_here,
    share,
    speed,
    tower_rows,
    toy_model,
    train_engine,
    train_plain,
    whole_parameters,
)
from tests.support import run_ranks

STAGES = (0, 1, 2, 3)
NUM_LAYERS = 4


def _model() -> nn.Module:
    # Every buffer is a multiple of what it is divided in, so that the closed forms are exact.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    return toy_model("llama", num_layers=NUM_LAYERS, **sizes)


def _slow(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with steps so small that it does not blow rounding up beyond what is asserted."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def _four_ranks() -> tuple[Run, dict[str, Run]]:
    batches = [global_batch("llama", step) for step in range(8)]
    plain = train_plain(_model(), batches, _slow)
    replicated = {"dp_replicate": 2}
    configs = {
        "stage 0": speed(0),
        "stage 1": speed(1),
        "stage 2": speed(2),
        "stage 3": speed(3),
        "stage 3, kept": speed(3, zero={"regather": False}),
        "stage 3, prefetch 0": speed(3, zero={"prefetch_units": 0}),
        "stage 3, prefetch 2": speed(3, zero={"prefetch_units": 2}),
        "stage 3, prefetch 8": speed(3, zero={"prefetch_units": 8}),
        "stage 3, small units": speed(3, zero={"units": ["LlamaMLP", "LlamaAttention"]}),
        "replicas, stage 0": speed(0, mesh=replicated),
        "replicas, stage 1": speed(1, mesh=replicated),
        "replicas, stage 2": speed(2, mesh=replicated),
        "replicas, stage 3": speed(3, mesh=replicated),
    }
    return plain, {name: train_engine(_model(), batches, c, _slow) for name, c in configs.items()}


def _flag_bytes() -> int:
    """Which parameters were used, and whether any overflowed: a byte each, per step."""
    return 1 + len(list(_model().parameters()))


def test_four_ranks_replicas_and_prefetching_train_as_one_process_with_the_fewest_bytes() -> None:
    everything = 4 * sum(parameter.numel() for parameter in _model().parameters())
    layer = 4 * sum(parameter.numel() for parameter in _model().model.layers[0].parameters())
    for plain, runs in run_ranks(_four_ranks, 4):
        for name, run in runs.items():
            torch.testing.assert_close(run.losses, plain.losses, rtol=1e-6, atol=0.0, msg=name)
            reference = "replicas, stage 1" if "replicas" in name else "stage 1"
            if "small units" in name:
                # Other owners of an element: its sum over ranks starts with another one's share.
                assert_same_values(run.parameters, plain.parameters, rtol=1e-5, atol=1e-6)
            elif "stage 0" not in name:
                assert torch.equal(run.losses, runs[reference].losses), name
                assert_same_values(run.parameters, runs[reference].parameters)
        sent = {name: run.bytes_sent - _flag_bytes() for name, run in runs.items()}
        twice = 2 * everything * 3 // 4
        assert sent["stage 0"] == sent["stage 1"] == sent["stage 2"] == twice
        # The root and the last block stay from the forward to the backward.
        again = (NUM_LAYERS - 1) * layer * 3 // 4
        assert sent["stage 3"] == twice + again < 3 * everything * 3 // 4
        assert sent["stage 3, prefetch 0"] == sent["stage 3, prefetch 2"] == sent["stage 3"]
        assert sent["stage 3, kept"] == twice
        # Over pairs, then this rank's half over the pair of replicas.
        assert sent["replicas, stage 0"] == twice
        assert sent["replicas, stage 2"] == everything + everything // 2
        assert (
            sent["replicas, stage 3"] == sent["replicas, stage 2"] + (NUM_LAYERS - 1) * layer // 2
        )


class Odd(nn.Module):
    """Nothing of it divides evenly: 1, 0, 3, 7 and 25 elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.three = nn.Parameter(torch.randn(3, 1, 1))
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 1)
        self.seven = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 5) -> 0-d loss."""
        x = self.first(x) * self.scale + (x @ self.empty.T).sum() + self.empty.sum()
        return self.second(x.tanh()).square().mean() * self.seven.sum() * self.three.prod()


def _odd_shapes() -> None:
    plain = Odd()
    optimizer = adamw(plain.parameters())
    for step in range(3):
        plain(tower_rows(step, rank=0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in STAGES:
        model = Odd()
        engine = Engine.attach(model, speed(stage))
        optimizer = adamw(model.parameters())
        engine.bind_optimizer(optimizer)
        for step in range(3):
            model(tower_rows(step, rank=0)).backward()
            if step == 1:
                assert engine.get_full_grad("three").shape == (3, 1, 1)
            optimizer.step()
            optimizer.zero_grad()
        assert_same_values(whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7)
        engine.detach()
        assert model.empty.shape == (0, 5)
        assert model.scale.dim() == 0


def test_odd_empty_and_scalar_parameters_train_with_more_ranks_than_rows() -> None:
    run_ranks(_odd_shapes, 7)


def _bytes_alive(model: nn.Module, engine: Engine) -> int:
    """Storages of parameters, masters and gathered buffers, each once."""
    tensors = [each for group in engine.parts.groups for each in (group.master, group.full)]
    with_pieces = [piece for group in engine.parts.groups for piece in group.pieces]
    placeholders = [p for group in engine.parts.groups for p in group._placeholders]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in (*tensors, *with_pieces, *placeholders)
        if each is not None and each.numel()
    }
    assert {type(p).__name__ for p in model.parameters()} == {"ShardedParameter"}
    return sum(storages.values())


def _held_at_stage_3() -> list[tuple[int, int]]:
    found = []
    for compute_dtype in (None, torch.bfloat16):
        model = _model()
        engine = Engine.attach(model, speed(3), compute_dtype=compute_dtype)
        optimizer = adamw(model.parameters())
        engine.bind_optimizer(optimizer)
        model(**share(global_batch("llama", 0))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        parameters = list(model.parameters())
        numel = sum(p.numel() for p in parameters)
        shown = sum(p.element_size() for p in parameters)
        found.append((_bytes_alive(model, engine), 4 * numel // 2 + shown))
        moments = sum(
            s.nbytes for state in optimizer.state.values() for s in state.values() if s.dim()
        )
        assert moments == numel * 2 * 4 // 2
    return found


def test_at_stage_3_a_rank_holds_its_part_and_one_element_a_parameter() -> None:
    for found in run_ranks(_held_at_stage_3, 2):
        for alive, closed_form in found:
            assert alive == closed_form


def _gradient_bytes() -> list[int]:
    held = []
    for stage in STAGES:
        model = _model()
        engine = Engine.attach(model, speed(stage))
        model(**share(global_batch("llama", 0))).loss.backward()
        held.append(sum(g.grad.nbytes for g in engine.parts.groups if g.grad is not None))
        bytes_shown = sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
        assert bool(bytes_shown) == (stage == 0)
    return held


def test_gradients_are_held_in_parts_from_stage_1_on_after_a_backward() -> None:
    everything = 4 * sum(parameter.numel() for parameter in _model().parameters())
    for held in run_ranks(_gradient_bytes, 2):
        assert held == [everything, everything // 2, everything // 2, everything // 2]


def _two_and_a_reference() -> None:
    plain_a, plain_b, frozen = Tower(seed=1), Tower(seed=2), Tower(seed=4)
    optimizers = [adamw(plain_a.parameters()), adamw(plain_b.parameters())]
    for step in range(3):
        _distil(plain_a, plain_b, frozen, optimizers, step)
    for stages in ((3, 3, 3), (3, 1, 3), (0, 2, 0)):
        models = [
            Tower(seed=1),
            Tower(seed=2),
            Tower(seed=4).requires_grad_(requires_grad=False).eval(),
        ]
        engines = [Engine.attach(m, speed(s)) for m, s in zip(models, stages, strict=True)]
        optimizers = [adamw(model.parameters()) for model in models[:2]]
        for engine, optimizer in zip(engines, optimizers, strict=False):
            engine.bind_optimizer(optimizer)
        for step in range(3):
            _distil(*models, optimizers, step)
        for engine, plain in zip(engines, (plain_a, plain_b, frozen), strict=True):
            assert_same_values(
                whole_parameters(engine), plain_parameters(plain), rtol=1e-5, atol=1e-7
            )
        engines[0].detach()
        # The others live on.
        (models[1](tower_rows(0)) + models[2](tower_rows(0))).backward()


def _distil(a: nn.Module, b: nn.Module, frozen: nn.Module, optimizers: list, step: int) -> None:
    """One graph through three models; both trained ones take a step."""
    rows = tower_rows(step, rank=0)
    with torch.no_grad():
        target = frozen(rows)
    loss = (a(rows) - target).square() + (b(rows) - a(rows * 0.5)).square() * frozen(rows)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_two_engines_and_a_frozen_reference_live_in_one_process() -> None:
    run_ranks(_two_and_a_reference, 2)


def _equal_from_the_start() -> None:
    for stage in STAGES:
        engine = Engine.attach(Tower(seed=10 + rank_here()), speed(stage))
        assert_same_values(whole_parameters(engine), plain_parameters(Tower(seed=10)))


def test_attach_gives_every_rank_the_values_of_rank_0() -> None:
    run_ranks(_equal_from_the_start, 3)
