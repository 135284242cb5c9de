"""The checkpoint benches: what they measure, what a row says, and that ours takes part."""

from pathlib import Path
from typing import Any

import checkpoint_export
import checkpoint_save
import checkpoint_systems
import numpy as np
import pytest
import torch
from checkpoint_export import Ran
from checkpoint_save import OURS, PEERS, Way
from checkpoint_systems import MIB, Behind, Saved
from safetensors.torch import save_file
from workload import Shape, build_model

from tests.support import run_ranks

TOY = Shape(64, 32, 64, 2, 2, 1, 8)


class FakeWorld:
    """Answers as the ranks of one system would."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []

    def ask(self, command: str, *args: Any) -> list[Any]:
        """Note the command; its answer is what was given."""
        self.asked.append((command, *args))
        return self.answers.get(command, [None])


def test_a_save_counts_as_its_slowest_rank_and_largest_memory(tmp_path: Path) -> None:
    world = FakeWorld(save=[Saved(1.0, 3.0, 5), Saved(2.0, 2.5, 7)])
    assert checkpoint_save.save(world, PEERS[2], tmp_path) == Saved(2.0, 3.0, 7)  # type: ignore[arg-type]
    assert world.asked[0] == ("consolidating", True)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_time_judge_what_is_on_disk_and_report_what_returns() -> None:
    found = {OURS.label: [Saved(0.5, 0.8, 0)] * 3, "peer": [Saved(0.4, 1.0, 0)] * 3}
    judged, reported = checkpoint_save.time_rows(found, "ext4", "toy", bar="<=0.8")
    assert (judged.ratio, judged.bar, judged.holds) == (pytest.approx(0.8), "<=0.8", True)
    assert (reported.ratio, reported.bar) == (pytest.approx(2.0), None)
    found[OURS.label][1] = found[OURS.label][2] = Saved(0.5, 0.9, 0)
    assert not checkpoint_save.time_rows(found, "ext4", "toy", bar="<=0.8")[0].holds


def test_the_row_of_memory_judges_the_worst_save_against_a_file() -> None:
    found = {OURS.label: [Saved(0, 0, MIB), Saved(0, 0, 3 * MIB)], "peer": [Saved(0, 0, 6 * MIB)]}
    against_file, against_peer = checkpoint_save.memory_rows(found, "toy", 2 * MIB)
    assert (against_file.ours, against_file.theirs, against_file.holds) == (3.0, 2.0, False)
    assert (against_peer.ratio, against_peer.bar) == (0.5, None)


def test_a_save_beside_the_training_is_judged_by_its_call_alone(tmp_path: Path) -> None:
    saves = [Behind(0.05, 2.6, [1.0, 1.5]), Behind(0.1, 2.5, [1.2, 1.1])]
    world = FakeWorld(train=[[1.0, 1.0, 1.0], [0.9, 0.8, 1.0]], behind=saves)
    started: Any = {OURS.system: world}
    kept, lost, during = checkpoint_save.behind_rows(
        started, [OURS], tmp_path, {OURS.label: 1.0}, "toy", rounds=2
    )
    assert (kept.ours, kept.ratio, kept.holds) == (0.1, pytest.approx(0.1), True)
    assert lost.ours == pytest.approx(2.6 - 2 * 1.0)
    assert (during.ours, during.theirs) == (pytest.approx(1.35), 1.0)


def test_a_load_that_brings_back_another_state_is_an_error(tmp_path: Path) -> None:
    losses = iter([[1.0], [2.0]])

    class Forgetful(FakeWorld):
        def ask(self, command: str, *args: Any) -> list[Any]:
            return next(losses) if command == "loss" else super().ask(command, *args)

    world: Any = Forgetful(load=[0.5])
    with pytest.raises(RuntimeError, match=r"the loss was \[1.0\] at the save, \[2.0\] at the"):
        checkpoint_save.load(world, Way("DeepSpeed", "DeepSpeed"), tmp_path)


def test_peak_memory_is_that_of_the_process_since_it_was_forgotten() -> None:
    before = checkpoint_systems.forget_peak()
    block = np.ones(64 * MIB, dtype=np.uint8)
    del block
    checkpoint_systems.resident("VmRSS")
    assert 60 * MIB < checkpoint_systems.resident("VmHWM") - before < 80 * MIB
    assert checkpoint_systems.forget_peak() < before + 8 * MIB


def _ours_saves_and_loads(place: str) -> None:
    rank = torch.distributed.get_rank()
    trainee = checkpoint_systems.Ours(TOY, "float32", rank)
    loss = trainee.loss()
    saved = trainee.save(place)
    assert 0 < saved.returned_s <= saved.durable_s
    behind = trainee.behind(f"{place}/behind")
    assert 0 < behind.stall_s <= behind.whole_s
    trainee.train(1)
    assert trainee.loss() != loss
    assert trainee.load(place) > 0
    assert trainee.loss() == loss
    if rank == 0:
        checkpoint_export.check_model(Path(place), TOY)


def test_ours_saves_beside_the_training_and_comes_back(tmp_path: Path) -> None:
    run_ranks(_ours_saves_and_loads, 2, str(tmp_path))


def test_an_export_that_is_not_the_model_is_an_error(tmp_path: Path) -> None:
    weights = {name: value.detach() for name, value in build_model(TOY).named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint_export.check_model(tmp_path, TOY)
    name = next(iter(weights))
    save_file({**weights, name: weights[name].half()}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=f"has {name} in F16"):
        checkpoint_export.check_model(tmp_path, TOY)
    save_file({name: weights[name]}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="is not the model that was trained"):
        checkpoint_export.check_model(tmp_path, TOY)


def test_an_export_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    code = "import sys; sys.argv[0] = 'x'; open(sys.argv[1] + '/weights', 'w').write('w')"

    def command(_: Path, out: Path) -> list[str]:
        out.mkdir()
        return ["-c", checkpoint_export._MEASURED + code, "toy", str(out)]

    ran = checkpoint_export.run(checkpoint_export.Exporter("toy", "toy", command), tmp_path)
    assert (tmp_path / "out" / "weights").is_file()
    assert ran.seconds > 0
    assert MIB < ran.peak_bytes < 100 * MIB
    failing = checkpoint_export.Exporter("toy", "toy", lambda *_: ["-c", "raise SystemExit('no')"])
    with pytest.raises(RuntimeError, match=r"toy: .*no"):
        checkpoint_export.run(failing, tmp_path)


def test_exports_are_judged_by_memory_against_zero_to_fp32_alone() -> None:
    mine, theirs = Ran(1.0, 300 * MIB), Ran(2.0, 1000 * MIB)
    found = {each.label: [mine] for each in checkpoint_export.EXPORTERS[:2]}
    found |= {each.label: [theirs] for each in checkpoint_export.EXPORTERS[2:]}
    rows = checkpoint_export.rows_of(found, "toy", bar="<=0.3")
    judged = [row for row in rows if row.bar is not None]
    assert [row.peer for row in judged] == [checkpoint_export.JUDGED.label] * 2
    assert all(row.ratio == pytest.approx(0.3) and row.holds for row in judged)
    assert len(rows) == 8
