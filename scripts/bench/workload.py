"""The model, batch and dtypes that all systems of a bench train: the same bits for each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20191
LEARNING_RATE = 1e-3


class Shape(NamedTuple):
    """A Llama and a batch. `batch` is per rank, in sequences of `length` tokens."""

    vocab: int
    hidden: int
    inter: int
    layers: int
    heads: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that one rank trains on in one step."""
        return self.batch * self.length


LLAMA_33M = Shape(8192, 512, 1376, 8, 8, 2, 128)
LLAMA_5M = Shape(4096, 256, 704, 4, 4, 2, 64)


def build_model(shape: Shape, device: str = "cpu") -> LlamaForCausalLM:
    """Build the Llama with weights from a fixed seed: every rank and every system starts alike."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if device != "cpu":
        nn.Module.to(model, device)
    return model


def make_batch(shape: Shape, rank: int, device: str) -> Tensor:
    """Give this rank's token ids, (batch, length), int64."""
    generator = torch.Generator().manual_seed(SEED + rank)
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.length), generator=generator)
    return ids.to(device)


def num_parameters(shape: Shape) -> int:
    """Count the elements of the model without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(shape).parameters())


def describe(shape: Shape, dtype: str, ranks: int) -> str:
    """Name model, dtype and ranks for a row."""
    millions = num_parameters(shape) / 1e6
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    return f"Llama {millions:.0f}M {short} x{ranks}"


def num_block_parameters(shape: Shape) -> int:
    """Count the elements of one transformer block."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(shape).model.layers[0].parameters())
