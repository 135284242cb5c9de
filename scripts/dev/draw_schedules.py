"""Write the table and the pictures of the schedules into pipe's README, between its two markers.

`--check` changes nothing and exits 1 if the README is not what the simulator and the renderer say.
`--svg FOLDER` writes each picture as an SVG there as well.
"""

import argparse
from pathlib import Path

from hf_speed.pipe.plan import Plan
from hf_speed.pipe.render import grid, svg
from hf_speed.pipe.schedules import SCHEDULES, make_plan
from hf_speed.pipe.simulate import simulate

README = Path(__file__).resolve().parents[2] / "hf_speed" / "pipe" / "README.md"
BEGIN = "<!-- schedules: begin (scripts/dev/draw_schedules.py) -->"
END = "<!-- schedules: end -->"

TABLE = ((4, 16), (8, 16))
"""(ranks, microbatches) of the table's columns."""
PICTURE = (3, 5)
"""(ranks, microbatches) of the pictures: the fewest at which ZB-H2 and ZB-V have no gap."""


def render() -> str:
    """The table and the pictures in Markdown."""
    return "\n".join([*_table(), *(line for name in SCHEDULES for line in _picture(name))])


def place(readme: str, text: str) -> str:
    """Put `text` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}.")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def write_svgs(folder: Path) -> None:
    """One SVG a schedule, named by it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCHEDULES:
        (folder / f"{name}.svg").write_text(svg(_plan(name, *PICTURE)))


def _plan(name: str, num_ranks: int, num_microbatches: int) -> Plan:
    return make_plan(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def _table() -> list[str]:
    heads = ["schedule", "stages a rank"]
    for num_ranks, num_microbatches in TABLE:
        heads += [f"p={num_ranks}, m={num_microbatches}: bubble", "own span", "peak"]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|" + "---:|" * 3 * len(TABLE)]
    for name in SCHEDULES:
        cells = [f"`{name}`", str(_plan(name, 2, 2).num_stages // 2)]
        for num_ranks, num_microbatches in TABLE:
            plan = _plan(name, num_ranks, num_microbatches)
            found = simulate(plan)
            peak = max(found.peak_activations) * num_ranks / plan.num_stages
            cells += [f"{found.bubble:.1%}", f"{found.span_bubble:.1%}", f"{peak:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _picture(name: str) -> list[str]:
    plan = _plan(name, *PICTURE)
    found = simulate(plan)
    peak = max(found.peak_activations) * plan.num_ranks / plan.num_stages
    head = f"`{name}`: bubble {found.bubble:.1%} (own span {found.span_bubble:.1%}), peak {peak:g}"
    return ["", head, "```", grid(plan), "```"]


def main() -> int:
    """Write the README and the SVGs, or check the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="write SVGs there")
    arguments = parser.parse_args()
    if arguments.svg is not None:
        write_svgs(arguments.svg)
    now = README.read_text()
    wanted = place(now, render())
    if arguments.check:
        print("README.md is up to date" if now == wanted else "README.md is not up to date")
        return int(now != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
