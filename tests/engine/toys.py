"""Toy models and batches, and the plain training loops that engines are compared with."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_speed.config import SpeedConfig, load_config
from hf_speed.engine import Engine

KINDS = ("llama", "qwen3", "gpt2", "bert", "t5")
VOCAB = 61
NUM_ROWS = 4
"""Rows of a global batch: any of 1, 2 and 4 ranks gets an equal share."""
NUM_COLUMNS = 6

Batch = Mapping[str, Tensor]
OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]


def toy_model(kind: str, *, num_layers: int = 2, **overrides: Any) -> nn.Module:
    """A model of `kind` with a few thousand parameters, no dropout, the same on every call."""
    torch.manual_seed(7)
    llama_like = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    match kind:
        case "llama":
            config = transformers.LlamaConfig(**{**llama_like, **overrides})
            return transformers.LlamaForCausalLM(config)
        case "qwen3":
            config = transformers.Qwen3Config(**{**llama_like, "head_dim": 8, **overrides})
            return transformers.Qwen3ForCausalLM(config)
        case "gpt2":
            sizes = {"n_embd": 16, "n_layer": num_layers, "n_head": 2, "n_positions": 32}
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config = transformers.GPT2Config(
                **{"vocab_size": VOCAB, **sizes, **no_dropout, **overrides}
            )
            return transformers.GPT2LMHeadModel(config)
        case "bert":
            sizes = {k: v for k, v in llama_like.items() if k != "num_key_value_heads"}
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = transformers.BertConfig(**{**sizes, **no_dropout, **overrides})
            return transformers.BertForMaskedLM(config)
        case _:
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": num_layers, "num_heads": 2}
            config = transformers.T5Config(
                **{"vocab_size": VOCAB, **sizes, "dropout_rate": 0.0, **overrides},
                decoder_start_token_id=0,
            )
            return transformers.T5ForConditionalGeneration(config)


class Tower(nn.Module):
    """Blocks of two layers; a rank may leave some of them out of a pass."""

    def __init__(self, *, num_blocks: int = 3, width: int = 5, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inlet = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width + 2), nn.Tanh(), nn.Linear(width + 2, width))
            for _ in range(num_blocks)
        )
        self.outlet = nn.Linear(width, 1)

    def forward(self, x: Tensor, skip: Sequence[int] = ()) -> Tensor:
        """(rows, width) -> 0-d loss."""
        x = self.inlet(x)
        for index, block in enumerate(self.blocks):
            if index not in skip:
                x = x + block(x)
        return self.outlet(x).square().mean()


def tower_rows(step: int, *, width: int = 5, rank: int | None = None) -> Tensor:
    """(2, width) inputs of one rank, different for each step and rank."""
    place = rank_here() if rank is None else rank
    return torch.randn(2, width, generator=torch.Generator().manual_seed(1000 * step + place))


def global_batch(kind: str, step: int) -> Batch:
    """The whole batch of one step, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, NUM_COLUMNS), generator=generator)
    if kind == "bert":
        return {"input_ids": tokens, "labels": tokens.roll(1, dims=1)}
    if kind == "t5":
        return {"input_ids": tokens, "labels": tokens.roll(2, dims=1)[:, :4].contiguous()}
    return {"input_ids": tokens, "labels": tokens}


def rank_here() -> int:
    """This rank, 0 outside of a world."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks_here() -> int:
    """The number of ranks, 1 outside of a world."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Batch, *, rank: int | None = None) -> dict[str, Tensor]:
    """A rank's rows of a global batch."""
    place = rank_here() if rank is None else rank
    return {key: value.chunk(ranks_here())[place] for key, value in batch.items()}


def speed(stage: int, **sections: Mapping[str, Any]) -> SpeedConfig:
    """A config of one stage; `zero=...` adds to its zero section."""
    tree: dict[str, Any] = {**sections, "zero": {"stage": stage, **sections.get("zero", {})}}
    return load_config(tree)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of most tests."""
    return torch.optim.AdamW(parameters, lr=1e-2)


class Run(NamedTuple):
    """What a training loop leaves.

    Attributes:
        losses: (steps,) mean over ranks of each step's loss.
        parameters: name -> whole final values.
        bytes_sent: by this rank in the last step.
    """

    losses: Tensor
    parameters: dict[str, Tensor]
    bytes_sent: int = 0


def train_plain(
    model: nn.Module, batches: Sequence[Batch], make_optimizer: OptimizerMaker = adamw
) -> Run:
    """Plain PyTorch in one process over whole batches."""
    optimizer = make_optimizer(model.parameters())
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return Run(torch.stack(losses), plain_parameters(model))


def train_engine(
    model: nn.Module,
    batches: Sequence[Batch],
    config: SpeedConfig,
    make_optimizer: OptimizerMaker = adamw,
    **attach: Any,
) -> Run:
    """An engine over this rank's share of the same batches."""
    engine = Engine.attach(model, config, **attach)
    optimizer = make_optimizer(model.parameters())
    engine.bind_optimizer(optimizer)
    losses, sent = [], 0
    for batch in batches:
        before = engine.mesh.journal.total_bytes_sent
        loss = model(**share(batch)).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
        sent = engine.mesh.journal.total_bytes_sent - before
    run = Run(mean_over_ranks(torch.stack(losses)), whole_parameters(engine), sent)
    engine.detach()
    return run


def plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a plain model's parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def whole_parameters(engine: Engine, *, master: bool = True) -> dict[str, Tensor]:
    """Copies of an engine's parameters. Collective."""
    return {name: value.clone() for name, value in engine.full_parameters(master=master)}


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, in place."""
    if ranks_here() > 1:
        dist.all_reduce(value)
        value /= ranks_here()
    return value


def assert_same_values(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Every tensor equal: bitwise by default."""
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
