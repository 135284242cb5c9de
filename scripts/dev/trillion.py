"""Write the tables of a model of a trillion parameters into engine's README, between two markers.

What the planner says of a mesh that is not at hand: memory and bytes sent per rank, for each stage,
and the formulas beside what it counted. The model is the largest of Narayanan et al.
(arXiv:2104.04473, table 1), a GPT-2 that is never allocated.

`--check` changes nothing and exits 1 if the README is not what the planner says.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_speed.config import SpeedConfig, load_config, resolve
from hf_speed.engine.mesh_plan import MeshPlan, RankPlan, plan_mesh
from hf_speed.engine.shares import shares_of
from hf_speed.engine.workload import Workload, plan_of
from hf_speed.integrations.transformers.slice_plan import plan_for
from hf_speed.pipe.plan import Plan

README = Path(__file__).resolve().parents[2] / "hf_speed" / "engine" / "README.md"
BEGIN = "<!-- trillion: begin (scripts/dev/trillion.py) -->"
END = "<!-- trillion: end -->"

GIB = 1 << 30
LAYERS, HIDDEN, HEADS, WORDS, TOKENS = 128, 25600, 160, 51200, 2048
STAGES, SLICES, DATA = 64, 8, 8
ROWS = 256
"""Of each data-parallel rank, one a microbatch."""
ITEMSIZE = 2


class Row(NamedTuple):
    """A config of the table."""

    title: str
    stage: int
    pipe: Mapping[str, Any]


ROWS_OF_TABLE = (
    Row("0", 0, {}),
    Row("1", 1, {}),
    Row("2", 2, {}),
    Row("3, gathered once a step", 3, {}),
    Row("3, once a microbatch, `1f1b`", 3, {"schedule": "1f1b", "gather": "microbatch"}),
)


class Planned(NamedTuple):
    """What the planner says of one row."""

    row: Row
    mesh: MeshPlan

    @property
    def middle(self) -> RankPlan:
        """A rank with layers alone."""
        return self.mesh.ranks[STAGES // 2]

    @property
    def fullest(self) -> RankPlan:
        """The rank with most bytes."""
        return max(self.mesh.ranks, key=lambda rank: rank.state.total + rank.activations)


class Found(NamedTuple):
    """What the planner says of the model: its elements, and every row."""

    numel: int
    rows: list[Planned]


def workload() -> Workload:
    """A step of one data-parallel rank, with blocks recomputed."""
    return Workload(ROWS, TOKENS, HIDDEN, WORDS, ITEMSIZE, recomputes=True)


def config_of(row: Row) -> SpeedConfig:
    """The config of a row."""
    return load_config(
        {
            "mesh": {"pp": STAGES, "tp": SLICES, "dp_shard": DATA},
            "pipe": {"microbatches": ROWS, **row.pipe},
            "zero": {"stage": row.stage},
        }
    )


def plan_all() -> Found:
    """Plan every row of the table."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=WORDS, n_positions=TOKENS
            )
        )
    # Stages and slices are the same in every row, schedules in most.
    slices = plan_for(model, SLICES)
    first = config_of(ROWS_OF_TABLE[0])
    shares = shares_of(model, first, compute_dtype=torch.bfloat16, slice_plan=slices)
    plans: dict[str, Plan | None] = {}
    found = []
    for row in ROWS_OF_TABLE:
        config = config_of(row)
        resolved = resolve(config, world_size=STAGES * SLICES * DATA, param_dtype=torch.bfloat16)
        name = resolved.pipe.schedule
        if name not in plans:
            plans[name] = plan_of(resolved.pipe, workload(), num_ranks=STAGES)
        found.append(
            Planned(row, plan_mesh(shares, config, resolved, workload(), plan=plans[name]))
        )
    return Found(sum(each.numel() for each in model.parameters()), found)


class Formula(NamedTuple):
    """One line of the second table.

    Attributes:
        what: it is about.
        text: the formula.
        value: by the formula.
        counted: by the planner, on a rank in the middle of the pipeline.
        unit: of both.
    """

    what: str
    text: str
    value: float
    counted: float
    unit: str

    def cells(self) -> list[str]:
        """Its line."""
        if self.unit == "%":
            return [self.what, self.text, f"{self.value:.2%}", f"{self.counted:.2%}"]
        scale = {"GiB": GIB, "billion": 1e9}[self.unit]
        numbers = [f"{value / scale:,.2f} {self.unit}" for value in (self.value, self.counted)]
        return [self.what, self.text, *numbers]


def formulas_of_memory(found: Found) -> list[Formula]:
    """What a rank in the middle holds."""
    zero, one, _, three, _ = (each.middle for each in found.rows)
    whole = 12 * LAYERS * HIDDEN**2
    extra = 13 / (12 * HIDDEN) + (WORDS + TOKENS) / (12 * LAYERS * HIDDEN)
    part, per_rank = whole / (STAGES * SLICES), LAYERS // STAGES
    inputs = LAYERS * TOKENS * HIDDEN * ITEMSIZE
    of_states = [
        ("parameters, stages 0-2", "2 p", 2 * part, one.state.parameters),
        ("gradients, stage 0", "4 p", 4 * part, zero.state.gradients),
        ("gradients, stages 1-3", "4 p / N", 4 * part / DATA, three.state.gradients),
        ("masters and Adam, stage 0", "12 p", 12 * part, zero.state.optimizer),
        ("masters and Adam, stages 1-3", "12 p / N", 12 * part / DATA, three.state.optimizer),
        (
            "in flight, stages 0-2: sums, two buffers of a block",
            "4 p + 4 p S / L",
            4 * part + 4 * part / per_rank,
            one.state.in_flight,
        ),
        ("in flight, stage 3: sums, values", "4 p + 2 p", 6 * part, three.state.in_flight),
        ("kept by S microbatches: L / S inputs", "L s h e", inputs, zero.activations),
    ]
    return [
        Formula(
            "P, of the model",
            "12 L h^2 (1 + 13 / 12 h + (V + s) / 12 L h)",
            whole * (1 + extra),
            found.numel,
            "billion",
        ),
        Formula("p, of a rank", "12 L h^2 / (S T)", part, zero.numel, "billion"),
        *(Formula(*each, "GiB") for each in of_states),
    ]


def formulas_of_step(found: Found) -> list[Formula]:
    """What it sends, and how long it waits."""
    sent = found.rows[3].middle.sent
    part, per_rank = 12 * LAYERS * HIDDEN**2 / (STAGES * SLICES), LAYERS // STAGES
    state = workload().state_bytes
    others, peers, before = (DATA - 1) / DATA, (SLICES - 1) / SLICES, STAGES - 1
    of_bytes = [
        ("sent for data, stages 0-3", "(N - 1) / N (2 p + 2 p)", others * 4 * part, sent.data),
        (
            "sent for slices: 4 sums a layer, 1 repeated",
            "10 (T - 1) / T b s h e L / S",
            10 * peers * state * per_rank,
            sent.slices,
        ),
        ("sent to other stages", "2 b s h e", 2 * state, sent.stages),
    ]
    first, last = found.rows[0].mesh.bubble, found.rows[-1].mesh.bubble
    waits = [
        ("waits, `zb_h1`", "(S - 1) / (3 m + S - 1)", before / (3 * ROWS + before), first),
        ("waits, `1f1b`", "(S - 1) / (m + S - 1)", before / (ROWS + before), last),
    ]
    return [
        *(Formula(*each, "GiB") for each in of_bytes),
        *(Formula(*each, "%") for each in waits),
    ]


def render(found: Found) -> str:
    """Both tables in Markdown."""
    tokens = ROWS * DATA * TOKENS
    heads = ["zero.stage", "parameters", "gradients", "optimizer", "in flight", "activations"]
    heads += ["together", "for data", "for slices", "to stages", "waits"]
    setting = (
        f"GPT-2 of {found.numel / 1e9:,.0f} billion parameters: L = {LAYERS} layers, h = {HIDDEN}, "
        f"{HEADS} heads, V = {WORDS} words. S x T x N = {STAGES} x {SLICES} x {DATA} = pp x tp x "
        f"dp_shard, {STAGES * SLICES * DATA} ranks. b = m = {ROWS} rows of s = {TOKENS} tokens on "
        f"each data-parallel rank, one a microbatch ({tokens / 1e6:.1f} million tokens a step). "
        f"bf16 (e = {ITEMSIZE}), fp32 masters and sums, Adam; blocks recomputed; `zb_h1` unless "
        f"said."
    )
    lines = [
        setting,
        "",
        "GiB on the fullest rank (one with the embedding), and GiB that it sends in a step:",
        "",
        f"| {' | '.join(heads)} |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    for each in found.rows:
        rank = each.fullest
        state = rank.state
        kinds = (state.parameters, state.gradients, state.optimizer, state.in_flight)
        amounts = (*kinds, rank.activations, state.total + rank.activations, *rank.sent)
        cells = [f"{amount / GIB:,.1f}" for amount in amounts]
        lines.append(f"| {' | '.join([each.row.title, *cells, f'{each.mesh.bubble:.1%}'])} |")
    lines += [
        "",
        "A rank in the middle, with L / S layers alone, by the formulas and by the planner:",
        "",
        "| | formula | gives | planner |",
        "|---|---|---:|---:|",
    ]
    both = (*formulas_of_memory(found), *formulas_of_step(found))
    return "\n".join([*lines, *(f"| {' | '.join(each.cells())} |" for each in both)])


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


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    now = README.read_text()
    wanted = place(now, render(plan_all()))
    if arguments.check:
        print("README.md is up to date" if now == wanted else "README.md is not up to date")
        return int(now != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
