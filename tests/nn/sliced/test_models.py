"""Sliced models train as whole ones do."""

from typing import Any

import pytest

from tests.engine.toys import global_batch
from tests.nn.sliced.worlds import check, world
from tests.support import run_ranks

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, shared keys": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama, tied": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama, uneven heads": (
        "llama",
        {
            "hidden_size": 20,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 4,
            "intermediate_size": 23,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama, uneven groups": (
        "llama",
        {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    ),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_head": 4}),
    "gpt2, uneven": ("gpt2", {"n_head": 8, "n_inner": 21}),
    "bert": ("bert", {"num_attention_heads": 4}),
}


def _every_model(options: dict[str, Any]) -> None:
    place = world()
    for name, (kind, overrides) in CASES.items():
        try:
            check(kind, place, overrides=overrides, **options)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _padded() -> None:
    """The embedding of padding learns nothing, whichever rank has it."""
    place = world()
    for kind in ("bert", "llama"):
        for padding in (0, 7, 60):
            batch = dict(global_batch(kind, 0))
            batch["input_ids"] = batch["input_ids"].clone()
            batch["input_ids"][:, :2] = padding
            overrides = {"num_attention_heads": 4, "pad_token_id": padding}
            check(kind, place, overrides=overrides, batch=batch)


def test_padding_has_no_gradient_whichever_rank_holds_it() -> None:
    run_ranks(_padded, 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_losses_and_gradients_are_those_of_the_whole_model(num_ranks: int) -> None:
    run_ranks(_every_model, num_ranks, {})


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_with_rows_divided_they_are_too(num_ranks: int) -> None:
    run_ranks(_every_model, num_ranks, {"sequence_parallel": True})
