"""The bytes planned for a rank of a pipeline, or for slices of layers, are those it then holds."""

import tempfile
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hf_speed.config import SpeedConfig, TierBytes, Tiers, load_config
from hf_speed.engine import Engine
from hf_speed.engine.estimate import Estimator, GroupSize
from hf_speed.engine.planning import sizes_of
from hf_speed.engine.shares import Share, Shares, shares_of
from hf_speed.errors import ConfigError
from hf_speed.integrations.transformers.slice_plan import plan_for
from tests.engine.test_estimate import bytes_alive
from tests.engine.test_estimate_tiers import held_by
from tests.engine.toys import global_batch, ranks_here, toy_model
from tests.support import run_ranks

BF16 = torch.bfloat16
ONCE = {"schedule": "1f1b", "microbatches": 2}
OFTEN = {**ONCE, "gather": "microbatch"}


class Case(NamedTuple):
    """A training whose bytes are counted."""

    mesh: Mapping[str, int]
    stage: int
    dtype: torch.dtype | None = None
    pipe: Mapping[str, Any] = {}
    kind: str = "llama"
    num_backwards: int = 1
    sections: Mapping[str, Any] = {}

    def config(self) -> SpeedConfig:
        """Its config."""
        tree: dict[str, Any] = {section: dict(values) for section, values in self.sections.items()}
        tree["mesh"] = dict(self.mesh)
        tree["pipe"] = dict(self.pipe)
        tree.setdefault("zero", {})["stage"] = self.stage
        return load_config(tree)


PIPE = {"pp": 2}
SLICES = {"tp": 2}
BOTH = {"pp": 2, "tp": 2}
OF_2 = [
    *(Case(PIPE, *each, ONCE) for each in product((0, 1, 2, 3), (None, BF16))),
    Case(PIPE, 1, BF16, {"microbatches": 2}),
    Case(PIPE, 2, BF16, {"schedule": "interleaved", "microbatches": 2}),
    Case(PIPE, 3, BF16, {"schedule": "zb_v", "microbatches": 4}),
    Case(PIPE, 3, BF16, OFTEN),
    Case(PIPE, 3, BF16, OFTEN, sections={"zero": {"prefetch_units": 0}}),
    Case(PIPE, 3, BF16, OFTEN, sections={"zero": {"regather": False}}),
    *(Case(PIPE, stage, BF16, ONCE, num_backwards=2) for stage in (0, 3)),
    *(Case(PIPE, stage, dtype, ONCE, "gpt2") for stage in (1, 3) for dtype in (None, BF16)),
    *(Case(SLICES, *each) for each in product((0, 3), (None, BF16))),
    Case(SLICES, 1, BF16, sections={"tensor": {"sequence_parallel": True}}),
    Case(SLICES, 2, BF16, kind="gpt2"),
    Case(SLICES, 1, BF16, kind="bert"),
]
OF_4 = [
    *(Case(PIPE, *each, ONCE) for each in product((0, 3), (None, BF16))),
    Case(PIPE, 1, None, ONCE),
    Case(PIPE, 3, None, OFTEN),
    *(Case(PIPE, stage, BF16, ONCE, "gpt2") for stage in (0, 2)),
    *(Case(BOTH, stage, BF16, ONCE) for stage in (0, 1, 3)),
    Case(BOTH, 3, None, ONCE, "gpt2"),
    Case({**PIPE, "dp_replicate": 2}, 3, BF16, ONCE),
    Case(SLICES, 3, BF16, sections={"tensor": {"sequence_parallel": True}}),
]


def _model(kind: str) -> nn.Module:
    if kind == "llama":
        return toy_model(kind, num_layers=6, hidden_size=64, intermediate_size=96)
    wide = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    return toy_model(kind, num_layers=6, **wide)


def _shares(case: Case, *, tp_rank: int = 0) -> Shares:
    """What is planned, from a model without values."""
    with torch.device("meta"):
        model = _model(case.kind)
    config = case.config()
    slices = plan_for(model, config.mesh.tp) if config.mesh.tp > 1 else None
    return shares_of(model, config, compute_dtype=case.dtype, slice_plan=slices, tp_rank=tp_rank)


class Found(NamedTuple):
    """What a rank holds and what was planned for it."""

    alive: int
    estimated: int
    numel: int
    planned_numel: int


def _alive_and_estimated(case: Case) -> Found:
    """Bytes of what an engine holds at the end of its second step, and the estimate."""
    model, config = _model(case.kind), case.config()
    engine = Engine.attach(model, config, compute_dtype=case.dtype, slice_planner=plan_for)
    numel = sum(parameter.numel() for group in engine.parts.groups for parameter in _of(group))
    optimizer = torch.optim.AdamW(model.parameters())
    engine.bind_optimizer(optimizer)
    data = engine.mesh.axis("dp_replicate", "dp_shard")
    freed = _count_freed(engine)
    for step in range(2):
        freed.clear()
        for backward in range(case.num_backwards):
            engine.sync_gradients = backward == case.num_backwards - 1
            batch = global_batch(case.kind, step)
            batch = {name: value.chunk(data.size)[data.rank] for name, value in batch.items()}
            engine.backward(model(**batch).loss)
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    engine.parts.stepper.make_ready()  # As far as the update itself.
    here = engine.mesh.coordinates
    share = _shares(case, tp_rank=here["tp"]).ranks[here["pp"]]
    estimator = Estimator(share.units, config, world_size=ranks_here())
    accumulates = case.num_backwards > 1
    estimate = estimator.at(case.stage, accumulates=accumulates).total
    alive = bytes_alive(engine, optimizer) + sum(freed)
    engine.detach()
    return Found(alive, estimate, numel, share.numel)


def _count_freed(engine: Engine) -> list[int]:
    """Bytes of buffers that the pool gets back while someone looks into them: it lets them go.

    They are alive until the end of a reduction, when all others are there too.
    """
    freed: list[int] = []
    pool = engine.parts.pool
    give = pool.give

    def count(buffer: torch.Tensor) -> None:
        before = pool.bytes_allocated
        give(buffer)
        freed.append(before - pool.bytes_allocated)

    pool.give = count  # pyrefly: ignore
    return freed


def _of(group: Any) -> list[torch.Tensor]:
    return [entry.parameter for entry in group.entries]


def _all_cases(cases: list[Case]) -> list[Found]:
    return [_alive_and_estimated(case) for case in cases]


@pytest.mark.parametrize("cases", [OF_2, OF_4], ids=["2 ranks", "4 ranks"])
def test_each_rank_holds_what_was_estimated(cases: list[Case]) -> None:
    wrong = []
    for rank, found in enumerate(run_ranks(_all_cases, 2 if cases is OF_2 else 4, cases)):
        for case, each in zip(cases, found, strict=True):
            assert each.numel == each.planned_numel, case
            # The state of a single element is not counted as one.
            if each.alive != pytest.approx(each.estimated, rel=1e-4):
                wrong.append(f"{each.estimated / each.alive:.3f} rank {rank} {each} {case}")
    assert not wrong, "\n".join(wrong)


class TierCase(NamedTuple):
    """A pipeline whose states are on tiers."""

    stage: int
    tiers: Tiers
    offload: Mapping[str, Any] = {}
    gather: str = "step"


TIERS = [
    TierCase(1, Tiers("host", "device", "device")),
    TierCase(2, Tiers("disk", "disk", "host")),
    TierCase(3, Tiers("disk", "disk", "disk"), {"step": "delayed"}),
    TierCase(3, Tiers("disk", "host", "disk"), gather="microbatch"),
]


def _held_on_tiers(case: TierCase) -> tuple[TierBytes, TierBytes]:
    """What three steps of a pipeline have held on each tier, and the estimate."""
    with tempfile.TemporaryDirectory() as path:
        offload = {**case.tiers._asdict(), "update": "fused", **case.offload}
        # 16 MiB: the least.
        offload["staging_bytes"] = 1 << 24
        if "disk" in case.tiers:
            offload["paths"] = [path]
        pipe = {**ONCE, "gather": case.gather}
        whole = Case(PIPE, case.stage, BF16, pipe, sections={"offload": offload})
        model, config = _model("llama"), whole.config()
        engine = Engine.attach(model, config, compute_dtype=BF16)
        optimizer = torch.optim.AdamW(model.parameters())
        engine.bind_optimizer(optimizer)
        for step in range(3):
            engine.backward(model(**global_batch("llama", step)).loss)
            held = held_by(engine, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        share = _shares(whole).ranks[engine.mesh.coordinates["pp"]]
        estimator = Estimator(share.units, config, world_size=2, device_type="cpu")
        estimate = estimator.at(case.stage, case.tiers).by_tier
        engine.detach()
    return held, estimate


def _all_on_tiers() -> list[tuple[TierBytes, TierBytes]]:
    return [_held_on_tiers(case) for case in TIERS]


def test_every_tier_of_a_pipeline_holds_what_was_estimated() -> None:
    for found in run_ranks(_all_on_tiers, 2):
        for case, (held, estimated) in zip(TIERS, found, strict=True):
            assert held == pytest.approx(estimated, rel=0.05), case


def test_a_pipeline_keeps_whole_sums_at_every_stage_and_parameters_for_a_step() -> None:
    group = GroupSize((1 << 20,), 2, 4, 2, 4, trained=True)
    units = [[group]] * 8 + [[group]]
    tree = {"mesh": {"pp": 2, "dp_shard": 4}}
    alone = Estimator(units, load_config({"mesh": {"dp_shard": 4}}), world_size=4)
    piped = Estimator(units, load_config(tree), world_size=8)
    often = load_config({**tree, "pipe": {"gather": "microbatch"}})
    mib = 1 << 20
    sums = 9 * 4 * mib
    # While sums are sent nothing is filled: neither the root's buffer nor the next unit's.
    for stage in (0, 1, 2):
        assert piped.at(stage).total - alone.at(stage).total == sums - 2 * 2 * mib
    whole = piped.at(3).total - piped.at(2).total
    # Parameters are here, all nine, or in parts, and their buffers then send gradients.
    assert whole == (9 - 4) * 2 * mib - 9 * 2 * mib
    less = Estimator(units, often, world_size=8).at(3).total - piped.at(3).total
    assert less == -(9 - 4) * 2 * mib


@pytest.mark.parametrize(
    ("kind", "mesh", "message"),
    [
        ("t5", {"pp": 2}, r"mesh\.pp > 1 cannot cut T5ForCond"),
        ("llama", {"pp": 7}, r"The pipeline has 7 stages, but the model has 6 layers"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    kind: str, mesh: dict[str, int], message: str
) -> None:
    with torch.device("meta"):
        model = toy_model(kind, num_layers=6)
    with pytest.raises(ConfigError, match=message):
        shares_of(model, load_config({"mesh": mesh}), compute_dtype=None)


def test_counts_that_do_not_add_up_are_refused() -> None:
    with torch.device("meta"):
        model = _model("llama")
    config = load_config({"mesh": {"pp": 2}, "pipe": {"balance": [2, 3]}})
    with pytest.raises(
        ConfigError,
        match=r"pipe\.balance=\[2, 3\] deals out 5 layers, but LlamaForCausalLM has 6\. Let",
    ):
        shares_of(model, config, compute_dtype=None)


def test_a_model_is_whole_again_after_it_was_measured() -> None:
    with torch.device("meta"):
        model, other = _model("gpt2"), _model("gpt2")
    config = load_config({"mesh": BOTH})
    shares = shares_of(model, config, compute_dtype=None, slice_plan=plan_for(model, 2))
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in other.named_parameters()
    ]
    assert [type(each) for each in model.modules()] == [type(each) for each in other.modules()]
    assert [share.num_repeated_sums for share in shares.ranks] == [3, 3]
    # The embedding on the first, the head on the last.
    assert [share.num_sums for share in shares.ranks] == [13, 13]
    assert [share.has_sliced_loss for share in shares.ranks] == [False, True]
    assert shares.dealing.counts == (3, 3)
    assert shares.largest.pp_rank == 0


def test_without_axes_there_is_one_share_of_everything() -> None:
    with torch.device("meta"):
        model = _model("llama")
    shares = shares_of(model, load_config({}), compute_dtype=BF16)
    units = sizes_of(model, load_config({}), compute_dtype=BF16)
    one = Share(0, (6,), 0, 0, has_sliced_loss=False, gathered_words=0, units=units)
    assert shares.ranks == (one,)
