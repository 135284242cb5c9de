"""The sliced forwards of linears and embeddings. They take the place of a module's own in place.

Each is a class that stands before the module's class, so that the module stays the same object with
the same parameters: `module.__class__ = sliced_class(ColumnLinear, module)`. What it needs to know
is in `module.sliced`. The weights' values are cut elsewhere (`model.py`).
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_speed.nn.deferred import deferred_linear
from hf_speed.nn.sliced.exchange import Peers
from hf_speed.nn.sliced.functions import join_along, leave, split_along
from hf_speed.nn.sliced.regions import SlicedRegion


class LinearState(NamedTuple):
    """What a sliced linear knows.

    Attributes:
        region: that it is part of.
        lengths: features of each rank.
        transposed: the weight is (in, out), as in transformers' Conv1D.
        exchanges: a column gathers its output, a row splits its input.
        ends_region: the region has no row linear that would end it.
    """

    region: SlicedRegion
    lengths: tuple[int, ...]
    transposed: bool
    exchanges: bool = False
    ends_region: bool = False


class ColumnLinear(nn.Module):
    """y = x W^T + b, where this rank has some of the output features."""

    weight: Tensor
    bias: Tensor | None
    sliced: LinearState

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., this rank's out), or (..., out) where it gathers."""
        region, lengths, transposed, gathers, ends_region = self.sliced
        x = region.enter(x)
        y = deferred_linear(x, self.weight, self.bias, region.queue, transposed=transposed)
        if ends_region:
            region.leave()
        return join_along(y, dim=-1, lengths=lengths, peers=region.peers) if gathers else y


class RowLinear(nn.Module):
    """y = sum over the ranks of x W^T, + b, where this rank has some of the input features."""

    weight: Tensor
    bias: Tensor | None
    sliced: LinearState

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's in) -> (..., out); this rank's rows of it where rows are divided."""
        region, lengths, transposed, splits, _ = self.sliced
        queue = region.leave()
        if splits:
            x = split_along(x, dim=-1, lengths=lengths, peers=region.peers)
        # A backward that does not come through the region's entry would leave the queue waiting.
        queue = queue if x.requires_grad else None
        y = deferred_linear(x, self.weight, None, queue, transposed=transposed)
        y = leave(y, peers=region.peers) if region.rows is None else region.rows.leave(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class WordsState(NamedTuple):
    """What a sliced embedding knows: its words are [start, start + count)."""

    peers: Peers
    start: int
    count: int


class VocabEmbedding(nn.Module):
    """An embedding of this rank's words; what the others look up is added."""

    sliced: WordsState

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name of nn.Embedding's
        """(...) words -> (..., features). One all-reduce, exact: all but one rank add zeros."""
        peers, start, count = self.sliced
        words = input - start
        absent = (words < 0) | (words >= count)
        # The class behind this one: some scale what they look up.
        found = super().forward(words.masked_fill(absent, 0))
        return leave(found.masked_fill(absent.unsqueeze(-1), 0), peers=peers)


class LogitsSwitch:
    """Whether the head's logits stay slices: while a loss is computed from them.

    Attributes:
        local: read by the head and by the loss.
    """

    def __init__(self) -> None:
        self.local = False


class HeadState(NamedTuple):
    """What a sliced head knows."""

    region: SlicedRegion
    lengths: tuple[int, ...]
    transposed: bool
    switch: LogitsSwitch


class VocabHead(nn.Module):
    """Logits of this rank's words; of all words unless a loss is computed from the slices."""

    weight: Tensor
    bias: Tensor | None
    sliced: HeadState

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., this rank's words) or (..., words): one all-gather."""
        region, lengths, transposed, switch = self.sliced
        x = region.enter(x)
        y = deferred_linear(x, self.weight, self.bias, region.queue, transposed=transposed)
        region.leave()
        return y if switch.local else join_along(y, dim=-1, lengths=lengths, peers=region.peers)


def sliced_class(ahead: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """A class that is `module`'s with the forward of `ahead`."""
    own = type(module)
    return type(f"Sliced{own.__name__}", (ahead, own), {"__module__": own.__module__})


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear's weight is (in, out): transformers' Conv1D, which has `nf` features."""
    return not isinstance(module, nn.Linear) and isinstance(vars(module).get("nf"), int)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, adds its bias and does nothing else."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    weight: Any = module._parameters.get("weight")
    return is_transposed(module) and isinstance(weight, Tensor) and weight.dim() == 2


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(input features, output features) of a linear."""
    weight: Any = module._parameters["weight"]
    rows, columns = tuple(weight.shape)
    return (rows, columns) if is_transposed(module) else (columns, rows)


def set_linear_sizes(module: nn.Module) -> dict[str, int]:
    """Make the size attributes of a linear or embedding those of its weight.

    Returns:
        What they were.
    """
    if isinstance(module, nn.Embedding):
        sizes = {"num_embeddings": module.weight.shape[0]}
    else:
        names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
        sizes = dict(zip(names, linear_sizes(module), strict=True))
    before: dict[str, int] = {}
    for name, size in sizes.items():
        if name in vars(module):
            before[name] = vars(module)[name]
            setattr(module, name, int(size))
    return before


def embedding_reason(module: nn.Module) -> str | None:
    """Why an embedding cannot be sliced by vocabulary; None where it can."""
    if not isinstance(module, nn.Embedding):
        return f"it is a {type(module).__name__}, not an nn.Embedding"
    options = {name: getattr(module, name) for name in ("max_norm", "scale_grad_by_freq", "sparse")}
    used = [name for name, value in options.items() if value]
    return f"it uses {', '.join(used)}, which need all words" if used else None
