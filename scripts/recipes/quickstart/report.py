"""What the quickstart measured: the table of bytes, the proof of the resume, and the loss curve."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STATE = ("parameters", "gradients", "optimizer state")
TOLERANCE = 1e-6
"""Of losses after a resume on the same number of processes; they should be equal."""

MOVED_TOLERANCE = 1e-4
"""Of losses after a resume on another number: the same sums in another order, in fp32, whose
differences of 1e-7 (what 20 steps showed on a CPU) may grow with every step that follows."""


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def bytes_table(plain: list[dict[str, int]], sharded: list[dict[str, int]]) -> str:
    """Lay out the bytes alive per rank beside plain PyTorch's."""
    names = [f"rank {rank} of {len(sharded)}" for rank in range(len(sharded))]
    lines = [f"{'bytes alive per process':<26}{'plain PyTorch':>16}" + "".join(
        f"{name:>16}" for name in names)]  # fmt: skip
    columns = [plain[0], *sharded]
    rows = [(kind, [counted[kind] for counted in columns]) for kind in STATE]
    state = [sum(counted[kind] for kind in STATE) for counted in columns]
    rows += [("training state", state)]
    rows += [("in flight, staging, rest", [counted["other"] for counted in columns])]
    disk = [counted["disk"] for counted in columns]
    rows += [("all of it in memory", [sum(c.values()) - c["disk"] for c in columns])]
    rows += [("on disk (moments)", disk)]
    for kind, numbers in rows:
        lines.append(f"{kind:<26}" + "".join(f"{number:>16,}" for number in numbers))
    kept = max(state[1:]) / state[0]
    lines.append(f"the largest rank keeps {kept:.1%} of plain PyTorch's training state in memory;")
    lines.append("units in flight are a fixed number of blocks, and staging to and from the disk a")
    lines.append("fixed number of bytes, whatever the size of the model")
    return "\n".join(lines)


def after(history: list[dict[str, float]], step: int) -> list[dict[str, float]]:
    """Give the entries logged after `step`: a resumed run's history repeats the earlier ones."""
    return [entry for entry in history if entry["step"] > step]


def losses(history: list[dict[str, float]], key: str) -> dict[int, float]:
    """Give the values logged under `key`, by step."""
    return {int(entry["step"]): entry[key] for entry in history if key in entry}


def compare(
    first: dict[int, float], resumed: dict[int, float], tolerance: float = TOLERANCE
) -> tuple[str, bool]:
    """Lay out the steps that both runs trained, and say whether their losses agree."""
    common = sorted(first.keys() & resumed.keys())
    if not common:
        return "the resumed run trained no step of the first", False
    lines = [f"{'step':>6}{'first run':>14}{'resumed':>14}{'difference':>14}"]
    for step in common:
        gap = abs(first[step] - resumed[step])
        lines.append(f"{step:>6}{first[step]:>14.6f}{resumed[step]:>14.6f}{gap:>14.1e}")
    worst = max(abs(first[step] - resumed[step]) / first[step] for step in common)
    lines.append(
        f"largest relative difference of {len(common)} logged losses: {worst:.1e} "
        f"(at most {tolerance:.0e})"
    )
    return "\n".join(lines), worst <= tolerance


def draw(path: Path, runs: list[tuple[list[Any], str, str]], resumed_at: int) -> None:
    """Draw training and evaluation losses of all runs, with the step of the resume.

    Args:
        path: of the picture.
        runs: history, line style, name.
        resumed_at: step.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for history, style, name in runs:
        for key, colour, what in (("loss", "C0", "training"), ("eval_loss", "C1", "evaluation")):
            points = losses(history, key)
            axes.plot(
                list(points),
                list(points.values()),
                style,
                color=colour,
                fillstyle="none",
                label=f"{what}, {name}",
            )
    axes.axvline(resumed_at, color="grey", linestyle=":", label=f"resumed at step {resumed_at}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Llama on the standard library")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Print the report; 1 if the losses after a resume differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the quickstart's output folder")
    parser.add_argument("--resumed-at", type=int, required=True)
    args = parser.parse_args()
    first = read(args.out / "run/history.json")["history"]
    print(bytes_table(read(args.out / "bytes_plain.json"), read(args.out / "bytes_zero3.json")))
    runs, failed = [(first, "-", "first run")], []
    for folder, num_processes, style, tolerance in (
        ("resumed", 2, "o", TOLERANCE),
        ("resumed_on_1", 1, "x", MOVED_TOLERANCE),
    ):
        found = read(args.out / folder / "history.json")
        if found["world_size"] != num_processes:
            failed.append(f"{folder} ran on {found['world_size']} processes, not {num_processes}")
        resumed = after(found["history"], args.resumed_at)
        text, same = compare(losses(first, "loss"), losses(resumed, "loss"), tolerance)
        print(f"\nResumed at step {args.resumed_at} on {num_processes} process(es):\n{text}")
        runs.append((resumed, style, f"resumed on {num_processes}"))
        if not same:
            failed.append(f"losses after the resume on {num_processes} differ by more than "
                          f"{tolerance:.0e}")  # fmt: skip
    curve = losses(first, "loss")
    evaluated = losses(first, "eval_loss")
    print(
        f"\ntraining loss {curve[min(curve)]:.3f} at step {min(curve)}, "
        f"{curve[max(curve)]:.3f} at step {max(curve)}; "
        f"evaluation loss {evaluated[max(evaluated)]:.3f}"
    )
    draw(args.out / "loss.png", runs, args.resumed_at)
    print(f"loss curve: {args.out / 'loss.png'}")
    for text in failed:
        print(f"FAILED: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
