"""What users do to models and optimizers, on pipelines and slices as in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.engine import Engine
from hf_speed.errors import ConfigError
from tests.engine.meshes import (
    BOTH,
    PIPE,
    SLICES,
    Mesh,
    adamw_of,
    adapted,
    attach,
    own_rows,
    step_plain,
    toy,
)
from tests.engine.toys import (
    assert_same_values,
    global_batch,
    plain_parameters,
    ranks_here,
    whole_parameters,
)
from tests.support import run_ranks

NUM_STEPS = 3
Maker = Callable[[nn.Module], Optimizer]


def _groups(model: nn.Module) -> Optimizer:
    """By the last layer and the others, each by dims: on each stage some are empty."""
    late = {id(p) for p in model.model.layers[-1].parameters()}
    chosen = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in chosen if id(p) in late and p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in chosen if id(p) in late and p.dim() == 1], "lr": 3e-2},
            {"params": [p for p in chosen if id(p) not in late], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )


MAKERS: dict[str, Maker] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "groups": _groups,
}


def _partly_frozen() -> nn.Module:
    """Norms and the head are trained, between frozen slices."""
    model = toy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "lm_head" in name)
    return model


def _with_unused() -> nn.Module:
    """A trained layer that no forward reaches: weight decay must not touch it."""
    model: Any = toy()
    model.model.layers[3].unused = nn.Linear(3, 3)
    model.model.layers[0].mlp.unused = nn.Linear(2, 2)
    return model


def _clear(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """A way to clear gradients, another at each step."""
    match step % 3:
        case 0:
            optimizer.zero_grad()
        case 1:
            model.zero_grad()
        case _:
            optimizer.zero_grad(set_to_none=False)


def _compare(make: Callable[[], nn.Module], maker: Maker, mesh: Mesh, stage: int) -> None:
    """Train beside plain PyTorch, clip by value, and clear in several ways."""
    ours, theirs = make(), make()
    their_optimizer = maker(theirs)
    optimizer = maker(ours)
    engine = attach(ours, mesh, stage, pipe={"schedule": "zb_h1" if stage == 1 else "zb_v"})
    engine.bind_optimizer(optimizer)
    # Whatever the mesh, the sums are then added in one order; slices add in others.
    pieces = 1 if mesh.pp == 1 else ranks_here() // mesh.tp
    exact = mesh.tp == 1 and ranks_here() == mesh.pp
    # Adam makes whole steps of gradients that are all rounding.
    rtol, atol = (0.0, 0.0) if exact else (1e-4, 1e-4)
    for step in range(NUM_STEPS):
        batch = global_batch("llama", step)
        expected = step_plain(theirs, batch, pieces=pieces)
        loss = ours(**own_rows(engine, batch)).loss
        engine.backward(loss)
        if ranks_here() == mesh.pp * mesh.tp:
            torch.testing.assert_close(loss.detach(), expected, rtol=rtol, atol=0.0)
        engine.clip_grad_value_(1e-2)
        nn.utils.clip_grad_value_(theirs.parameters(), 1e-2)
        for name, parameter in theirs.named_parameters():
            found = engine.get_full_grad(name)
            assert (found is None) == (parameter.grad is None), name
            if found is not None:
                torch.testing.assert_close(found, parameter.grad, rtol=rtol, atol=atol)
        optimizer.step()
        their_optimizer.step()
        _clear(ours, optimizer, step)
        _clear(theirs, their_optimizer, step)
    assert_same_values(whole_parameters(engine), plain_parameters(theirs), rtol=rtol, atol=atol)
    engine.detach()
    assert_same_values(plain_parameters(ours), plain_parameters(theirs), rtol=rtol, atol=atol)
    _assert_same_states(ours, optimizer, theirs, their_optimizer, rtol=rtol, atol=atol)


def _assert_same_states(
    ours: nn.Module,
    optimizer: Optimizer,
    theirs: nn.Module,
    their_optimizer: Optimizer,
    **tolerance: float,
) -> None:
    """The optimizer has its whole parameters and states again."""
    pairs = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    their_held = [p for group in their_optimizer.param_groups for p in group["params"]]
    assert [id(pairs[p]) for p in held] == [id(p) for p in their_held]
    states = {pairs[p]: state for p, state in optimizer.state.items() if state}
    expected = {p: state for p, state in their_optimizer.state.items() if state}
    assert states.keys() == expected.keys()
    for parameter, state in expected.items():
        assert states[parameter].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(states[parameter][key], value, **tolerance)


def _on_meshes() -> None:
    cases = [
        (lambda: adapted(2, 4), adamw_of, PIPE, 1),
        (lambda: adapted(2, 4), adamw_of, PIPE, 3),
        (lambda: adapted(0, 1), adamw_of, PIPE, 3),
        (_partly_frozen, adamw_of, PIPE, 1),
        (_partly_frozen, adamw_of, SLICES, 3),
        (_with_unused, MAKERS["sgd"], PIPE, 1),
        (_with_unused, MAKERS["sgd"], PIPE, 3),
        *((toy, maker, PIPE, 1) for maker in MAKERS.values()),
        *((toy, maker, SLICES, 3) for maker in MAKERS.values()),
    ]
    if ranks_here() == 4:
        cases = [
            (lambda: adapted(2, 4), adamw_of, PIPE, 3),
            (_partly_frozen, _groups, BOTH, 1),
            (_with_unused, MAKERS["sgd"], Mesh(2, 1, replicas=2), 3),
            (toy, MAKERS["groups"], PIPE, 3),
        ]
    for number, (make, maker, mesh, stage) in enumerate(cases):
        try:
            _compare(make, maker, mesh, stage)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from error


@pytest.mark.parametrize("world_size", [2, 4])
def test_frozen_unused_and_grouped_parameters_train_as_in_plain_pytorch(world_size: int) -> None:
    run_ranks(_on_meshes, world_size)


def _norms() -> None:
    """Heads that several slices have, norms of heads, a tied weight: each counts once."""
    shared = {"num_key_value_heads": 1}
    cases = [("llama", shared, SLICES, 1), ("qwen3", shared, SLICES, 3), ("gpt2", {}, PIPE, 1)]
    if ranks_here() == 4:
        cases = [("qwen3", shared, BOTH, 3), ("gpt2", {}, BOTH, 1)]
    for kind, overrides, mesh, stage in cases:
        ours, theirs = toy(kind, **overrides), toy(kind, **overrides)
        engine = attach(ours, mesh, stage)
        batch = global_batch(kind, 0)
        engine.backward(ours(**batch).loss)
        theirs(**batch).loss.backward()
        gradients = [parameter.grad for parameter in theirs.parameters()]
        for norm_type in (2.0, 1.0, float("inf")):
            expected = nn.utils.get_total_norm(gradients, norm_type)
            norm = engine.clip_grad_norm_(1e9, norm_type)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
        engine.clip_grad_norm_(0.01)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        for name, parameter in theirs.named_parameters():
            found = engine.get_full_grad(name)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-7)
        engine.detach()


@pytest.mark.parametrize("world_size", [2, 4])
def test_norms_count_what_several_ranks_hold_once(world_size: int) -> None:
    run_ranks(_norms, world_size)


class Custom(nn.Module):
    """A model that names no blocks of its own, and does something between its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inlet = nn.Linear(5, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.outlet = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 5) -> 0-d loss."""
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.outlet(x).square().mean()


def _units() -> None:
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    plain, model = Custom(), Custom()
    engine = attach(model, PIPE, 3, pipe={"schedule": "1f1b"})
    own = [name for name in ("0", "1", "2", "3") if f"layers.{name}" in _unit_names(engine)]
    assert own == (["0", "1"] if engine.mesh.coordinates["pp"] == 0 else ["2", "3"])
    loss = model(own_rows(engine, {"x": rows})["x"])
    engine.backward(loss)
    for part in rows.chunk(4):
        (plain(part) / 4).backward()
    for name, parameter in plain.named_parameters():
        found = engine.get_full_grad(name)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-7)
    engine.detach()
    # Of classes that some stage lacks.
    engine = attach(toy(), PIPE, 3, zero={"units": ["Embedding", "LlamaMLP"]})
    assert ("model.embed_tokens" in _unit_names(engine)) == (engine.mesh.coordinates["pp"] == 0)
    assert len(_unit_names(engine)) == 4 - engine.mesh.coordinates["pp"]
    engine.detach()
    with pytest.raises(ConfigError, match=r"zero\.units names \['Nothing'\]"):
        attach(toy(), PIPE, 3, zero={"units": ["Nothing"]})


def _unit_names(engine: Engine) -> list[str]:
    return [unit.name for unit in engine.parts.units]


def test_units_are_those_of_the_whole_model_on_every_stage() -> None:
    run_ranks(_units, 4)
