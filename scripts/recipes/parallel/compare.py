"""What 3D training left: its losses beside one process's, and its model in plain transformers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
"""Of losses, relative: the same sums in another order, in float32, over some tens of steps."""


def history(run: Path) -> list[dict[str, float]]:
    """Read what a run of the quickstart's train.py logged."""
    return json.loads((run / "history.json").read_text())["history"]


def logged(entries: list[dict[str, float]], key: str) -> dict[int, float]:
    """Give the values logged under `key`, by step."""
    return {int(entry["step"]): entry[key] for entry in entries if key in entry}


def table(one: dict[int, float], spread: dict[int, float]) -> tuple[str, bool]:
    """Lay out the losses of both runs, and say whether they agree."""
    if one.keys() != spread.keys() or not one:
        return f"the runs logged other steps: {sorted(one)} and {sorted(spread)}", False
    lines = [f"{'step':>6}{'1 process':>14}{'8 processes':>14}{'relative':>12}"]
    gaps = {step: abs(spread[step] - one[step]) / abs(one[step]) for step in one}
    for step, gap in gaps.items():
        lines.append(f"{step:>6}{one[step]:>14.6f}{spread[step]:>14.6f}{gap:>12.1e}")
    return "\n".join(lines), max(gaps.values()) <= TOLERANCE


def evaluate(model: Any, blocks: torch.Tensor) -> float:
    """Give the mean loss over blocks of equal length."""
    with torch.no_grad():
        losses = [float(model(input_ids=each, labels=each).loss) for each in blocks.split(8)]
    return sum(losses) / len(losses)


def main() -> None:
    """Print both comparisons; exit with 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--one", type=Path, required=True, help="output of the run of 1 process")
    parser.add_argument("--spread", type=Path, required=True, help="that of 8 processes")
    parser.add_argument("--eval_blocks", type=int, required=True)
    args = parser.parse_args()
    one, spread = history(args.one), history(args.spread)
    text, agree = table(logged(one, "loss"), logged(spread, "loss"))
    print(text)
    test_set = Dataset.load_from_disk(args.data / "dataset" / "test")
    blocks = torch.tensor(test_set[: args.eval_blocks]["input_ids"])
    last = max(args.spread.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    model = AutoModelForCausalLM.from_pretrained(last).eval()
    if any(name.partition(".")[0] == "hf_speed" for name in sys.modules):
        raise SystemExit("hf_speed was imported: this was to be plain transformers.")
    here, there = evaluate(model, blocks), list(logged(spread, "eval_loss").values())[-1]
    gap = abs(here - there) / there
    elements = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{type(model).__name__} with {elements:,} parameters, from {last}")
    print(f"evaluation: {there:.6f} on 8 processes, {here:.6f} in plain transformers ({gap:.1e})")
    if not agree or gap > TOLERANCE:
        raise SystemExit(f"They should agree within {TOLERANCE:g}.")
    print(f"both agree within {TOLERANCE:g}")


if __name__ == "__main__":
    main()
