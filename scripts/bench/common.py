"""What every bench shares: arguments, rows and bars, interleaved rounds, table and JSON record.

A bench measures one claim against the best peers in one interleaved run. It ends in a list of
`Row`s, each of which may carry a bar; the process exits 0 only if every bar holds. Rows that lose
stay in the record.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "hf_speed")

_BAR = re.compile(r"^(>=|<=|1\+-)([0-9.]+)$")


class Row(NamedTuple):
    """One measured comparison, as it stands in the JSON record."""

    claim: str
    """What is compared, unique within the bench."""
    shape: str
    """Model, ranks and dtype."""
    ours: float
    """Our figure, in `unit`."""
    peer: str
    """Who or what it is compared with; `ideal` for a formula."""
    theirs: float
    """The peer's figure, in `unit`."""
    unit: str
    """Unit of `ours` and `theirs`."""
    ratio: float
    """How the two compare; each bench says in its own docstring which way round."""
    bar: str | None
    """`>=x`, `<=x` or `1+-x` on `ratio`; None: reported, not judged."""
    holds: bool
    """Whether the ratio meets the bar; True where there is none."""
    runs: int
    """Measurements behind each figure."""
    spread: float
    """(max - min) / median of the ratio over the runs."""


def judge(ratio: float, bar: str | None) -> bool:
    """Say whether `ratio` meets `bar` (`>=x`, `<=x`, `1+-x`, or None, which any ratio meets).

    Raises:
        ValueError: the bar is written in another form.
    """
    if bar is None:
        return True
    match = _BAR.match(bar)
    if match is None:
        raise ValueError(f"bar {bar!r} is not of the form >=x, <=x or 1+-x.")
    limit = float(match[2])
    if match[1] == ">=":
        return ratio >= limit
    if match[1] == "<=":
        return ratio <= limit
    return abs(ratio - 1.0) <= limit


def make_row(
    claim: str,
    shape: str,
    *,
    ours: float,
    peer: str,
    theirs: float,
    unit: str,
    ratios: Sequence[float],
    bar: str | None,
) -> Row:
    """Build a row whose ratio is the median of `ratios`, one per round, and judge it."""
    ratio = statistics.median(ratios)
    spread = (max(ratios) - min(ratios)) / ratio if ratio else 0.0
    return Row(
        claim, shape, ours, peer, theirs, unit, ratio, bar, judge(ratio, bar), len(ratios), spread
    )


def parser(doc: str, *, out: str) -> argparse.ArgumentParser:
    """Give the argument parser with the options that all benches have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--quick", action="store_true", help="smaller model, fewer rounds: under 60 s on 2 cores"
    )
    made.add_argument("--json", type=Path, metavar="PATH", help="write the record to PATH")
    made.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write the record to DIR/{out}_<device>.json (cpu2, h200, ...)",
    )
    made.add_argument(
        "--only",
        default="",
        metavar="NAMES",
        help="comma list of systems to run, for development: an incomplete run never exits 0",
    )
    made.set_defaults(bench=out)
    return made


def device_label(device: str) -> str:
    """Name the machine as result files do: `cpu2` for two cores, `h200` for an H200."""
    if device == "cuda":
        import torch  # the CPU path of this module needs no torch

        words = torch.cuda.get_device_name().lower().split()
        return next((word for word in words if any(c.isdigit() for c in word)), words[-1])
    return f"cpu{len(os.sched_getaffinity(0))}"


def _git(*args: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(REPO), *args], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(
    rows: Sequence[Row], args: argparse.Namespace, *, device: str, complete: bool
) -> dict[str, object]:
    """Give the JSON record: commit, versions, device and rows."""
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "hf_speed", "scripts"))
    machine = {"label": device_label(device), "cpu": _cpu_name()}
    machine["cores"] = str(len(os.sched_getaffinity(0)))
    if device == "cuda":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "bench": args.bench,
        "commit": _git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "quick": args.quick,
        "complete": complete,
        "versions": _versions(),
        "device": machine,
        "rows": [row._asdict() for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out as text, one line each."""
    head = ("claim", "shape", "ours", "peer", "theirs", "unit", "ratio", "bar", "holds", "spread")
    body = [
        (
            row.claim,
            row.shape,
            f"{row.ours:.4g}",
            row.peer,
            f"{row.theirs:.4g}",
            row.unit,
            f"{row.ratio:.3f}",
            row.bar or "-",
            ("yes" if row.holds else "NO") if row.bar else "-",
            f"{row.spread:.1%}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
             for line in (head, tuple("-" * width for width in widths), *body)]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def finish(
    rows: Sequence[Row], args: argparse.Namespace, *, device: str = "cpu", complete: bool = True
) -> int:
    """Print the table, write the record where asked, and give the exit code.

    Returns:
        0 if the run was complete and every bar holds, else 1.
    """
    print(table(rows))
    if args.json or args.out:
        path = args.json or args.out / f"{args.bench}_{device_label(device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = record(rows, args, device=device, complete=complete)
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(f"\nwritten: {path}")
    missed = [row for row in rows if not row.holds]
    for row in missed:
        print(f"missed: {row.claim}: ratio {row.ratio:.3f}, bar {row.bar}")
    if not complete:
        print("incomplete: an option left something out, so this run proves nothing")
    return 0 if complete and not missed else 1


def interleave(
    runners: Mapping[str, Callable[[], float]], *, rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Call every runner once per round, in alternating order, and collect what each returns.

    Interleaving lets a slow phase of the machine fall on everybody, and the alternation takes away
    the advantage of a fixed place in the order.
    """
    found: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(rounds):
        order = list(runners) if index % 2 == 0 else list(runners)[::-1]
        for name in order:
            say(f"round {index + 1}/{rounds}: {name}")
            found[name].append(runners[name]())
    return found


def progress(message: str) -> None:
    """Show a line of progress on stderr, rewriting the last one on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{message}")
    else:
        sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
