"""Plans of Transformers models: read from configs, found in structures, tried before use."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.integrations.transformers.slice_plan import plan_for
from hf_speed.integrations.transformers.slice_verify import verify
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.journal import Journal
from hf_speed.nn.sliced import Column, SlicePlan, Span
from hf_speed.shard.slicing import Slicing
from tests.engine.toys import toy_model
from tests.nn.sliced.worlds import world
from tests.support import run_ranks

LLAMA = """LlamaForCausalLM over 3 ranks, from its base_model_tp_plan
  model.embed_tokens: VocabEmbedding 61 -> [21, 20, 20] (x1)
  lm_head: VocabHead 61 -> [21, 20, 20], causal loss from slices (x1)
  model.layers.*.self_attn.q_proj: Column 32 -> [16, 8, 8] (x2)
  model.layers.*.self_attn.k_proj: Column 16 -> [8, 4, 4] (x2)
  model.layers.*.self_attn.v_proj: Column 16 -> [8, 4, 4] (x2)
  model.layers.*.self_attn.o_proj: Row 32 -> [16, 8, 8] (x2)
  model.layers.*.mlp.gate_proj: Column 24 -> [8, 8, 8] (x2)
  model.layers.*.mlp.up_proj: Column 24 -> [8, 8, 8] (x2)
  model.layers.*.mlp.down_proj: Row 24 -> [8, 8, 8] (x2)"""

GPT2 = """GPT2LMHeadModel over 2 ranks, from its structure
  transformer.wte: VocabEmbedding 61 -> [31, 30] (x1)
  lm_head: VocabHead 61 -> [31, 30], causal loss from slices (x1)
  transformer.h.*.attn.c_attn: Column 48 -> [24, 24] (x2)
  transformer.h.*.attn.c_proj: Row 16 -> [8, 8] (x2)
  transformer.h.*.mlp.c_fc: Column 64 -> [32, 32] (x2)
  transformer.h.*.mlp.c_proj: Row 64 -> [32, 32] (x2)"""

BERT = """BertForMaskedLM over 2 ranks, from its structure
  bert.embeddings.word_embeddings: VocabEmbedding 61 -> [31, 30] (x1)
  cls.predictions.decoder: VocabHead 61 -> [31, 30] (x1)
  bert.encoder.layer.*.attention.self.query: Column 16 -> [8, 8] (x2)
  bert.encoder.layer.*.attention.self.key: Column 16 -> [8, 8] (x2)
  bert.encoder.layer.*.attention.self.value: Column 16 -> [8, 8] (x2)
  bert.encoder.layer.*.attention.output.dense: Row 16 -> [8, 8] (x2)
  bert.encoder.layer.*.intermediate.dense: Column 24 -> [12, 12] (x2)
  bert.encoder.layer.*.output.dense: Row 24 -> [12, 12] (x2)"""


def test_a_config_with_a_plan_gives_whole_heads_to_each_rank() -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    plan = plan_for(toy_model("llama", **heads), 3)
    assert str(plan) == LLAMA
    assert plan.span == Span("model.layers.0", "model.layers.1")
    attention, mlp, *_ = plan.regions
    assert attention.entry == "model.layers.0.self_attn"
    assert attention.row == "model.layers.0.self_attn.o_proj"
    assert [share.num_heads for share in attention.heads.shares] == [4, 2, 2]
    assert mlp.columns == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


def test_without_a_plan_attention_and_mlp_are_found_by_names_and_shapes() -> None:
    plan = plan_for(toy_model("gpt2"), 2)
    assert str(plan) == GPT2
    assert plan.rules["transformer.h.0.attn.c_attn"].slicing.stretches[0] == (
        (0, 8),
        (16, 8),
        (32, 8),
    )
    assert plan.span == Span("transformer.h.0", "transformer.h.1")
    assert str(plan_for(toy_model("bert"), 2)) == BERT


def test_norms_of_heads_are_marked_for_summing() -> None:
    plan = plan_for(toy_model("qwen3"), 2)
    assert "model.layers.0.self_attn.q_norm" in plan.partial
    assert "  model.layers.*.self_attn.k_norm: whole, gradients summed (x2)" in str(plan)


def test_a_plan_needs_no_values() -> None:
    with torch.device("meta"):
        empty = toy_model("llama")
    assert plan_for(empty, 2) == plan_for(toy_model("llama"), 2)


def test_the_loss_comes_from_slices_only_where_it_is_transformers_own() -> None:
    model: Any = toy_model("llama")
    assert plan_for(model, 2).rules["lm_head"].loss == "causal"
    assert plan_for(model, 2, sliced_loss=False).rules["lm_head"].loss is None
    model.loss_function = lambda **_: torch.zeros(())
    assert plan_for(model, 2).rules["lm_head"].loss is None
    # BERT computes its own.
    assert plan_for(toy_model("bert"), 2).rules["cls.predictions.decoder"].loss is None


def test_tied_words_are_divided_alike_and_shared_ones_stay_whole() -> None:
    tied = plan_for(toy_model("gpt2"), 2).rules
    assert tied["transformer.wte"].slicing == tied["lm_head"].slicing
    # T5's encoder and decoder both hold the embedding.
    assert not any("shared" in path for path in plan_for(toy_model("t5"), 2).rules)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _small(name: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A model on `meta` by the name of its type; settings that its config lacks are left out."""
    config_class: Any = transformers.CONFIG_MAPPING[name]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    settings = {key: value for key, value in SMALL.items() if key in known}
    config = config_class(**{**settings, **overrides})
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping or name in ("bert", "roberta"):
        mapping = transformers.MODEL_FOR_MASKED_LM_MAPPING
    with torch.device("meta"):
        return mapping[type(config)](config)


def test_experts_are_refused_by_name_and_style() -> None:
    with pytest.raises(
        ConfigError,
        match=r"MixtralForCausalLM cannot be divided .* style 'moe_tp_experts' on "
        r"model.layers.0.mlp.experts, a MixtralExperts of .* Set mesh.tp: 1",
    ):
        plan_for(_small("mixtral"), 2)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv1d(3, 3, 3) for _ in range(2))


def test_a_model_in_which_nothing_is_found_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"_Convolutions cannot be divided .* no attention or MLP"
    ):
        plan_for(_Convolutions(), 2)


def test_a_model_that_was_wrapped_is_refused() -> None:
    model: Any = toy_model("llama")
    wrapper: Any = nn.Sequential(model)
    wrapper.tp_plan = model.tp_plan
    with pytest.raises(ConfigError, match="none of the modules that its base_model_tp_plan names"):
        plan_for(wrapper, 2)


@pytest.mark.parametrize(
    ("heads", "num_ranks", "best"),
    [
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, 4, 2),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 8, 4),
        ({"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 3}, 4, 3),
        ({"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 3}, 5, 6),
    ],
    ids=str,
)
def test_heads_that_do_not_go_into_the_ranks_name_the_nearest_that_do(
    heads: dict[str, int], num_ranks: int, best: int
) -> None:
    match = (
        rf"mesh.tp={num_ranks} does not fit LlamaForCausalLM: model.layers.0.self_attn has "
        rf"{heads['num_attention_heads']} heads, {heads['num_key_value_heads']} of keys and "
        rf"values; .* The nearest mesh.tp that does is {best}\."
    )
    with pytest.raises(ConfigError, match=match):
        plan_for(toy_model("llama", **heads), num_ranks)


def test_features_and_words_fewer_than_ranks_are_refused() -> None:
    heads = {"hidden_size": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 2}
    with pytest.raises(ConfigError, match=r"down_proj has 24 features to divide, fewer than ranks"):
        plan_for(toy_model("llama", **heads), 32)
    with pytest.raises(ConfigError, match=r"embed_tokens has 7 words, fewer than ranks.* is 7\."):
        plan_for(toy_model("llama", **heads, vocab_size=7), 8)


def test_fused_keys_that_ranks_would_share_are_refused() -> None:
    match = r"qkv_proj holds the keys and values of 2 heads in one weight .* is 2\."
    with pytest.raises(ConfigError, match=match):
        plan_for(_small("phi3"), 4)


def test_heads_that_do_not_fit_the_weights_are_refused() -> None:
    model: Any = toy_model("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.num_attention_heads = 3
    with pytest.raises(ConfigError, match="16 features, which are not a multiple of its 3 heads"):
        plan_for(model, 2)
    attention.num_attention_heads = None
    attention.config = transformers.PreTrainedConfig()
    with pytest.raises(ConfigError, match=r"attention.self does not say how many heads it has"):
        plan_for(model, 2)


def test_linears_of_unknown_relation_are_refused() -> None:
    model: Any = toy_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(16, 7)
    with pytest.raises(ConfigError, match=r"up_proj has 7 output features and .* 24 inputs"):
        plan_for(model, 2)
    fused: Any = toy_model("gpt2")
    fused.transformer.h[0].attn.c_attn = nn.Linear(16, 48 + 8)
    with pytest.raises(ConfigError, match=r"c_attn has 56 output features, which are not the"):
        plan_for(fused, 2)
    keys: Any = toy_model("llama")
    keys.model.layers[0].self_attn.k_proj = nn.Linear(16, 9)
    keys.model.layers[0].self_attn.num_key_value_heads = 2
    with pytest.raises(ConfigError, match=r"k_proj has 9 features, .* its 2 key-value heads"):
        plan_for(keys, 2)


def test_rows_whose_columns_are_not_clear_are_refused() -> None:
    model: Any = toy_model("llama")
    model.tp_plan = {**model.tp_plan, "model.layers.*.mlp.gate_proj": "rowwise"}
    with pytest.raises(ConfigError, match=r"the rows \[.*\] in one module, and which belong"):
        plan_for(model, 2)


FAMILIES: dict[str, dict[str, Any]] = {
    # By the plan in their configs.
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 4},
    "phi": {},
    "phi3": {},
    "gemma2": {"head_dim": 4},
    "gemma3_text": {"head_dim": 4},
    "glm": {"head_dim": 4},
    "glm4": {"head_dim": 4},
    "olmo2": {},
    "olmo3": {},
    "cohere": {},
    "cohere2": {},
    "starcoder2": {},
    "gpt_neox": {},
    "granite": {},
    "smollm3": {},
    "nemotron": {},
    # By their structure.
    "gpt2": {},
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gptj": {"rotary_dim": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "stablelm": {},
    "persimmon": {},
    "deberta-v2": {},
    "albert": {"embedding_size": 8},
}
"""Model types that are divided by rows too, but for the last."""


def _families() -> None:
    place = world()
    for name, overrides in FAMILIES.items():
        model = _small(name, **overrides)
        plan = plan_for(model, place.tp.size)
        for sequence_parallel in (False, True)[: 1 if name == "albert" else 2]:
            verify(
                model,
                plan,
                tp=place.tp,
                journal=place.journal,
                sequence_parallel=sequence_parallel,
            )


def test_sliced_models_of_many_families_compute_what_whole_ones_do() -> None:
    run_ranks(_families, 2, timeout_s=240.0)


def _caught() -> None:
    place = world()
    tp, journal = place.tp, place.journal
    model: Any = _small("gpt2")
    plan = plan_for(model, tp.size)
    # Queries, keys and values of each head in turn, as other models have them.
    wrong = Column(Slicing.even(0, 48, tp.size))
    faulty = replace(plan, rules={**plan.rules, "transformer.h.0.attn.c_attn": wrong})
    with pytest.raises(
        ConfigError,
        match=r"GPT2LMHeadModel cannot be divided for mesh.tp=2 by the plan found from its "
        r"structure: its outputs differ from the whole model's by",
    ):
        verify(model, faulty, tp=tp, journal=journal)
    # Without the sum over heads only a gradient is wrong.
    norms: Any = _small("qwen3", head_dim=4)
    faulty = replace(plan_for(norms, tp.size), partial=())
    with pytest.raises(ConfigError, match=r"the gradient of .*0.self_attn.q_norm.weight differs"):
        verify(norms, faulty, tp=tp, journal=journal)
    # Its heads' position biases are made elsewhere.
    bloom = _small("bloom", n_head=4)
    with pytest.raises(ConfigError, match=r"the sliced model fails on .* with RuntimeError"):
        verify(bloom, plan_for(bloom, tp.size), tp=tp, journal=journal)
    residual_inside = _small("albert", embedding_size=8)
    with pytest.raises(ConfigError, match="are not one of 2 ranks' rows"):
        verify(
            residual_inside,
            plan_for(residual_inside, tp.size),
            tp=tp,
            journal=journal,
            sequence_parallel=True,
        )


def test_a_plan_that_changes_what_a_model_computes_is_caught() -> None:
    run_ranks(_caught, 2)


def _verify_alone(model: Any, plan: SlicePlan, **options: Any) -> None:
    verify(model, plan, tp=IDENTITY, journal=Journal(enabled=False), **options)


def test_trying_a_plan_touches_neither_the_model_nor_its_random_numbers() -> None:
    model: Any = toy_model("gpt2", num_layers=3)
    before = {name: each.clone() for name, each in model.named_parameters()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _verify_alone(model, plan_for(model, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert model.config.num_hidden_layers == 3


def test_a_model_that_tokens_do_not_run_needs_a_batch() -> None:
    vit: Any = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip
    vit.config.vocab_size = 5
    plan = plan_for(vit, 1)
    with pytest.raises(ConfigError, match=r"the whole model fails on .* Give verify a batch"):
        _verify_alone(vit, plan)
    _verify_alone(vit, plan, batch={"pixel_values": torch.randn(2, 3, 8, 8)})
