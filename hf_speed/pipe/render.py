"""Pictures of plans: a text grid of ranks and time, an SVG, and the grid of a fault.

Cells are named by kind and microbatch, with a letter for the stage where a rank has several: `F3`,
`B0`, `I2b` (the input gradient of microbatch 2 on the rank's second stage).
"""

from hf_speed.pipe.action import Action
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.simulate import Costs, Event, simulate

IDLE = "."
LONGER = "-"
WINDOW = 8
"""Actions shown on each side of a fault."""


def grid(plan: Plan, costs: Costs | None = None) -> str:
    """A row a rank, a column a slot of time: the shortest action's. Idle slots are dots.

    A lowered plan is shown as its order instead, a column an action: messages take no slot.
    """
    if any(not action.kind.computes for _, action in plan.actions()):
        return _lines(plan, [[label(plan, action) for action in row] for row in plan.rows])
    events = simulate(plan, costs).events
    slot = min((event.end - event.start for row in events for event in row), default=1.0)
    width = 1 + max((len(label(plan, action)) for _, action in plan.actions()), default=1)
    return _lines(plan, [_slots(plan, row, slot, width) for row in events])


def fault(plan: Plan, message: str, *, rank: int, action: Action) -> str:
    """The message of an error in a plan: what is wrong, and the grid with the action marked."""
    at = plan.rows[rank].index(action) if action in plan.rows[rank] else 0
    first, stop = max(at - WINDOW, 0), at + WINDOW + 1
    cells = []
    for place, row in enumerate(plan.rows):
        names = [label(plan, other) for other in row]
        if place == rank and names:
            names[at] = f">{names[at]}<"
        more = ["..."] if stop < len(row) else []
        cells.append([*(["..."] if first else []), *names[first:stop], *more])
    where = f" (actions {first} to {stop - 1} of each rank)" if first else ""
    return f"The plan {plan.schedule!r} cannot run: {message}{where}.\n{_lines(plan, cells)}"


def label(plan: Plan, action: Action) -> str:
    """The short name of an action in a grid."""
    stages = plan.stages_of(plan.placement[action.stage])
    chunk = chr(ord("a") + stages.index(action.stage)) if len(stages) > 1 else ""
    return f"{action.kind}{action.microbatch if action.microbatch >= 0 else ''}{chunk}"


def _lines(plan: Plan, cells: list[list[str]]) -> str:
    width = max((len(cell) for row in cells for cell in row), default=0)
    digits = len(str(plan.num_ranks - 1))
    return "\n".join(
        f"rank {rank:>{digits}}  {' '.join(cell.ljust(width) for cell in row)}".rstrip()
        for rank, row in enumerate(cells)
    )


def _slots(plan: Plan, row: tuple[Event, ...], slot: float, width: int) -> list[str]:
    """One cell a slot; an action of several slots goes on in dashes."""
    cells: list[str] = []
    for event in row:
        # Rounded half up, and not half to even: slots of whole length then never overlap.
        first, stop = (int(moment / slot + 0.5 + 1e-9) for moment in (event.start, event.end))
        cells += [IDLE] * (first - len(cells))
        cells += [label(plan, event.action).ljust(width - 1)]
        cells += [LONGER * (width - 1)] * (stop - first - 1)
    return cells
