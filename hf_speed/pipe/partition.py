"""Dealing layers out to pipeline stages: pure arithmetic.

A stage is a stretch of consecutive layers. The slowest stage sets the pace, so the largest cost of
a stage is made as small as it can be, and of the ways to do that the most even one is taken.
"""

from itertools import accumulate
from typing import NamedTuple

from hf_speed.errors import ConfigError


class Costs(NamedTuple):
    """What each part of a model costs, in any one unit.

    Attributes:
        layers: of each layer.
        before: of what runs before the layers, on the first stage.
        after: of what runs after them, on the last.
    """

    layers: tuple[float, ...]
    before: float
    after: float


def partition(costs: Costs, num_stages: int) -> tuple[int, ...]:
    """The number of layers of each stage, every one at least 1.

    Args:
        costs: of the parts of the model.
        num_stages: at least 1.

    Raises:
        ConfigError: there are more stages than layers.
    """
    num_layers = len(costs.layers)
    if num_stages > num_layers:
        raise ConfigError(
            f"The pipeline has {num_stages} stages, but the model has {num_layers} layers, and a "
            f"stage needs one. Set mesh.pp (x pipe.chunks) to at most {num_layers}."
        )
    sums = (0.0, *accumulate(costs.layers))

    def cost(first: int, last: int) -> float:
        ends = (costs.before if first == 0 else 0.0) + (costs.after if last == num_layers else 0.0)
        return sums[last] - sums[first] + ends

    # best[k][n]: (largest cost, sum of squares, start of the last stage) of n layers on k stages.
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, num_stages + 1):
        row = {}
        for last in range(stage, num_layers - (num_stages - stage) + 1):
            row[last] = min(
                (max(largest, cost(first, last)), squares + cost(first, last) ** 2, first)
                for first, (largest, squares, _) in best[-1].items()
                if first < last
            )
        best.append(row)
    counts = []
    last = num_layers
    for stage in range(num_stages, 0, -1):
        first = best[stage][last][2]
        counts.append(last - first)
        last = first
    return tuple(reversed(counts))
