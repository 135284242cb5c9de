"""What `hf-speed plan` prints of a mesh: the step, memory by pipeline rank, bytes sent by axis."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from hf_speed.config import ResolvedConfig
from hf_speed.config.tree import GIB

if TYPE_CHECKING:
    from hf_speed.engine.mesh_plan import MeshPlan, RankPlan
    from hf_speed.engine.workload import Workload

MEMORY = ("parameters", "gradients", "optimizer", "in flight", "staging", "activations")
SENT = ("data", "slices", "stages")


class Line(NamedTuple):
    """Pipeline ranks `first` to `last`, which are alike, and their cells."""

    first: int
    last: int
    cells: tuple[str, ...]

    @property
    def label(self) -> str:
        """`3`, or `1-62`."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def render_mesh(found: "MeshPlan", work: "Workload", resolved: ResolvedConfig) -> str:
    """A step on a mesh as text."""
    num_data = resolved.dp_replicate * resolved.dp_shard
    again = ", blocks recomputed" if work.recomputes else ""
    of_rows = f"{work.num_rows} rows of {work.num_tokens} tokens"
    lines = [f"A step of {of_rows} on each of {num_data} data-parallel ranks{again}"]
    if found.plan is not None:
        lines.append(
            f"{found.plan.schedule} with {found.plan.num_microbatches} microbatches on "
            f"{resolved.pp} pipeline ranks: they wait {found.bubble:.1%} of the time, where F, I "
            f"and W take as long as each other"
        )
    heads = ("layers", "M elements", *MEMORY)
    lines += ["", *_table("GiB per rank", heads, merged(found.ranks, _memory_cells))]
    lines.append(
        "Activations are by the formula in hf_speed/engine/workload.py; no plan counts them."
    )
    lines += ["", *_table("GiB sent", SENT, merged(found.ranks, _sent_cells))]
    lines.append(
        "To ranks of other batches, of the same layers, of other stages: each rank, a step."
    )
    return "\n".join(lines)


def merged(
    ranks: "Iterable[RankPlan]", cells_of: "Callable[[RankPlan], tuple[str, ...]]"
) -> Iterator[Line]:
    """One line for each stretch of neighbouring ranks that are alike."""
    line: Line | None = None
    for rank in ranks:
        cells = cells_of(rank)
        if line is not None and line.cells == cells:
            line = line._replace(last=rank.pp_rank)
            continue
        if line is not None:
            yield line
        line = Line(rank.pp_rank, rank.pp_rank, cells)
    if line is not None:
        yield line


def _memory_cells(rank: "RankPlan") -> tuple[str, ...]:
    state = rank.state
    kinds = (state.parameters, state.gradients, state.optimizer, state.in_flight, state.staging)
    layers = "+".join(str(count) for count in rank.num_layers)
    numbers = (f"{value / GIB:.3f}" for value in (*kinds, rank.activations))
    return (layers, f"{rank.numel / 1e6:,.1f}", *numbers)


def _sent_cells(rank: "RankPlan") -> tuple[str, ...]:
    return tuple(f"{value / GIB:.3f}" for value in rank.sent)


def _table(title: str, heads: tuple[str, ...], lines: Iterable[Line]) -> Iterator[str]:
    yield f"{title:<14}" + "".join(f"{head:>12}" for head in heads)
    for line in lines:
        yield f"  pp {line.label:<9}" + "".join(f"{cell:>12}" for cell in line.cells)
