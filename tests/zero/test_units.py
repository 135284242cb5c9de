"""Which parameters are gathered together."""

import pytest
import torch
from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.zero.units import plan_units
from tests.engine.toys import KINDS, Tower, toy_model

BLOCKS = {
    "llama": ["model.layers.0", "model.layers.1"],
    "qwen3": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "bert": ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_the_blocks_and_the_root_comes_last(kind: str) -> None:
    model = toy_model(kind)
    units = plan_units(model)
    blocks = [unit.name for unit in units[:-1]]
    assert [name for name in blocks if "embeddings" not in name] == [
        name for name in BLOCKS[kind] if "embeddings" not in name
    ]
    assert units[-1].is_root
    assert units[-1].module is model


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_unit_with_all_its_places(kind: str) -> None:
    model = toy_model(kind)
    entries = [entry for unit in plan_units(model) for entry in unit.entries]
    assert sorted(entry.name for entry in entries) == sorted(n for n, _ in model.named_parameters())
    assert len({id(entry.parameter) for entry in entries}) == len(entries)
    places = sum(len(entry.places) for entry in entries)
    assert places == len(list(model.named_parameters(remove_duplicate=False)))
    for entry in entries:
        for module, key in entry.places:
            assert module._parameters[key] is entry.parameter


def test_a_parameter_tied_between_blocks_goes_to_the_root() -> None:
    model = Tower(num_blocks=3)
    model.blocks[2][0].weight = model.blocks[0][0].weight
    units = plan_units(model)
    root = {entry.name: entry for entry in units[-1].entries}
    assert len(root["blocks.0.0.weight"].places) == 2
    in_blocks = {entry.name for unit in units[:-1] for entry in unit.entries}
    assert {"blocks.0.0.weight", "blocks.2.0.weight"}.isdisjoint(in_blocks)
    assert "blocks.2.0.bias" in in_blocks


def test_a_parameter_tied_within_a_block_stays_there() -> None:
    model = Tower(num_blocks=2, width=5)
    model.blocks[0][2].weight = nn.Parameter(torch.zeros(5, 7))
    model.blocks[0].append(nn.Linear(7, 5))
    model.blocks[0][3].weight = model.blocks[0][2].weight
    first = plan_units(model)[0]
    assert {len(entry.places) for entry in first.entries} == {1, 2}


def test_models_without_declared_blocks_are_divided_at_their_layer_lists() -> None:
    assert [unit.name for unit in plan_units(Tower())] == ["blocks.0", "blocks.1", "blocks.2", ""]
    assert [unit.name for unit in plan_units(nn.Linear(2, 2))] == [""]


def test_named_classes_become_units_and_unknown_ones_are_an_error() -> None:
    units = plan_units(toy_model("llama"), ["LlamaMLP"])
    assert [unit.name for unit in units] == ["model.layers.0.mlp", "model.layers.1.mlp", ""]
    with pytest.raises(ConfigError, match=r"zero.units names \['Nothing'\].*LlamaDecoderLayer"):
        plan_units(toy_model("llama"), ["Nothing", "LlamaMLP"])
