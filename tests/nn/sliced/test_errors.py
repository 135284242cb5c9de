"""Plans that do not fit a model are refused before anything is changed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.integrations.transformers.slice_plan import plan_for
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.journal import Journal
from hf_speed.nn.sliced import Column, Region, SlicePlan, VocabEmbedding, features, slice_model
from hf_speed.shard.slicing import Slicing
from tests.engine.toys import plain_parameters, toy_model

JOURNAL = Journal(enabled=False)
UP = "model.layers.0.mlp.up_proj"


def _slice(model: nn.Module, plan: SlicePlan, **options: Any) -> None:
    slice_model(model, plan, tp=IDENTITY, journal=JOURNAL, **options)


def _llama() -> tuple[nn.Module, SlicePlan]:
    model = toy_model("llama")
    return model, plan_for(model, 1)


def test_a_plan_for_other_ranks_is_refused() -> None:
    model, plan = _llama()
    tp = AxisGroup(size=3, rank=0, group=None, label="tp")
    with pytest.raises(ConfigError, match=r"plan is for 1 ranks, but mesh\.tp=3"):
        slice_model(model, plan, tp=tp, journal=JOURNAL)


def test_a_plan_for_another_model_is_refused() -> None:
    _, plan = _llama()
    with pytest.raises(ConfigError, match=r"names model.embed_tokens, but this model has no such"):
        _slice(toy_model("bert"), plan)
    model = toy_model("llama", intermediate_size=20)
    before = plain_parameters(model)
    with pytest.raises(
        ConfigError, match="has 20 features to divide, but the slice plan is for 24"
    ):
        _slice(model, plan)
    assert type(model.get_submodule("model.embed_tokens")) is nn.Embedding
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


class _Adapter(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_linears_that_do_more_are_refused() -> None:
    model, plan = _llama()
    model.get_submodule("model.layers.0.mlp").up_proj = _Adapter(16, 24, bias=False)
    with pytest.raises(
        ConfigError, match=rf"{UP} cannot be sliced: it is a _Adapter, not a linear"
    ):
        _slice(model, plan)


class _Quantised(torch.Tensor):
    """Values in a form of their own."""


def test_weights_that_are_no_plain_tensors_are_refused() -> None:
    model, plan = _llama()
    linear = model.get_submodule(UP)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(_Quantised))
    with pytest.raises(ConfigError, match=rf"{UP} cannot be sliced: its weight is a _Quantised"):
        _slice(model, plan)


def test_a_model_with_gradients_is_refused() -> None:
    model, plan = _llama()
    model.get_submodule(UP).weight.sum().backward()
    with pytest.raises(ConfigError, match=rf"{UP}.weight has a gradient of its whole"):
        _slice(model, plan)


def test_weights_that_a_whole_module_reads_too_are_refused() -> None:
    model, plan = _llama()
    model.add_module("probe", nn.Linear(16, 61, bias=False))
    model.get_submodule("probe").weight = model.get_submodule("lm_head").weight
    with pytest.raises(ConfigError, match=r"lm_head.weight is also the weight of probe, which"):
        _slice(model, plan)


def test_tied_weights_that_are_divided_in_two_ways_are_refused() -> None:
    model = nn.Module()
    model.words = nn.Embedding(6, 6)
    model.up = nn.Linear(6, 6, bias=False)
    model.up.weight = model.words.weight
    halves = Slicing.fused([features(3, 1), features(3, 1)])
    rules = {"words": VocabEmbedding(features(6, 1)), "up": Column(halves)}
    plan = SlicePlan("Toy", "structure", 1, rules, (Region("up", ("up",), None),))
    with pytest.raises(ConfigError, match=r"is tied to words.weight, which is divided in another"):
        _slice(model, plan)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_embeddings_that_need_all_words_are_refused(options: dict[str, Any]) -> None:
    model = nn.Module()
    model.words = nn.Embedding(6, 6, **options)
    plan = SlicePlan("Toy", "structure", 1, {"words": VocabEmbedding(features(6, 1))}, ())
    name = next(iter(options))
    with pytest.raises(ConfigError, match=rf"words cannot be sliced: it uses {name}, which need"):
        _slice(model, plan)


def test_dividing_rows_needs_one_row_of_blocks() -> None:
    model, plan = _llama()
    with pytest.raises(ConfigError, match=r"tensor.sequence_parallel needs one row of blocks"):
        _slice(model, replace(plan, span=None), sequence_parallel=True)
