"""Where a model computes on slices: what happens at the entry and the exit of an attention or MLP.

    column linears   the first one enters, the others find the same input entered already: one
                     exchange for queries, keys and values, for gate and up
    inside           this rank's heads or features; random numbers of this rank alone
    row linear       the random numbers of all ranks again; then its product is summed

A region's weight gradients are computed while its input gradient travels (see `functions.py`).
"""

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from hf_speed.errors import EngineError
from hf_speed.nn.deferred import Queue, compute_dtype
from hf_speed.nn.sliced.exchange import Peers, rows_each
from hf_speed.nn.sliced.functions import (
    Meanwhile,
    enter,
    enter_rows,
    join_rows,
    leave_rows,
    split_rows,
)

_SEEDS = 2**62
_APART = 0x9E3779B97F4A7C15
"""Odd and far from round: neighbouring ranks get unrelated seeds."""


class RankRandom:
    """Random numbers of this rank alone, for a while, where dropout needs them.

    The seed comes from the generator that all ranks share, so recomputing a checkpointed block
    draws the same one. The generator itself is re-seeded, since that is what dropout reads.

    Args:
        peers: the ranks.
        scope: modules whose dropout decides whether anything random happens in between.
    """

    def __init__(self, peers: Peers, scope: Iterable[nn.Module]) -> None:
        self._peers = peers
        self._rates = list(dropout_rates(scope))
        self._saved: tuple[torch.Generator, Tensor] | None = None

    def begin(self, device: torch.device, *, training: bool) -> None:
        """Switch to this rank's numbers. Nothing where no dropout is active."""
        if self._peers.size == 1 or not training or self._saved is not None:
            return
        if not any(getattr(module, name) for module, name in self._rates):
            return
        seed = int(torch.randint(_SEEDS, ()))
        generator = generator_of(device)
        self._saved = generator, generator.get_state()
        generator.manual_seed((seed + _APART * (self._peers.rank + 1)) % _SEEDS)

    def end(self) -> None:
        """Go on with the numbers that all ranks share."""
        if self._saved is not None:
            (generator, state), self._saved = self._saved, None
            generator.set_state(state)

    def forget(self) -> None:
        """A recomputation was cut short in between; whoever ran it has put its own numbers back."""
        self._saved = None


def dropout_rates(modules: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, str]]:
    """Where the dropout probabilities of `modules` are kept."""
    for module in modules:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, (int, float)):
                yield module, name


def generator_of(device: torch.device) -> torch.Generator:
    """What dropout on `device` draws from."""
    if device.type != "cuda":
        return torch.default_generator
    index = device.index if device.index is not None else torch.cuda.current_device()
    return torch.cuda.default_generators[index]


class Rows:
    """Hidden states between regions, divided by rows: (B, S, H) becomes (1, P, H) of B * S rows.

    Rows are tokens of all sequences of the batch in one line, so that batches and lengths that do
    not divide cost a few rows of padding at the end, and no exchange has to reorder anything.
    Source: sequence parallelism, arXiv:2205.05198, section 4.2.2.

    Args:
        peers: the ranks.
        scope: the modules that work on divided hidden states.
    """

    def __init__(self, peers: Peers, scope: Iterable[nn.Module]) -> None:
        self._peers = peers
        # By rows of a rank: a checkpoint may recompute a block after a batch of another shape.
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.random = RankRandom(peers, scope)

    def split(self, x: Tensor, *, training: bool) -> Tensor:
        """Hidden states come in: whole on every rank."""
        shape = tuple(x.shape[:-1])
        self._shapes[rows_each(prod(shape), self._peers.size)] = shape
        self.random.begin(x.device, training=training)
        return split_rows(x.reshape(-1, x.size(-1)), peers=self._peers).unsqueeze(0)

    def join(self, x: Tensor) -> Tensor:
        """They go out again: inverse of `split`. One all-gather."""
        self.random.end()
        shape, flat = self._shape_of(x), x.view(-1, x.size(-1))
        return join_rows(flat, prod(shape), peers=self._peers).view(*shape, -1)

    def enter(self, x: Tensor, meanwhile: Meanwhile) -> Tensor:
        """A region needs all rows. One all-gather; a reduce-scatter in the backward."""
        shape, flat = self._shape_of(x), x.view(-1, x.size(-1))
        whole = enter_rows(flat, prod(shape), peers=self._peers, meanwhile=meanwhile)
        # Some blocks flatten their batch before the MLP.
        return whole.view(*shape, -1) if x.dim() > 2 else whole

    def leave(self, x: Tensor) -> Tensor:
        """A region ends. One reduce-scatter; an all-gather in the backward."""
        rows = leave_rows(x.reshape(-1, x.size(-1)), peers=self._peers)
        return rows.unsqueeze(0) if x.dim() > 2 else rows

    def _shape_of(self, x: Tensor) -> tuple[int, ...]:
        """The batch and sequence of which `x` are this rank's rows."""
        shape = self._shapes.get(x.size(-2)) if x.shape[:-2] in ((), (1,)) else None
        if shape is None:
            raise EngineError(
                f"Hidden states of shape {tuple(x.shape)} are not one of {self._peers.size} ranks' "
                f"rows of a batch that was seen, (1, rows, features): a block was called by "
                f"itself, or puts hidden states together in a way of its own. Call the whole "
                f"model, or set tensor.sequence_parallel: false."
            )
        return shape


class SlicedRegion:
    """One attention or MLP at work.

    Args:
        peers: the ranks.
        entry: the module that holds the column linears; its `training` counts for dropout.
        leaves: its linears, each with the names of the parameters whose gradients they defer.
        scope: modules whose dropout may act between entry and exit, on what differs by rank.
        rows: set where hidden states outside of the region are divided by rows.
    """

    def __init__(
        self,
        peers: Peers,
        entry: nn.Module,
        leaves: Sequence[tuple[nn.Module, tuple[str, ...]]],
        *,
        scope: Iterable[nn.Module] = (),
        rows: Rows | None = None,
    ) -> None:
        self.peers = peers
        self.rows = rows
        self.sink: Queue | None = None
        self.queue: Queue | None = None
        self.random = RankRandom(peers, scope)
        self._entry = entry
        self._leaves = list(leaves)
        self._seen: Tensor | None = None
        self._entered: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """The input of a column linear, entered once for all that share it."""
        if self.rows is not None:
            # Entered by the hook of the whole module, which looks at the shape of its input.
            return x
        if x is not self._seen or self._entered is None:
            self.random.begin(x.device, training=self._entry.training)
            # Cast first: so its gradient travels in the dtype that it is computed in.
            cast, meanwhile = x.to(compute_dtype(x)), self._meanwhile()
            self._seen, self._entered = x, enter(cast, peers=self.peers, meanwhile=meanwhile)
        return self._entered

    def enter_rows(self, x: Tensor) -> Tensor:
        """The input of the whole module, from this rank's rows."""
        return x if self.rows is None else self.rows.enter(x, self._meanwhile())

    def leave(self) -> Queue | None:
        """The row linear is reached: its own weight gradient goes to the queue returned."""
        self.random.end()
        self._seen = self._entered = None
        queue, self.queue = self.queue, None
        return queue

    def forget(self) -> None:
        """A pass was cut short."""
        self.random.forget()
        self._seen = self._entered = self.queue = None

    def _meanwhile(self) -> Meanwhile:
        if self.sink is not None or not torch.is_grad_enabled():
            self.queue = self.sink
            return Meanwhile(Queue(), ())
        # A queue for each call: a region that is used twice in a pass has two backwards.
        self.queue = Queue()
        return Meanwhile(self.queue, tuple(self._weights()))

    def _weights(self) -> Iterable[Tensor]:
        for module, names in self._leaves:
            for name in names:
                leaf = module._parameters[name]
                if leaf is not None and leaf.requires_grad:
                    yield leaf
