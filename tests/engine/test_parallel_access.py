"""Whole values by name, `gathered`, and engines one after the other, on pipelines and slices."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hf_speed.engine import engine_of, gathered
from hf_speed.errors import EngineError
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
    rank_here,
    ranks_here,
    whole_parameters,
)
from tests.support import run_ranks

NAMES = {
    "model.embed_tokens.weight": "exp_avg",
    "model.layers.0.input_layernorm.weight": "exp_avg_sq",
    "model.layers.3.mlp.down_proj.weight": "exp_avg",
    "lm_head.weight": "exp_avg_sq",
}
"""On the first and the last stage, sliced in both ways and not at all."""


def _by_name() -> None:
    """Write a parameter, a moment and a gradient; read them; the next step goes by them."""
    for mesh, stage in ((PIPE, 1), (PIPE, 3), (SLICES, 1), (SLICES, 3)):
        ours, theirs = toy(), toy()
        optimizer, their_optimizer = adamw_of(ours), adamw_of(theirs)
        engine = attach(ours, mesh, stage)
        engine.bind_optimizer(optimizer)
        for step in range(2):
            batch = global_batch("llama", step)
            engine.backward(ours(**own_rows(engine, batch)).loss)
            step_plain(theirs, batch, pieces=2)
            if step == 1:
                for name, key in NAMES.items():
                    parameter = theirs.get_parameter(name)
                    state = their_optimizer.state[parameter]
                    values = torch.arange(parameter.numel()).view(parameter.shape) / 1e3
                    engine.set_full_parameter(name, values)
                    engine.set_full_optimizer_state(name, key, values.square())
                    engine.set_full_grad(name, values / 3)
                    assert torch.equal(engine.get_full_parameter(name), values)
                    assert torch.equal(engine.get_full_optimizer_state(name, key), values.square())
                    assert torch.equal(engine.get_full_grad(name), values / 3)
                    parameter.data.copy_(values)
                    state[key].copy_(values.square())
                    parameter.grad = values / 3
            optimizer.step()
            their_optimizer.step()
            optimizer.zero_grad()
            their_optimizer.zero_grad()
        for name, value in theirs.named_parameters():
            found = engine.get_full_parameter(name)
            torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-4)
        with pytest.raises(EngineError, match=r"AdamW keeps no 'sum' .*exp_avg"):
            engine.get_full_optimizer_state("lm_head.weight", "sum")
        with pytest.raises(EngineError, match=r"Did you mean 'lm_head\.weight'"):
            engine.get_full_parameter("lm_head.weights")
        engine.detach()


def test_whole_values_are_read_and_written_by_name_on_every_rank() -> None:
    run_ranks(_by_name, 2)


def _nothing_trained_here() -> None:
    """The first stage has nothing to train, so its optimizer nothing to know."""
    model = adapted(2, 4)
    optimizer = adamw_of(model)
    engine = attach(model, PIPE, 1)
    engine.bind_optimizer(optimizer)
    engine.backward(model(**global_batch("llama", 0)).loss)
    assert engine.get_full_grad("model.layers.0.mlp.up_proj.weight") is None
    optimizer.step()
    name = "model.layers.3.self_attn.q_proj.up.weight"
    assert engine.get_full_optimizer_state(name, "exp_avg").shape == (16, 2)
    with pytest.raises(EngineError, match=r"AdamW keeps no 'sum' .*exp_avg"):
        engine.get_full_optimizer_state(name, "sum")
    with pytest.raises(EngineError, match=r"is frozen \(requires_grad=False\)"):
        engine.set_full_grad("lm_head.weight", torch.zeros(61, 16))
    engine.detach()


def test_a_stage_without_trained_parameters_answers_as_the_others_do() -> None:
    run_ranks(_nothing_trained_here, 2)


def _in_16_bit() -> None:
    """A model that comes in bf16, with fp32 masters: whole states keep the masters' precision."""
    for mesh in (PIPE, SLICES):
        model = toy().to(torch.bfloat16)
        optimizer = adamw_of(model)
        engine = attach(model, mesh, 3, dtype=torch.bfloat16)
        engine.bind_optimizer(optimizer)
        for step in range(2):
            engine.backward(model(**global_batch("llama", step)).loss)
            optimizer.step()
            optimizer.zero_grad()
        moment = engine.get_full_optimizer_state("lm_head.weight", "exp_avg")
        assert not torch.equal(moment, moment.bfloat16().float())
        engine.detach()
        parameter = model.get_parameter("lm_head.weight")
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


def test_masters_of_another_dtype_leave_whole_states_on_every_rank() -> None:
    run_ranks(_in_16_bit, 2)


def _gathered() -> None:
    for mesh, stage in ((PIPE, 3), (SLICES, 3), (SLICES, 1), (BOTH, 1))[:: ranks_here() // 2]:
        if mesh.pp * mesh.tp > ranks_here():
            continue
        model = toy()
        start = plain_parameters(model)
        engine = attach(model, mesh, stage)
        elsewhere = {name for name in start if name not in dict(model.named_parameters())}
        assert bool(elsewhere) == (mesh.pp > 1)
        with gathered(model, list(NAMES)):
            for name in NAMES:
                if name not in elsewhere and mesh.tp == 1:
                    assert torch.equal(model.get_parameter(name), start[name])
        with gathered(model, modify=True), torch.no_grad():
            # What several ranks hold is as the first of them has left it.
            for parameter in model.parameters():
                parameter.fill_(2.0 if rank_here() % (mesh.tp or 1) == 0 else 3.0)
        for name, value in engine.full_parameters():
            if "norm" in name or mesh.tp == 1:
                assert torch.equal(value, torch.full_like(value, 2.0)), name
            else:
                assert set(value.unique().tolist()) == {2.0, 3.0}, name
        engine.detach()


@pytest.mark.parametrize("world_size", [2, 4])
def test_gathered_shows_a_ranks_part_and_keeps_changes(world_size: int) -> None:
    run_ranks(_gathered, world_size)


def _copies() -> None:
    """Of a tied weight on two stages, and of heads on two slices."""
    heads = "model.layers.1.self_attn.k_proj.weight"
    for kind, mesh, name, overrides in (
        ("gpt2", PIPE, "transformer.wte.weight", {}),
        ("llama", SLICES, heads, {"num_key_value_heads": 1}),
    ):
        model = toy(kind, **overrides)
        engine = attach(model, mesh, 1)
        with gathered(model, modify=True), torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(2.0 + rank_here())
        assert engine.get_full_parameter(name).unique().tolist() == [2.0]
        here = dict(model.named_parameters(remove_duplicate=False)).get(name)
        assert here is None or here.unique().tolist() == [2.0]
        engine.detach()


def test_copies_of_a_parameter_take_the_first_ones_changes() -> None:
    run_ranks(_copies, 2)


def _freeze(model: Any) -> None:
    model.model.layers[0].requires_grad_(requires_grad=False)


def _fail_on_rank_1(model: Any) -> None:  # noqa: ARG001
    if rank_here() == 1:
        raise ValueError("of this rank alone")


def _change(model: Any, change: Callable[[Any], None]) -> None:
    with gathered(model, modify=True):
        change(model)


def _refused() -> None:
    for mesh, stage in ((PIPE, 1), (PIPE, 3), (SLICES, 1)):
        model: Any = toy()
        engine = attach(model, mesh, stage)
        with pytest.raises(EngineError, match=r"resize_token_embeddings\(\).*mesh\.pp=\d.*detach"):
            _change(model, lambda model: model.resize_token_embeddings(70))
        with pytest.raises(EngineError, match=r"frozen parameters, but with mesh\.pp.*detach\(\)"):
            _change(model, _freeze)
        model.requires_grad_()
        with pytest.raises(
            EngineError, match=r"state_dict\(\).*mesh\.pp=\d.*get_state_dict\(model\)"
        ):
            model.state_dict()
        copied = copy.deepcopy(model) if stage == 1 else None
        if copied is not None and mesh.pp > 1:
            with pytest.raises(EngineError, match=r"copy of what one of 2 pipeline ranks has"):
                copied(**global_batch("llama", 0))
        if copied is not None:
            with pytest.raises(EngineError, match=r"state_dict\(\) would give what this rank has"):
                copied.state_dict()
        mine = ValueError if rank_here() == 1 else EngineError
        with pytest.raises(mine, match="of this rank alone"):
            _change(model, _fail_on_rank_1)
        # The engine goes on.
        engine.backward(model(**global_batch("llama", 0)).loss)
        engine.detach()
        model.resize_token_embeddings(70, mean_resizing=False)
        assert model.lm_head.weight.shape == (70, 16)
        assert len(model.state_dict()) == len(toy().state_dict())
        assert engine_of(model) is None


def test_what_would_change_other_ranks_parts_is_refused_on_all() -> None:
    run_ranks(_refused, 2)


def _from_mesh_to_mesh(meshes: Sequence[tuple[Mesh, int]]) -> None:
    """One model and one optimizer, detached and attached again on other meshes."""
    ours, theirs = toy("qwen3"), toy("qwen3")
    optimizer, their_optimizer = adamw_of(ours), adamw_of(theirs)
    for step, (mesh, stage) in enumerate(meshes):
        batch = global_batch("qwen3", step)
        step_plain(theirs, batch, pieces=2)
        their_optimizer.step()
        their_optimizer.zero_grad()
        engine = attach(ours, mesh, stage)
        engine.bind_optimizer(optimizer)
        engine.backward(ours(**own_rows(engine, batch)).loss)
        optimizer.step()
        optimizer.zero_grad()
        engine.detach()
        # Adam makes steps of gradients that are all rounding.
        assert_same_values(plain_parameters(ours), plain_parameters(theirs), rtol=1e-4, atol=1e-4)


def test_a_model_goes_from_mesh_to_mesh_in_one_process() -> None:
    run_ranks(_from_mesh_to_mesh, 2, [(PIPE, 3), (SLICES, 1), (Mesh(), 3), (PIPE, 0), (SLICES, 2)])


def _two_engines() -> None:
    """A reference model on stages of its own, asked between the steps of a trained one."""
    for mesh, other in ((PIPE, PIPE), (PIPE, SLICES), (SLICES, Mesh())):
        model, reference = toy(), toy(hidden_size=32)
        reference.requires_grad_(requires_grad=False).eval()
        plain, plain_reference = toy(), toy(hidden_size=32).eval()
        optimizer, plain_optimizer = adamw_of(model), adamw_of(plain)
        engine, frozen = attach(model, mesh, 1), attach(reference, other, 3)
        engine.bind_optimizer(optimizer)
        for step in range(2):
            batch = global_batch("llama", step)
            with torch.no_grad():
                expected = plain_reference(**batch)
                found = reference(**own_rows(frozen, batch))
            logits = found.logits
            theirs = own_rows(frozen, {"logits": expected.logits})["logits"]
            torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)
            loss = model(**own_rows(engine, batch)).loss
            step_plain(plain, batch, pieces=2)
            with torch.no_grad():
                # Between a forward and its backward too.
                reference(**own_rows(frozen, batch))
            engine.backward(loss)
            for each in (optimizer, plain_optimizer):
                each.step()
                each.zero_grad()
        assert_same_values(whole_parameters(engine), plain_parameters(plain), rtol=1e-4, atol=1e-4)
        engine.detach()
        frozen.detach()
        assert_same_values(plain_parameters(reference), plain_parameters(plain_reference))


def test_a_trained_and_a_frozen_engine_live_in_one_process() -> None:
    run_ranks(_two_engines, 2)
