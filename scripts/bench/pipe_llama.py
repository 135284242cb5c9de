"""A real Llama as a pipeline: one process, torch.distributed.pipelining, DeepSpeed, and ours.

All train the same values (built whole from one seed, then cut) on the same tokens, in the same
microbatches, with `AdamW(fused=True)`, cut into stages at the same layers. A loss is the mean over
microbatches. Each system's own knobs stay at their defaults, but for outputs that nobody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pipe_sleep import stages_of, torch_schedule, torch_step
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM
from workload import LEARNING_RATE, SEED, Shape, build_model

IGNORED = -100


class Workload(NamedTuple):
    """What every system trains. `shape.batch` is a microbatch's rows."""

    shape: Shape
    microbatches: int
    cuts: dict[int, tuple[int, ...]]
    """By number of stages: layers of each."""

    def tokens(self) -> Tensor:
        """(microbatches * batch, length) int64, the same everywhere."""
        generator = torch.Generator().manual_seed(SEED)
        rows = self.microbatches * self.shape.batch
        size = (rows, self.shape.length)
        return torch.randint(0, self.shape.vocab, size, generator=generator)


BALANCED = Workload(
    Shape(vocab=6144, hidden=512, inter=1376, layers=7, heads=8, batch=2, length=128),
    8,
    {2: (4, 3), 4: (2, 2, 2, 1)},
)
"""The head takes about as long as a layer and what comes with the embedding, so that stages are
equal: two of about 4 layers, or four of about 2."""

LARGE_HEAD = Workload(
    Shape(vocab=12288, hidden=512, inter=1376, layers=8, heads=8, batch=2, length=128),
    8,
    {2: (4, 4), 4: (2, 2, 2, 2)},
)
"""The head takes as long as two layers, as in most small models. The cuts are equal numbers of
layers: what torch's users write, and what transformers' own pipelines do. Ours cuts by itself."""

SMALL = Workload(
    Shape(vocab=3072, hidden=256, inter=704, layers=7, heads=8, batch=2, length=64),
    8,
    {2: (4, 3), 4: (2, 2, 2, 1)},
)
"""For a quick run."""

TINY = Workload(
    Shape(vocab=512, hidden=64, inter=172, layers=7, heads=4, batch=2, length=32),
    8,
    {2: (4, 3), 4: (2, 2, 2, 1)},
)
"""To see whether everything runs."""

Step = Callable[[], float | None]
"""One step, optimizer included; the loss, on ranks that know it."""


class LlamaStage(nn.Module):
    """Consecutive layers of a Llama; the first stage has the embedding, the last the head.

    What a user of torch.distributed.pipelining or DeepSpeed writes by hand.
    """

    def __init__(self, model: LlamaForCausalLM, counts: Sequence[int], index: int) -> None:
        super().__init__()
        first, last = sum(counts[:index]), sum(counts[: index + 1])
        self.embed = model.model.embed_tokens if index == 0 else None
        self.layers = nn.ModuleList(list(model.model.layers)[first:last])
        self.rotary = model.model.rotary_emb
        self.norm = model.model.norm if index == len(counts) - 1 else None
        self.head = model.lm_head if index == len(counts) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(rows, length) ids or (rows, length, hidden) -> hidden states or logits."""
        if self.embed is not None:
            x = self.embed(x)
        positions = torch.arange(x.shape[1])[None]
        tables = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=tables, position_ids=positions, attention_mask=None)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def causal_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over tokens of the next one's cross entropy, computed as transformers does."""
    target = nn.functional.pad(ids, (0, 1), value=IGNORED)[:, 1:]
    flat = logits.view(-1, logits.shape[-1])
    return nn.functional.cross_entropy(flat, target.reshape(-1), ignore_index=IGNORED)


def _adamw(parameters: Iterator[nn.Parameter]) -> AdamW:
    return AdamW(parameters, lr=LEARNING_RATE, fused=True)


def one_process(work: Workload, rank: int) -> Step:  # noqa: ARG001
    """No pipeline: the microbatches one after the other."""
    model = build_model(work.shape)
    optimizer = _adamw(model.parameters())
    batches = work.tokens().chunk(work.microbatches)

    def step() -> float:
        total = torch.zeros(())
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss / work.microbatches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def torch_pipeline(work: Workload, rank: int, *, schedule: str, chunks: int) -> Step:
    """torch.distributed.pipelining."""
    mine = stages_of(schedule, rank, 2, chunks)
    model = build_model(work.shape)
    stages = nn.ModuleList(LlamaStage(model, work.cuts[2 * chunks], index) for index in mine)
    optimizer = _adamw(stages.parameters())
    made = torch_schedule(
        schedule,
        list(stages),
        rank=rank,
        ranks=2,
        microbatches=work.microbatches,
        loss_fn=causal_loss,
    )
    ids = work.tokens()
    passes = torch_step(made, mine, ids, ids)

    def step() -> float | None:
        loss = passes()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def deepspeed(work: Workload, rank: int) -> Step:  # noqa: ARG001
    """DeepSpeed's PipelineModule: 1F1B, stages at the same cut as everybody's."""
    import deepspeed as package
    from deepspeed.pipe import PipelineModule

    package.init_distributed(dist_backend="gloo")
    model = build_model(work.shape)
    # Two "layers" for two stages: the cut is the bench's, and nothing runs between them.
    module = PipelineModule(
        layers=[LlamaStage(model, work.cuts[2], index) for index in range(2)],
        num_stages=2,
        loss_fn=causal_loss,
        partition_method="uniform",
    )
    config = {
        "train_micro_batch_size_per_gpu": work.shape.batch,
        "gradient_accumulation_steps": work.microbatches,
        "steps_per_print": 10**9,
    }
    built = package.initialize(model=module, optimizer=_adamw(module.parameters()), config=config)
    engine: Any = built[0]
    batches = [(ids, ids) for ids in work.tokens().chunk(work.microbatches)]

    def step() -> float:
        return float(engine.train_batch(data_iter=iter(batches)))

    return step


def ours(
    work: Workload,
    rank: int,  # noqa: ARG001
    *,
    schedule: str,
    chunks: int,
) -> Step:
    """hf_speed: the model as it is, and a config; cut as the others are where stages are equal."""
    from hf_speed.config import load_config
    from hf_speed.engine import Engine

    pipe: dict[str, Any] = {"schedule": schedule, "microbatches": work.microbatches}
    if work is not LARGE_HEAD:
        pipe["balance"] = list(work.cuts[2 * chunks])
    if schedule in ("interleaved", "looped_bfs"):
        pipe["chunks"] = chunks
    model = build_model(work.shape)
    optimizer = _adamw(model.parameters())
    engine = Engine.attach(model, load_config({"mesh": {"pp": 2}, "pipe": pipe}))
    engine.bind_optimizer(optimizer)
    ids = work.tokens()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Trainer:
    """One rank of a world."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def train(self, count: int) -> tuple[float, list[float | None]]:
        """Train `count` steps; (seconds, the loss of each where this rank knows it)."""
        start = time.perf_counter()
        losses = [self._step() for _ in range(count)]
        return time.perf_counter() - start, losses
