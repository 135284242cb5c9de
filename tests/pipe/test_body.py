"""Where models can be cut: found from their structure, checked when they run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_speed.errors import ConfigError
from hf_speed.pipe.body import find_body
from hf_speed.pipe.stage import split_model
from tests.engine.toys import toy_model


@pytest.mark.parametrize(
    ("kind", "layers", "before", "after"),
    [
        ("llama", "model.layers", ["model.embed_tokens"], ["model.norm", "lm_head"]),
        ("qwen3", "model.layers", ["model.embed_tokens"], ["model.norm", "lm_head"]),
        (
            "gpt2",
            "transformer.h",
            ["transformer.wte", "transformer.wpe"],
            ["transformer.ln_f", "lm_head"],
        ),
        ("bert", "bert.encoder.layer", ["bert.embeddings"], ["cls"]),
    ],
)
def test_layers_and_what_is_around_them_are_found(
    kind: str, layers: str, before: list[str], after: list[str]
) -> None:
    body = find_body(toy_model(kind))
    assert body.path == layers
    assert [place.path for place in body.layers] == [f"{layers}.0", f"{layers}.1"]
    assert [place.path for place in body.before] == before
    assert [place.path for place in body.after] == after


def test_dropout_acts_on_one_stage_wherever_it_is_defined() -> None:
    model = toy_model("gpt2", embd_pdrop=0.5).train()
    body = find_body(model)
    assert [place.path for place in body.dropout] == ["transformer.drop"]
    tokens = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    drawn = []
    for local, received in ((0, None), (1, torch.ones(1, 4, 16))):
        split = split_model(model, body, (1, 1), [local])
        before = torch.get_rng_state()
        split.runner(split.stages[local], tokens, received)
        drawn.append(not torch.equal(before, torch.get_rng_state()))
        split.undo()
    assert drawn == [True, False]


def test_tables_cost_nothing_and_a_head_what_it_multiplies() -> None:
    model = toy_model("llama")
    costs = find_body(model).costs()
    assert costs.before == 0.0
    assert costs.after == 61 * 16 + 16
    layer = model.get_submodule("model.layers.0")
    assert costs.layers == (sum(p.numel() for p in layer.parameters()),) * 2


class Chain(nn.Module):
    """Layers of two kinds, of which the larger list is the one to cut."""

    def __init__(self, *, late: bool = False, direct: bool = False) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.late = late
        if direct:
            self.scale = nn.Parameter(torch.ones(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., 4) -> (..., 4)."""
        if not self.late:
            hidden_states = self.norm(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states) if self.late else hidden_states


def test_the_largest_list_is_cut_and_a_parameter_of_no_stage_is_refused() -> None:
    body = find_body(Chain())
    assert body.path == "layers"
    assert [place.path for place in body.before] == ["small", "norm"]
    with pytest.raises(
        ConfigError, match=r"cannot cut Chain: scale is a parameter of Chain itself"
    ):
        find_body(Chain(direct=True))


def _run(model: nn.Module, local: int, received: Tensor | None) -> Any:
    split = split_model(model, find_body(model), (2, 2), [local])
    return split.runner(split.stages[local], {"hidden_states": torch.ones(1, 4)}, received), split


def test_stages_chained_by_hand_are_the_whole_model_and_undo_gives_it_back() -> None:
    torch.manual_seed(0)
    whole = Chain()
    expected = whole(torch.ones(1, 4))
    hidden, first = _run(whole, 0, None)
    assert [name for name, _ in whole.named_parameters() if "layers" in name] == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
    ]
    first.undo()
    output, last = _run(whole, 1, hidden.detach())
    torch.testing.assert_close(output, expected, rtol=0.0, atol=0.0)
    last.undo()
    torch.testing.assert_close(whole(torch.ones(1, 4)), expected, rtol=0.0, atol=0.0)


def test_what_runs_after_the_layers_but_is_defined_before_them_is_an_error_when_it_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"norm is defined before the layers, but runs after them"
    ):
        _run(Chain(late=True), 1, torch.ones(1, 4))
