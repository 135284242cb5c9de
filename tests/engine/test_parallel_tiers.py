"""A buffer's tier changes no number on a mesh either, and parked states come back."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hf_speed
from hf_speed.errors import EngineError
from tests.engine.meshes import BOTH, PIPE, SLICES, Mesh, attach, own_rows, toy
from tests.engine.toys import assert_same_values, global_batch, whole_parameters
from tests.support import run_ranks

KINDS = ("optimizer", "gradients", "parameters")
NUM_STEPS = 3
MIB = 1 << 20


class Outcome(NamedTuple):
    """What is compared between tiers."""

    losses: Tensor
    norms: Tensor
    parameters: dict[str, Tensor]


def _train(
    mesh: Mesh, stage: int, offload: dict[str, Any], *, parks: bool = False, **sections: Any
) -> Outcome:
    """Some clipped steps of a toy Llama, two batches each."""
    with tempfile.TemporaryDirectory() as directory:
        if "disk" in offload.values():
            offload = {"paths": [directory], **offload}
        model = toy()
        offload = {"staging_bytes": 16 * MIB, **offload}
        engine = attach(model, mesh, stage, offload=offload, **sections)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind_optimizer(optimizer)
        losses, norms = [], []
        for step in range(NUM_STEPS):
            if parks and step:
                parked = hf_speed.offload_states(model)
                assert (parked > 0) == ("disk" not in offload.values())
                with pytest.raises(EngineError, match=r"parked by hf_speed\.offload_states"):
                    model(**own_rows(engine, global_batch("llama", step)))
                hf_speed.reload_states(model)
            for micro in range(2):
                engine.sync_gradients = micro == 1
                batch = own_rows(engine, global_batch("llama", 2 * step + micro))
                loss = model(**batch).loss / 2
                engine.backward(loss)
                losses.append(loss.detach().float())
            norms.append(engine.clip_grad_norm_(0.5))
            optimizer.step()
            optimizer.zero_grad()
        if "activations" in offload:
            assert engine.parts.tiers.activations.peak_bytes > 0
            assert engine.parts.tiers.activations.num_bytes == 0
        outcome = Outcome(torch.stack(losses), torch.stack(norms), whole_parameters(engine))
        engine.detach()
        assert list(Path(directory).iterdir()) == []
    return outcome


def _assert_equal(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert torch.equal(ours.norms, theirs.norms)
    assert_same_values(ours.parameters, theirs.parameters)


def _compare_tiers(mesh: Mesh) -> None:
    for stage, dtype in ((1, torch.bfloat16), (3, None)):
        base = _train(mesh, stage, {"update": "fused"}, dtype=dtype)
        for tiers in (
            dict.fromkeys(KINDS, "host"),
            dict.fromkeys(KINDS, "disk"),
            {"gradients": "disk", "parameters": "host"},
        ):
            ours = _train(mesh, stage, {"update": "fused", **tiers}, dtype=dtype)
            _assert_equal(ours, base)
    kept = {"activations": "host", "activation_min_bytes": 1024}
    _assert_equal(_train(mesh, 3, {"update": "fused", **kept}), base)


@pytest.mark.parametrize("mesh", [PIPE, SLICES], ids=["stages", "slices"])
def test_every_tier_trains_bitwise_as_the_device_does(mesh: Mesh) -> None:
    run_ranks(_compare_tiers, 2, mesh)


def _compare_others() -> None:
    """Stage 3 with ranks that shard; the user's optimizer; activations; parking."""
    for mesh in (PIPE, BOTH):
        base = _train(mesh, 3, {"update": "torch"})
        disk = {"update": "torch", **dict.fromkeys(KINDS, "disk")}
        _assert_equal(_train(mesh, 3, disk), base)
        _assert_equal(_train(mesh, 3, {"update": "torch"}, parks=True), base)
        _assert_equal(_train(mesh, 3, disk, parks=True), base)


def test_tiers_and_parking_change_nothing_where_ranks_share_a_stage() -> None:
    run_ranks(_compare_others, 4)
