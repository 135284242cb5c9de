"""Pictures of plans: a text grid of ranks and time, an SVG, and the grid of a fault.

Cells are named by kind and microbatch, with a letter for the stage where a rank has several: `F3`,
`B0`, `I2b` (the input gradient of microbatch 2 on the rank's second stage).
"""

from collections.abc import Iterator
from html import escape

from hf_speed.pipe.action import Action, Kind
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.simulate import Costs, Event, simulate

IDLE = "."
LONGER = "-"
WINDOW = 8
"""Actions shown on each side of a fault."""

COLOURS: dict[Kind, tuple[str, str]] = {
    Kind.FORWARD: ("#7fb2e5", "forward"),
    Kind.BACKWARD: ("#76b7b2", "backward, whole"),
    Kind.INPUT: ("#f28e2b", "input gradient"),
    Kind.WEIGHT: ("#8cd17d", "weight gradient"),
}
CELL, LINE, LEFT, TOP = 24, 26, 60, 44
"""Pixels: the shortest action, a rank's line, and what is left of and above them."""
LATER_STAGES = 0.55
"""Opacity of the fill for a rank's other stages than the first."""


def grid(plan: Plan, costs: Costs | None = None) -> str:
    """A row a rank, a column a slot of time: the shortest action's. Idle slots are dots.

    A lowered plan is shown as its order instead, a column an action: messages take no slot.

    Raises:
        ConfigError: the plan deadlocks.
    """
    if any(not action.kind.computes for _, action in plan.actions()):
        return _lines([[label(plan, action) for action in row] for row in plan.rows])
    events = simulate(plan, costs).events
    slot = _slot(events)
    return _lines([_slots(plan, row, slot) for row in events])


def fault(plan: Plan, message: str, *, rank: int, action: Action | None) -> str:
    """The message of an error in a plan: what is wrong, and the grid with the action marked.

    Args:
        plan: where it is wrong.
        message: what is wrong.
        rank: whose action is marked.
        action: which; None where the fault is that one is missing.
    """
    index = plan.rows[rank].index(action) if action is not None else 0
    first, stop = max(index - WINDOW, 0), index + WINDOW + 1
    cells = []
    for place, row in enumerate(plan.rows):
        names = [_safe_label(plan, other) for other in row]
        if action is not None and place == rank:
            names[index] = f">{names[index]}<"
        more = ["..."] if stop < len(row) else []
        cells.append([*(["..."] if first else []), *names[first:stop], *more])
    return f"The plan {plan.schedule!r} cannot run: {message}.\n{_lines(cells)}"


def svg(plan: Plan, costs: Costs | None = None) -> str:
    """The same picture as `grid`, to scale and in colours, with a legend, as an SVG document.

    Raises:
        ConfigError: the plan deadlocks.
    """
    simulation = simulate(plan, costs)
    scale = CELL / _slot(simulation.events)
    width = LEFT + simulation.makespan * scale + 10
    height = TOP + LINE * plan.num_ranks + 10
    title = (
        f"{plan.schedule}: {plan.num_ranks} ranks, {plan.num_stages} stages, "
        f"{plan.num_microbatches} microbatches, bubble {simulation.bubble:.1%}"
    )
    used = {action.kind for _, action in plan.actions()}
    size = f'width="{width:.0f}" height="{height}"'
    font = 'font-family="sans-serif" font-size="11"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f"<title>{escape(title)}</title>",
        f'<rect {size} fill="white"/>',
        f'<text x="10" y="16" font-weight="bold">{escape(title)}</text>',
        *_legend(
            [kind for kind in COLOURS if kind in used], several=plan.num_stages > plan.num_ranks
        ),
    ]
    for rank, row in enumerate(simulation.events):
        top = TOP + rank * LINE
        lines.append(f'<text x="10" y="{top + 16}">rank {rank}</text>')
        lines.append(
            f'<rect x="{LEFT}" y="{top}" width="{simulation.makespan * scale:.1f}" '
            f'height="{LINE - 2}" fill="#eeeeee"/>'
        )
        for event in row:
            lines += _box(plan, event, LEFT + event.start * scale, top, scale)
    return "\n".join([*lines, "</svg>", ""])


def label(plan: Plan, action: Action) -> str:
    """The short name of an action in a grid."""
    stages = plan.stages_of(plan.placement[action.stage])
    chunk = chr(ord("a") + stages.index(action.stage)) if len(stages) > 1 else ""
    return f"{action.kind}{action.microbatch if action.microbatch >= 0 else ''}{chunk}"


def _safe_label(plan: Plan, action: Action) -> str:
    """Of a plan that may be wrong: a stage that there is not keeps its number."""
    if 0 <= action.stage < len(plan.placement):
        return label(plan, action)
    return f"{action.kind}{action.microbatch}(stage {action.stage})"


def _slot(events: tuple[tuple[Event, ...], ...]) -> float:
    return min((event.end - event.start for row in events for event in row), default=1.0)


def _lines(cells: list[list[str]]) -> str:
    width = max((len(cell) for row in cells for cell in row), default=0)
    digits = len(str(len(cells) - 1))
    return "\n".join(
        f"rank {rank:>{digits}}  {' '.join(_padded(cell, width) for cell in row)}".rstrip()
        for rank, row in enumerate(cells)
    )


def _padded(cell: str, width: int) -> str:
    return cell.ljust(width, LONGER if cell == LONGER else " ")


def _slots(plan: Plan, row: tuple[Event, ...], slot: float) -> list[str]:
    """One cell a slot; an action of several slots goes on in dashes."""
    cells: list[str] = []
    for event in row:
        # Rounded half up, and not half to even: slots of whole length then never overlap.
        first, stop = (int(moment / slot + 0.5 + 1e-9) for moment in (event.start, event.end))
        cells += [IDLE] * (first - len(cells))
        cells += [label(plan, event.action), *[LONGER] * (stop - first - 1)]
    return cells


def _legend(kinds: list[Kind], *, several: bool) -> Iterator[str]:
    for place, kind in enumerate(kinds):
        colour, meaning = COLOURS[kind]
        left = 10 + place * 130
        yield f'<rect x="{left}" y="24" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{left + 16}" y="34">{kind} {meaning}</text>'
    if several:
        yield f'<text x="{10 + len(kinds) * 130}" y="34">paler: the later stages of a rank</text>'


def _box(plan: Plan, event: Event, left: float, top: int, scale: float) -> Iterator[str]:
    colour, _ = COLOURS[event.action.kind]
    stages = plan.stages_of(plan.placement[event.action.stage])
    opacity = 1.0 if event.action.stage == stages[0] else LATER_STAGES
    width = (event.end - event.start) * scale
    yield (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{LINE - 2}" fill="{colour}" '
        f'fill-opacity="{opacity}" stroke="white"><title>{event.action}</title></rect>'
    )
    yield (
        f'<text x="{left + width / 2:.1f}" y="{top + 16}" text-anchor="middle">'
        f"{event.action.microbatch}</text>"
    )
