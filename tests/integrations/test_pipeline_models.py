"""Which Transformers models a pipeline cuts: loss, every gradient and logits as of one process."""

from typing import Any

import torch
import transformers
from torch import nn

from hf_speed.config import load_config
from hf_speed.engine import Engine
from tests.support import run_ranks

PLANNED = [
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]
"""Model types whose configs mostly say where they can be cut."""

FOUND = [
    "bert",
    "bloom",
    "camembert",
    "distilbert",
    "electra",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "modernbert",
    "mpt",
    "opt",
    "roberta",
    "xglm",
    "xlm-roberta",
]
"""Model types whose list of layers is found by its size."""

MASKED = ("bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _small(name: str) -> nn.Module:
    """A model by the name of its type, without dropout; the same on every call."""
    config_class: Any = transformers.CONFIG_MAPPING[name]
    defaults = config_class().to_dict()
    known = defaults.keys() | config_class.attribute_map.keys()
    settings = {key: value for key, value in SMALL.items() if key in known}
    settings |= {
        key: 0.0
        for key, value in defaults.items()
        if isinstance(value, float) and ("drop" in key or key.endswith("_prob"))
    }
    config = config_class(**settings)
    mapping: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if name in MASKED:
        mapping = transformers.MODEL_FOR_MASKED_LM_MAPPING
    torch.manual_seed(3)
    return mapping[type(config)](config)


def _differences(name: str) -> list[str]:
    """What differs between a model on two pipeline ranks and the same model on one process."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (4, 8), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    whole, model = _small(name).train(), _small(name).train()
    expected = whole(**inputs, labels=tokens).loss
    expected.backward()
    pipe = {"schedule": "zb_h1", "microbatches": 2}
    engine = Engine.attach(
        model, load_config({"mesh": {"pp": 2}, "pipe": pipe, "zero": {"stage": 1}})
    )
    loss = model(**inputs, labels=tokens).loss
    engine.backward(loss)
    found = [] if torch.allclose(loss, expected, rtol=1e-5, atol=0.0) else ["loss"]
    for path, parameter in whole.named_parameters():
        gradient = engine.get_full_grad(path)
        zero = torch.zeros_like(parameter)
        ours, theirs = (zero if each is None else each for each in (gradient, parameter.grad))
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6):
            found.append(path)
    with torch.no_grad():
        ours, theirs = (each.eval()(**inputs).logits for each in (model, whole))
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        found.append("logits")
    engine.detach()
    return found


def _all_differences(names: list[str]) -> dict[str, list[str]]:
    return {name: _differences(name) for name in names}


def test_models_train_and_evaluate_in_a_pipeline_as_in_one_process() -> None:
    for differences in run_ranks(_all_differences, 2, [*PLANNED, *FOUND], timeout_s=280):
        assert differences == {name: [] for name in (*PLANNED, *FOUND)}
