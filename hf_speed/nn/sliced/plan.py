"""What a model's modules become when they are sliced: values, found elsewhere, applied elsewhere.

A rule says how the weight of one module is divided. A region is what computes on slices between an
entry and an exit: the column linears of an attention or an MLP and the row linear behind them. The
places are module paths of one model, without patterns, so that printing a plan shows what happens.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hf_speed.nn.sliced.deal import Heads
from hf_speed.shard.slicing import Slicing

Loss = Literal["causal", "masked"]


class Column(NamedTuple):
    """A linear whose output features are divided.

    Attributes:
        slicing: of the output features, as dim 0.
        gather: every rank gets all output features back, for what needs them all.
    """

    slicing: Slicing
    gather: bool = False


class Row(NamedTuple):
    """A linear whose input features are divided; its outputs are summed, its bias added once.

    Attributes:
        slicing: of the input features, as dim 0.
        split: the input arrives whole, each rank takes its features of it.
    """

    slicing: Slicing
    split: bool = False


class VocabEmbedding(NamedTuple):
    """An embedding of which each rank holds some words; `slicing` is of the words, as dim 0."""

    slicing: Slicing


class VocabHead(NamedTuple):
    """The linear that gives logits, of which each rank has those of its words.

    Attributes:
        slicing: of the words, as dim 0.
        loss: how the model turns logits and labels into a loss, where that can be computed from
            the slices: "causal" shifts the labels; None gathers the logits always.
    """

    slicing: Slicing
    loss: Loss | None


Rule = Column | Row | VocabEmbedding | VocabHead


class Region(NamedTuple):
    """Linears that work on slices between one entry and one exit.

    Attributes:
        entry: the innermost module that holds all of `columns`.
        columns: paths of the column linears.
        row: path of the row linear that ends it; None where each column gathers for itself.
        heads: of an attention; None for an MLP.
    """

    entry: str
    columns: tuple[str, ...]
    row: str | None
    heads: Heads | None = None


class Span(NamedTuple):
    """The first and the last of the blocks between which hidden states may be divided by rows."""

    first: str
    last: str


@dataclass(frozen=True)
class SlicePlan:
    """How one model is divided over `num_ranks` ranks.

    Attributes:
        model: the model's class, for messages.
        source: where the plan comes from: "base_model_tp_plan" or "structure".
        num_ranks: tensor-parallel ranks.
        rules: module path -> rule.
        regions: every column and row linear belongs to one.
        partial: paths of whole modules that see only this rank's heads (norms of queries and keys):
            their gradients are to be summed over all ranks.
        span: of the blocks; None where they are not one row of blocks.
    """

    model: str
    source: str
    num_ranks: int
    rules: Mapping[str, Rule]
    regions: tuple[Region, ...]
    partial: tuple[str, ...] = ()
    span: Span | None = None

    def __str__(self) -> str:
        """One line for each kind of module, with its sizes by rank."""
        lines: Counter[str] = Counter()
        for path, rule in self.rules.items():
            sizes = [rule.slicing.local_size(rank) for rank in range(self.num_ranks)]
            text = f"{_kind(path)}: {type(rule).__name__} {rule.slicing.size} -> {sizes}"
            match rule:
                case Column(gather=True):
                    text += ", gathered"
                case Row(split=True):
                    text += ", of a whole input"
                case VocabHead(loss=str()):
                    text += f", {rule.loss} loss from slices"
            lines[text] += 1
        lines.update(f"{_kind(path)}: whole, gradients summed" for path in self.partial)
        head = f"{self.model} over {self.num_ranks} ranks, from its {self.source}"
        return "\n".join([head, *(f"  {line} (x{count})" for line, count in lines.items())])


def _kind(path: str) -> str:
    """A path with its numbers blotted out."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
