"""Hidden states divided by rows between slices, within a pipeline: what one process trains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.engine.meshes import BOTH, SLICES, Mesh, attach, own_rows, toy
from tests.engine.toys import VOCAB, plain_parameters, whole_parameters
from tests.support import run_ranks

SHAPES = ((4, 6), (4, 5), (3, 7), (2, 3))
"""Of the batches: rows that two slices cannot share evenly, in two microbatches or three rows."""


def _batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCAB, SHAPES[step % len(SHAPES)], generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _plain(kind: str) -> tuple[Tensor, Mapping[str, Tensor]]:
    model: Any = toy(kind)
    optimizer = _sgd(model)
    figures = []
    for step in range(len(SHAPES)):
        loss = model(**_batch(step)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures.append(torch.stack([loss.detach(), norm]))
    return torch.stack(figures), plain_parameters(model)


def _check(
    kind: str,
    mesh: Mesh,
    stage: int,
    expected: tuple[Tensor, Mapping[str, Tensor]],
    *,
    checkpoints: bool | None = None,
    **pipe: Any,
) -> None:
    model: Any = toy(kind)
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    tensor = {"sequence_parallel": True}
    engine = attach(model, mesh, stage, pipe=pipe, tensor=tensor)
    optimizer = _sgd(model)
    engine.bind_optimizer(optimizer)
    figures = []
    for step in range(len(SHAPES)):
        loss = model(**own_rows(engine, _batch(step))).loss
        engine.backward(loss)
        norm = engine.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures.append(torch.stack([loss.detach(), norm]))
    what = f"{kind}, {mesh}, stage {stage}, {pipe}, {checkpoints=}"
    torch.testing.assert_close(
        torch.stack(figures), expected[0], rtol=1e-5, atol=0.0, msg=lambda text: f"{what}: {text}"
    )
    for name, value in whole_parameters(engine).items():
        torch.testing.assert_close(
            value,
            expected[1][name],
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{what}, {name}: {text}",
        )
    with torch.no_grad():
        model.eval()(**_batch(0))
    engine.detach()


def _within_a_pipeline() -> None:
    llama, qwen3 = _plain("llama"), _plain("qwen3")
    for stage, schedule in ((1, "1f1b"), (3, "zb_h1"), (1, "zb_v")):
        _check("llama", BOTH, stage, llama, schedule=schedule)
        _check("qwen3", BOTH, stage, qwen3, schedule=schedule)
    _check("llama", BOTH, 3, llama, checkpoints=False, schedule="1f1b")
    _check("llama", BOTH, 1, llama, checkpoints=False, schedule="zb_v")
    _check("qwen3", BOTH, 3, qwen3, checkpoints=True, schedule="zb_h1")


def test_sequence_parallel_stages_train_as_one_process_under_every_kind_of_schedule() -> None:
    run_ranks(_within_a_pipeline, 4)


def _alone() -> None:
    for kind in ("llama", "qwen3"):
        plain = _plain(kind)
        _check(kind, SLICES, 3, plain)
        _check(kind, SLICES, 1, plain, checkpoints=True)


def test_sequence_parallel_slices_train_as_one_process_whatever_the_rows() -> None:
    run_ranks(_alone, 2)
