"""Which layers are on which pipeline stage, and which rank holds which parameter: names and counts.

Pure: a model's structure goes in, on `meta` if it likes, and nothing is built or changed.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hf_speed.config import ResolvedPipe
from hf_speed.errors import ConfigError
from hf_speed.pipe.body import Body
from hf_speed.pipe.partition import Costs, partition
from hf_speed.pipe.schedules import make_plan


class Dealing(NamedTuple):
    """How the layers of a model are dealt out.

    Attributes:
        counts: layers of each stage.
        placement: stage -> pipeline rank.
    """

    counts: tuple[int, ...]
    placement: tuple[int, ...]

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Layers of each stage of a pipeline rank."""
        pairs = zip(self.counts, self.placement, strict=True)
        return tuple(count for count, owner in pairs if owner == rank)


def deal_out(
    body: Body, pipe: ResolvedPipe, *, num_ranks: int, name: str, costs: Costs | None = None
) -> Dealing:
    """Deal the layers of `body` out to the stages of a schedule.

    Args:
        body: of the model.
        pipe: schedule, stages a rank, balance.
        num_ranks: of the pipeline.
        name: of the model's class, for messages.
        costs: what the parts of the model cost; None: by their parameters.

    Raises:
        ConfigError: there are more stages than layers, or pipe.balance deals out another number.
    """
    plan = make_plan(pipe.schedule, num_ranks=num_ranks, num_microbatches=1, chunks=pipe.chunks)
    num_layers = len(body.layers)
    if isinstance(pipe.balance, str):
        counts = partition(body.costs() if costs is None else costs, plan.num_stages)
        return Dealing(counts, plan.placement)
    if sum(pipe.balance) != num_layers:
        raise ConfigError(
            f"pipe.balance={list(pipe.balance)} deals out {sum(pipe.balance)} layers, but "
            f"{name} has {num_layers}. Let the counts add up to {num_layers}."
        )
    return Dealing(tuple(pipe.balance), plan.placement)


def ranks_by_path(body: Body, dealing: Dealing) -> dict[str, int]:
    """Path of each part that stages are made of -> pipeline rank that holds it."""
    first, last = dealing.placement[0], dealing.placement[-1]
    ranks = {place.path: first for place in body.before}
    ranks |= {place.path: last for place in body.after}
    stages = [stage for stage, count in enumerate(dealing.counts) for _ in range(count)]
    for place, stage in zip(body.layers, stages, strict=True):
        ranks[place.path] = dealing.placement[stage]
    return ranks


def homes_of(aliases: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """First name of each parameter -> pipeline ranks that hold it, the owner first.

    Args:
        aliases: every name of every parameter -> its first name.
        ranks: path of a module -> its pipeline rank; empty where there is no pipeline.
    """
    if not ranks:
        return dict.fromkeys(aliases.values(), (0,))
    homes: dict[str, set[int]] = {}
    for name, first in aliases.items():
        for path in prefixes(name):
            if path in ranks:
                homes.setdefault(first, set()).add(ranks[path])
    return {first: tuple(sorted(found)) for first, found in homes.items()}


def prefixes(path: str) -> Iterator[str]:
    """Paths of the modules around a parameter or a module, the outermost first, and itself."""
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
