"""Small models of four types, trained in one process and on meshes: what both must agree on.

The models have eight layers, for eight pipeline stages, and four heads, two of keys and values, for
four slices. At a learning rate of 1e-2, which they bear too, the loss falls to a tenth within ten
steps and rounding grows tenfold every two; at 1e-3 it stays rounding.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from hf_speed.config import load_config
from hf_speed.engine import Engine
from hf_speed.integrations.transformers.slice_plan import plan_for

KINDS = ("Llama", "Qwen3", "GPT-2", "BERT")
VOCAB = 61
NUM_ROWS, NUM_COLUMNS = 8, 6
LEARNING_RATE = 1e-3
SEED = 7
NO_CLIP = 1e9


class Case(NamedTuple):
    """One training run on a mesh."""

    kind: str
    pp: int
    tp: int
    stage: int
    steps: int
    schedule: str | None = None
    """None leaves it to hf_speed."""
    microbatches: int | None = None
    tied: bool = True
    """Whether embedding and head are tied where the model type ties them."""
    clip: float = 1.0


class Figures(NamedTuple):
    """What a run leaves.

    Attributes:
        losses: of the global batch, by step.
        norms: of its gradient before clipping.
        digests: parameter name -> digest of its final bytes.
    """

    losses: list[float]
    norms: list[float]
    digests: dict[str, str]


def make_model(kind: str, *, tied: bool = True) -> nn.Module:
    """A model without dropout, the same on every call."""
    torch.manual_seed(SEED)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    llama_like = {**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_like))
    if kind == "Qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama_like, head_dim=8))
    if kind == "BERT":
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sizes, **none, tie_word_embeddings=tied)
        return transformers.BertForMaskedLM(config)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=8,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def make_batch(kind: str, step: int) -> dict[str, Tensor]:
    """The global batch of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, NUM_COLUMNS), generator=generator)
    # A masked language model is asked for something that it does not see.
    return {"input_ids": tokens, "labels": tokens.roll(1, dims=1) if kind == "BERT" else tokens}


def alone(case: Case) -> Figures:
    """The same run in plain PyTorch in this process: a backward for each microbatch."""
    model = make_model(case.kind, tied=case.tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    count = case.microbatches or 1
    for step in range(case.steps):
        total = torch.zeros(())
        parts = {k: v.tensor_split(count) for k, v in make_batch(case.kind, step).items()}
        for index in range(count):
            loss = model(**{name: part[index] for name, part in parts.items()}).loss / count
            loss.backward()
            total += loss.detach()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), case.clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return Figures(losses, norms, {n: digest(p) for n, p in model.named_parameters()})


def on_mesh(case: Case) -> Figures:
    """The run on this rank's place of the mesh; the ranks that are left see different rows."""
    model = make_model(case.kind, tied=case.tied)
    tree: dict[str, dict[str, Any]] = {
        "zero": {"stage": case.stage},
        "mesh": {"pp": case.pp, "tp": case.tp},
    }
    if case.pp > 1:
        tree["pipe"] = {"schedule": case.schedule, "microbatches": case.microbatches}
    engine = Engine.attach(model, load_config(tree), slice_planner=plan_for)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    engine.bind_optimizer(optimizer)
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    losses, norms = [], []
    for step in range(case.steps):
        batch = make_batch(case.kind, step)
        loss = model(**{k: v.chunk(data.size)[data.rank] for k, v in batch.items()}).loss
        engine.backward(loss)
        norms.append(float(engine.clip_grad_norm_(case.clip)))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if data.group is not None:
            torch.distributed.all_reduce(mean, group=data.group)
        losses.append(float(mean / data.size))
    digests = {name: digest(value) for name, value in engine.full_parameters()}
    engine.detach()
    return Figures(losses, norms, digests)


def digest(value: Tensor) -> str:
    """A digest of a tensor's bytes."""
    flat = value.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


class Trainee:
    """What a rank obeys."""

    def train(self, case: Case) -> Figures:
        """Run a case."""
        return on_mesh(case)
