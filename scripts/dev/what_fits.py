"""Write README's table "what fits where" from the planner, between its two markers.

`--check` changes nothing and exits 1 if the README is not what the planner says. The model is
Llama's of 13B with more or fewer blocks; the bytes are those of `hf-speed plan`.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_speed.cli.plan import billions
from hf_speed.config import Memory, SpeedConfig, load_config
from hf_speed.engine.capacity import Capacity, what_fits
from hf_speed.engine.planning import sizes_of

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- what fits where: begin (scripts/dev/what_fits.py) -->"
END = "<!-- what fits where: end -->"

GIB = 1 << 30
DISK = {"paths": ["/fast"]}
LEAN = {"precision": {"accumulate_dtype": "same"}, "offload": {"moments": "int8", **DISK}}


class Column(NamedTuple):
    """One machine and config; `memory` is one rank's."""

    title: str
    num_ranks: int
    memory: Memory
    config: SpeedConfig
    stage: int


def columns() -> list[Column]:
    """One small GPU, and eight large ones in one machine."""
    default = load_config({"offload": DISK})
    lean = load_config(LEAN)
    small = Memory(32 * GIB, 128 * GIB, 2048 * GIB)
    large = Memory(80 * GIB, 128 * GIB, 2048 * GIB)
    return [
        Column("1 GPU, stage 2", 1, small, default, 2),
        Column("1 GPU, stage 3", 1, small, default, 3),
        Column("1 GPU, stage 3, lean", 1, small, lean, 3),
        Column("8 GPUs, stage 1", 8, large, default, 1),
        Column("8 GPUs, stage 2", 8, large, default, 2),
        Column("8 GPUs, stage 3", 8, large, default, 3),
        Column("8 GPUs, stage 3, lean", 8, large, lean, 3),
    ]


def render() -> str:
    """The table in Markdown."""
    chosen = columns()
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=5120,
                intermediate_size=13824,
                num_hidden_layers=4,
                num_attention_heads=40,
                num_key_value_heads=40,
                vocab_size=32000,
            )
        )
    found: list[list[Capacity]] = []
    for column in chosen:
        units = sizes_of(model, column.config, compute_dtype=torch.bfloat16)
        found.append(
            what_fits(units, column.config, world_size=column.num_ranks, memory=column.memory)
        )
    heads = ["optimizer", "gradients", "parameters", *(column.title for column in chosen)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * len(chosen)]
    for rows in zip(*found, strict=True):
        numbers = [
            billions(row.numels[column.stage]) for row, column in zip(rows, chosen, strict=True)
        ]
        lines.append(f"| {' | '.join([*rows[0].tiers, *numbers])} |")
    return "\n".join(lines)


def place(readme: str, table: str) -> str:
    """Put `table` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}.")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    now = README.read_text()
    wanted = place(now, render())
    if arguments.check:
        print("README.md is up to date" if now == wanted else "README.md is not up to date")
        return int(now != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
