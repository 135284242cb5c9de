"""What there is on this machine is read and agreed on; what does not fit is refused before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_speed.config import Memory, env, load_config
from hf_speed.engine import Engine, engine_of, planning
from hf_speed.engine.assemble import make_mesh
from hf_speed.engine.division import divide
from hf_speed.engine.report import free_disk_bytes, memory_of_machine
from hf_speed.errors import ConfigError
from tests.engine.toys import toy_model
from tests.support import RankError, run_ranks

CPU = torch.device("cpu")


def test_ranks_of_a_machine_share_its_memory(tmp_path: Path) -> None:
    offload = load_config({"offload": {"paths": [str(tmp_path)]}}).offload
    alone, one_of_four = (memory_of_machine(offload, device=CPU, num_ranks=n) for n in (1, 4))
    assert alone.shared
    assert alone.host == 0
    assert one_of_four.device == alone.device // 4
    assert one_of_four.disk == pytest.approx(alone.disk / 4, rel=0.01)


def test_beside_a_gpu_most_of_the_free_host_memory_may_be_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(env, "free_host_bytes", lambda: 100 << 30)
    cuda = torch.device("cuda")
    memory = memory_of_machine(load_config({}).offload, device=cuda, num_ranks=4)
    assert memory == Memory(80 << 30, 20 << 30, 0, shared=False)
    bounded = load_config({"offload": {"host_bytes": 1 << 30}}).offload
    assert memory_of_machine(bounded, device=cuda, num_ranks=4).host == 1 << 30


def test_directories_of_one_disk_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = free_disk_bytes([str(tmp_path)])
    two = free_disk_bytes([str(tmp_path), str(tmp_path / "b")])
    assert two == pytest.approx(one, rel=0.01)
    assert free_disk_bytes([]) == 0


def test_a_path_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"offload\.paths names '/no/such/place'.*Make the dir"):
        free_disk_bytes(["/no/such/place"])


def test_a_model_larger_than_all_tiers_is_refused_before_anything_is_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1 << 20, 1 << 20, bias=False) for _ in range(4)))
    tree: dict[str, Any] = {"zero": {"stage": 3, "units": ["Linear"]}}
    with pytest.raises(ConfigError, match=r"No plan fits this model(?s:.*)device +65536\.00!"):
        Engine.attach(model, load_config(tree), device=CPU)
    assert engine_of(model) is None


def _plan_with_memory_of_rank(num_bytes: list[int], path: str | None) -> tuple[int, int]:
    """Plan on a rank that sees its own amount of memory; (chosen stage, bytes seen)."""
    rank = dist.get_rank()
    seen = Memory(num_bytes[rank], shared=True)
    before = planning.memory_of_machine
    planning.memory_of_machine = lambda *args, **kwargs: seen  # noqa: ARG005
    try:
        if path is not None and rank == 1:
            planning.memory_of_machine = before
        config = load_config({"offload": {"paths": [path]}} if path is not None else {})
        model = toy_model("llama")
        division = divide(model, config, make_mesh(config, CPU), slice_planner=None)
        resolved = planning.plan(
            model,
            config,
            compute_dtype=None,
            device=CPU,
            catalogue=division.catalogue,
            names=division.names,
            blocks=division.blocks,
        )
    finally:
        planning.memory_of_machine = before
    return resolved.stage, seen.device


def test_ranks_that_see_different_memory_choose_one_plan() -> None:
    found = run_ranks(_plan_with_memory_of_rank, 2, [1 << 30, 140_000], None)
    stages = {stage for stage, _ in found}
    assert len(stages) == 1
    assert stages != {0}
    assert {seen for _, seen in found} == {1 << 30, 140_000}


def test_a_path_that_one_machine_lacks_stops_all_ranks() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_plan_with_memory_of_rank, 2, [1 << 30, 1 << 30], "/no/such/place")
    assert "rank 1: ConfigError: offload.paths names '/no/such/place'" in caught.value.reports[0]
    assert "offload.paths names '/no/such/place'" in caught.value.reports[1]
