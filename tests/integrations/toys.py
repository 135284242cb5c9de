"""Toy models, data and trainers for the tests of the integrations."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import hf_speed

VOCABULARY = 96

STAGES: list[dict[str, Any] | None] = [{"zero": {"stage": stage}} for stage in range(4)]


def stage(number: int, **sections: Any) -> dict[str, Any]:
    """A config of one stage; more sections by name."""
    return {"zero": {"stage": number}, **sections}


def llama_config(**options: Any) -> LlamaConfig:
    """A Llama of two layers, whose matrices are large enough to be loaded in slices."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(sizes | options))


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """The same values for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**options))


def examples(count: int = 24, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Sequences with unlike numbers of labels: ranks and micro-steps weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        labels = ids.clone()
        labels[: index % 7] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def checkpointing(*, use_reentrant: bool) -> dict[str, Any]:
    """TrainingArguments that recompute activations; transformers 5.17 has the older names only."""
    newer = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def arguments(directory: str | Path, config: Any, **options: Any) -> Any:
    """TrainingArguments of hf_speed: 2 sequences a rank, 2 micro-steps, 4 steps, no files."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    # The Trainer writes into the dicts of its arguments.
    return hf_speed.TrainingArguments(
        str(directory), hf_speed=config, **(defaults | copy.deepcopy(options))
    )


def trainer(directory: str | Path, config: Any, *, model: Any = None, **options: Any) -> Any:
    """A Trainer of hf_speed over the examples; silent."""
    made = hf_speed.Trainer(
        model=llama() if model is None else model,
        args=arguments(directory, config, **options),
        train_dataset=examples(),
        eval_dataset=examples(10, seed=2),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def curve(trained: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every logged step."""
    return [
        (line["loss"], line["grad_norm"]) for line in trained.state.log_history if "loss" in line
    ]


def flat(rows: Any) -> torch.Tensor:
    """Numbers, however nested, as fp64."""
    return torch.tensor(rows, dtype=torch.float64)
