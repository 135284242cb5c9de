"""The bytes that a plan says each rank sends, by axis, are those that it sends."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from hf_speed.config import load_config
from hf_speed.config.parallel import resolve_pipe
from hf_speed.engine import Engine
from hf_speed.engine.estimate import Estimator
from hf_speed.engine.shares import shares_of
from hf_speed.engine.traffic import (
    Gathers,
    Sent,
    gathers_of,
    sent_for_data,
    sent_for_slices,
    sent_for_stages,
)
from hf_speed.engine.workload import Workload, plan_of
from hf_speed.integrations.transformers.slice_plan import plan_for
from hf_speed.mesh import AxisGroup
from tests.engine.toys import NUM_COLUMNS, NUM_ROWS, VOCAB, global_batch, ranks_here, toy_model
from tests.support import run_ranks

BF16 = torch.bfloat16
PIPE = {"pp": 2}
SLICES = {"tp": 2}
BOTH = {"pp": 2, "tp": 2}
ONCE = {"schedule": "1f1b", "microbatches": 2}
OFTEN = {**ONCE, "gather": "microbatch"}
HIDDEN = 32


class Case(NamedTuple):
    """A step whose bytes are counted."""

    mesh: Mapping[str, int]
    stage: int
    dtype: torch.dtype | None = None
    pipe: Mapping[str, Any] = {}
    kind: str = "llama"
    sections: Mapping[str, Any] = {}
    recomputes: bool = False

    def tree(self) -> dict[str, Any]:
        """Its config."""
        sections = {name: dict(values) for name, values in self.sections.items()}
        zero = {"stage": self.stage, **sections.pop("zero", {})}
        return {**sections, "zero": zero, "mesh": dict(self.mesh), "pipe": dict(self.pipe)}


OF_2 = [
    Case(PIPE, 1, None, ONCE),
    Case(PIPE, 2, BF16, {"schedule": "zb_v", "microbatches": 4}),
    Case(PIPE, 1, BF16, {"schedule": "interleaved", "microbatches": 4}),
    Case(PIPE, 1, None, ONCE, "gpt2"),
    Case(SLICES, 0),
    Case(SLICES, 1, BF16),
    Case(SLICES, 1, BF16, sections={"tensor": {"sequence_parallel": True}}),
    Case(SLICES, 1, kind="bert"),
    Case(SLICES, 1, kind="gpt2", recomputes=True),
    Case(SLICES, 1, sections={"tensor": {"sequence_parallel": True}}, recomputes=True),
    *(Case({}, stage, BF16) for stage in (0, 2, 3)),
    Case({}, 3, None, sections={"zero": {"regather": False}}),
]
OF_4 = [
    *(Case(PIPE, stage, BF16, ONCE) for stage in (0, 1, 2, 3)),
    Case(PIPE, 3, None, {"microbatches": 2}),
    Case(PIPE, 2, BF16, {"schedule": "v_half", "microbatches": 2}),
    Case(PIPE, 3, BF16, OFTEN),
    Case(PIPE, 3, None, OFTEN, sections={"zero": {"regather": False}}),
    Case(PIPE, 3, BF16, {"schedule": "gpipe", "microbatches": 2, "gather": "microbatch"}),
    Case(PIPE, 0, None, ONCE, "gpt2"),
    Case(PIPE, 2, None, ONCE, "gpt2"),
    Case(BOTH, 1, BF16, ONCE),
    Case(BOTH, 3, None, ONCE, sections={"tensor": {"sequence_parallel": True}}),
    Case({**PIPE, "dp_replicate": 2}, 2, BF16, ONCE),
]


def _model(case: Case) -> Any:
    # A dropout that is not there would send the generator along.
    of_gpt2 = {"n_embd": HIDDEN, "summary_first_dropout": 0.0}
    wide = of_gpt2 if case.kind == "gpt2" else {"hidden_size": HIDDEN}
    model: Any = toy_model(case.kind, num_layers=4, **wide)
    if case.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _planned(case: Case, pp_rank: int, tp_rank: int, num_data: int) -> Sent:
    config = load_config(case.tree())
    with torch.device("meta"):
        model = _model(case)
    num_slices = config.mesh.tp
    slices = plan_for(model, num_slices) if num_slices > 1 else None
    share = shares_of(
        model, config, compute_dtype=case.dtype, slice_plan=slices, tp_rank=tp_rank
    ).ranks[pp_rank]
    itemsize = 4 if case.dtype is None else case.dtype.itemsize
    work = Workload(
        NUM_ROWS // num_data, NUM_COLUMNS, HIDDEN, VOCAB, itemsize, recomputes=case.recomputes
    )
    num_ranks = config.mesh.pp
    plan = plan_of(resolve_pipe(config), work, num_ranks=num_ranks)
    estimator = Estimator(share.units, config, world_size=ranks_here())
    gathers = gathers_of(config, plan.rows[pp_rank] if plan is not None else None)
    return Sent(
        sent_for_data(share.units, estimator, stage=case.stage, gathers=gathers),
        sent_for_slices(share, work, num_slices=num_slices),
        sent_for_stages(plan, work, rank=pp_rank) if plan is not None else 0,
    )


def _count(engine: Engine) -> Counter[str]:
    """Bytes of all but a few numbers, by what they are for, from now on."""
    found: Counter[str] = Counter()
    journal = engine.mesh.journal
    note, count = journal.note, journal.count

    def counting_note(
        operation: str, group: AxisGroup, *, num_bytes: int, sent: int
    ) -> Callable[[], None]:
        if operation not in ("all_reduce", "broadcast"):
            found["slices" if group.label.startswith("tp/") else "data"] += sent
        return note(operation, group, num_bytes=num_bytes, sent=sent)

    def counting_count(operation: str, sent: int) -> None:
        found["stages"] += sent
        count(operation, sent)

    journal.note, journal.count = counting_note, counting_count  # pyrefly: ignore
    return found


def _sent_and_planned(case: Case) -> tuple[Sent, Sent]:
    model = _model(case)
    engine = Engine.attach(
        model, load_config(case.tree()), compute_dtype=case.dtype, slice_planner=plan_for
    )
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    found: Counter[str] = Counter()
    for step in range(2):
        if step == 1:
            # The first tells shapes besides.
            found = _count(engine)
        batch = global_batch(case.kind, step)
        batch = {name: value.chunk(data.size)[data.rank] for name, value in batch.items()}
        engine.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    sent = Sent(found["data"], found["slices"], found["stages"])
    here = engine.mesh.coordinates
    planned = _planned(case, here["pp"], here["tp"], data.size)
    engine.detach()
    return sent, planned


def _all_cases(cases: list[Case]) -> list[tuple[Sent, Sent]]:
    return [_sent_and_planned(case) for case in cases]


@pytest.mark.parametrize("cases", [OF_2, OF_4], ids=["2 ranks", "4 ranks"])
def test_each_rank_sends_what_was_planned(cases: list[Case]) -> None:
    wrong = []
    for rank, found in enumerate(run_ranks(_all_cases, 2 if cases is OF_2 else 4, cases)):
        for case, (sent, planned) in zip(cases, found, strict=True):
            # The loss, a few bytes, may travel with the hidden states.
            if sent != pytest.approx(planned, rel=0, abs=16):
                wrong.append(f"rank {rank} {sent} {planned} {case}")
    assert not wrong, "\n".join(wrong)


def test_gathers_of_a_step() -> None:
    once, never = load_config({}), load_config({"zero": {"regather": False}})
    assert gathers_of(once, None) == Gathers(1, 1, 2)
    assert gathers_of(never, None) == Gathers(1, 1, 1)
