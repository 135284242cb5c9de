"""Write README's bench tables from scripts/bench/results/*.json, between its two markers.

`--check` changes nothing and exits 1 if the README is not what the results say.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
RESULTS = REPO / "scripts" / "bench" / "results"
BEGIN = "<!-- benches: begin (scripts/bench/tables.py) -->"
END = "<!-- benches: end -->"


def render(record: dict[str, Any]) -> str:
    """Lay one record out in Markdown: where and with what it was measured, then the rows."""
    device, versions = record["device"], record["versions"]
    where = device.get("gpu") or f"{device['cpu']}, {device['cores']} cores"
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"#### {record['bench']}, {device['label']}",
        "",
        f"{where}; {used}; commit {record['commit'][:12]}, {record['date']}.",
        "",
        "| claim | shape | ours | against | theirs | unit | ratio | bar | holds | runs | spread |",
        "|---|---|---:|---|---:|---|---:|---|---|---:|---:|",
    ]
    for row in record["rows"]:
        holds = ("yes" if row["holds"] else "**no**") if row["bar"] else "-"
        lines.append(
            f"| {row['claim']} | {row['shape']} | {row['ours']:.4g} | {row['peer']} "
            f"| {row['theirs']:.4g} | {row['unit']} | {row['ratio']:.3f} | {row['bar'] or '-'} "
            f"| {holds} | {row['runs']} | {row['spread']:.1%} |"
        )
    return "\n".join(lines)


def render_all(results: Path) -> str:
    """Lay out every complete record of a folder, or say that there is none."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    sections = [render(record) for record in records if record["complete"]]
    return "\n\n".join(sections) if sections else "No full run is recorded yet."


def place(readme: str, tables: str) -> str:
    """Put `tables` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}.")
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}"


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    path = REPO / "README.md"
    now = path.read_text()
    wanted = place(now, render_all(RESULTS))
    if args.check:
        print("README.md is up to date" if now == wanted else "README.md is not up to date")
        return int(now != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
