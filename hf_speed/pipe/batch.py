"""A batch in microbatches, and what each weighs in the loss.

The loss of a batch is a mean over its tokens. Microbatches have unequal numbers of them, so the
mean of their means would be another number: each is weighed by its share.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_speed.errors import ConfigError

IGNORED = -100
"""The label of a token that has no loss."""

PER_RANK = 4
"""Microbatches a pipeline rank, where their number is left open."""


class Microbatch(NamedTuple):
    """A part of a batch.

    Attributes:
        inputs: of the model's forward, without labels.
        labels: what else only the last stage is given.
        weight: its share in the loss.
    """

    inputs: dict[str, Any]
    labels: dict[str, Any]
    weight: float


def num_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch: the longest first dim of its tensors.

    Raises:
        ConfigError: it has no tensor with rows.
    """
    rows = [
        value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()
    ]
    if not rows:
        raise ConfigError(
            f"A pipeline cuts batches by rows, but none of {sorted(inputs)} is a tensor with rows."
        )
    return max(rows)


def choose_count(wanted: int | None, *, rows: int, num_ranks: int) -> int:
    """The number of microbatches of a batch.

    Args:
        wanted: pipe.microbatches; None chooses.
        rows: of this rank's batch.
        num_ranks: of the pipeline.

    Raises:
        ConfigError: there are fewer rows than microbatches.
    """
    if wanted is None:
        return max(1, min(PER_RANK * num_ranks, rows))
    if wanted > rows:
        raise ConfigError(
            f"pipe.microbatches={wanted} needs a batch of at least {wanted} rows a rank, but this "
            f"one has {rows}. Set per_device_train_batch_size to {wanted} or more (with "
            f"dataloader_drop_last=True for the last batch), or pipe.microbatches to at most "
            f"{rows}, or leave it out."
        )
    return wanted


def cut(inputs: Mapping[str, Any], count: int, *, last_only: frozenset[str]) -> list[Microbatch]:
    """Cut a batch by rows, as evenly as they allow. Every microbatch weighs 1.

    Args:
        inputs: keyword arguments of the model's forward; what has another first dim than the
            batch's rows goes to every microbatch whole.
        count: of microbatches.
        last_only: names that only the last stage is given.
    """
    rows = num_rows(inputs)
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in inputs.items():
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        pieces = value.tensor_split(count) if has_rows else [value] * count
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return [
        Microbatch(
            {name: value for name, value in part.items() if name not in last_only},
            {name: value for name, value in part.items() if name in last_only},
            1.0,
        )
        for part in parts
    ]


def weigh(microbatches: list[Microbatch], *, is_shifted: bool) -> list[Microbatch]:
    """Give each microbatch its share in a loss that is a mean over tokens (or rows).

    Args:
        microbatches: with `labels`, or `shift_labels`, among their labels.
        is_shifted: the first label of each row has no loss: a causal language model shifts them.
    """
    counts = [_num_labels(each, is_shifted=is_shifted) for each in microbatches]
    total = sum(counts)
    return [
        each._replace(weight=count / total if total else 1.0 / len(counts))
        for each, count in zip(microbatches, counts, strict=True)
    ]


def _num_labels(microbatch: Microbatch, *, is_shifted: bool) -> int:
    shifted = microbatch.labels.get("shift_labels")
    values = microbatch.labels.get("labels") if shifted is None else shifted
    if not isinstance(values, Tensor):
        # Of another kind, as the positions of answers: one a row.
        return num_rows(microbatch.inputs)
    if values.is_floating_point() or values.dim() < 2:
        return values.shape[0] if values.dim() else 1
    if is_shifted and shifted is None:
        values = values[:, 1:]
    return int((values != IGNORED).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss of `model` leaves out the first label of each row, as a causal one does.

    Transformers' models say so by their `loss_type`, of which none is a causal language model's.
    Those that compute a loss in their own forward are read.
    """
    if not uses_loss_function(model):
        return re.search(r"labels\[(\.\.\.|:), ?1:", _source(model)) is not None
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def uses_loss_function(model: nn.Module) -> bool:
    """Whether a model leaves its loss to transformers' `loss_function`, which heeds counts."""
    return "loss_function" in _source(model)


def _source(model: nn.Module) -> str:
    """The source of a model's forward; empty where there is none to read."""
    forward: Any = type(model).forward
    try:
        return inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""


def loss_of(output: Any, *, weight: float) -> Tensor:
    """The weighed loss of a microbatch; 0 where none of its tokens has one.

    Raises:
        ConfigError: the model returned no loss.
    """
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ConfigError(
            f"The last stage returned {type(output).__name__} without a scalar loss. Under a "
            f"pipeline (mesh.pp > 1) the model computes the loss: give it labels, and leave out "
            f"label smoothing and compute_loss_func."
        )
    if weight == 0.0:
        # The mean over no tokens is 0/0.
        loss = torch.nan_to_num(loss)
    return loss if weight == 1.0 else loss * weight
