"""Checkpoints of pipelines and divided layers: Hub models, which any other mesh resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.errors import ShardedParameterError
from tests.integrations.toys import llama, stage, trainer
from tests.support import run_ranks

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, stage(1)),
    "dp2": (2, stage(1)),
    "pp2": (2, {"mesh": {"pp": 2}, "zero": {"stage": 1}}),
    "tp2": (2, {"mesh": {"tp": 2}, "zero": {"stage": 3}}),
    "pp2xtp2": (4, {"mesh": {"pp": 2, "tp": 2}, "zero": {"stage": 1}}),
    "pp2xdp2": (4, {"mesh": {"pp": 2}, "zero": {"stage": 3}}),
}
"""Processes, and a config that lays them out."""


def _batch(mesh: str) -> dict[str, int]:
    """Batches of 4 rows, whatever the mesh."""
    num_processes, config = MESHES[mesh]
    sharing = config.get("mesh", {}).get("pp", 1) * config.get("mesh", {}).get("tp", 1)
    return {"per_device_train_batch_size": 4 * sharing // num_processes}


def _model(**options: Any) -> Any:
    return llama(num_hidden_layers=4, **options)


def _hub(directory: str, mesh: str) -> dict[str, Any]:
    made = trainer(
        directory,
        {**MESHES[mesh][1], "checkpoint": {"max_shard_bytes": 20000}},
        model=_model(tie_word_embeddings=True),
        **_batch(mesh),
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        metric_for_best_model="eval_loss",
        # Upside down, so that the best is not the last.
        greater_is_better=True,
    )
    made.train()
    engine = made.speed_engine
    best = max(line["eval_loss"] for line in made.state.log_history if "eval_loss" in line)
    made.save_model(f"{directory}/final")
    made.model.save_pretrained(f"{directory}/pretrained", is_main_process=dist.get_rank() == 0)
    try:
        made.model.save_pretrained(f"{directory}/alone")
        refused = ""
    except ShardedParameterError as error:
        refused = str(error)
    state = made.accelerator.get_state_dict(made.model)
    weights = {name: value.clone() for name, value in engine.full_parameters()}
    engine.detach()
    plain = {name: value.clone() for name, value in made.model.state_dict().items()}
    return {
        "best": best,
        "now": made.evaluate()["eval_loss"],
        "step": made.state.best_global_step,
        "files": sorted(each.name for each in Path(directory).glob("checkpoint-*")),
        "state": state,
        "weights": weights,
        "plain": plain,
        "refused": refused,
    }


def _hubs(directory: str, meshes: list[str]) -> list[dict[str, Any]]:
    return [_hub(f"{directory}/{mesh}", mesh) for mesh in meshes]


def test_every_checkpoint_is_a_hub_model_with_the_weights_of_all_ranks(tmp_path: Path) -> None:
    meshes = ["pp2xtp2", "pp2xdp2"]
    found = run_ranks(_hubs, 4, str(tmp_path), meshes)
    for index, mesh in enumerate(meshes):
        first = found[0][index]
        home = tmp_path / mesh
        assert len(list((home / "final").glob("model-*.safetensors"))) > 1
        for name in ("config.json", "generation_config.json", "training_args.bin"):
            assert (home / "final" / name).is_file()
        for name in ("final", "pretrained", f"checkpoint-{first['step']}"):
            loaded = AutoModelForCausalLM.from_pretrained(home / name).state_dict()
            assert loaded.keys() == first["plain"].keys()
            for key, value in loaded.items():
                assert torch.equal(value, first["plain"][key]), (mesh, name, key)
        assert first["state"].keys() == first["plain"].keys()
        assert "mesh.pp=2" in first["refused"]
        assert first["step"] < 4
        assert f"checkpoint-{first['step']}" in first["files"]
        assert len(first["files"]) <= 2
        assert first["now"] == pytest.approx(first["best"], rel=1e-6)
        for rank in range(4):
            each = found[rank][index]
            assert each["refused"] == first["refused"]
            assert bool(each["state"]) == (rank == 0)
            for key, value in each["weights"].items():
                assert torch.equal(value, first["plain"][key])
                assert torch.equal(each["plain"][key], first["plain"][key])
    assert found[0][0]["files"] == found[0][1]["files"]


class _Counting(nn.Module):
    """A layer's part with a buffer that a saved model has."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(float(number)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def _with_buffers(seed: int = 0) -> Any:
    model = _model(seed=seed)
    for index, layer in enumerate(model.model.layers):
        layer.counting = _Counting(index + 10 * seed)
    return model


def _looped(directory: str, mesh: str, seed: int) -> dict[str, Any]:
    """A raw loop: from a seed and saved after its first step, or continued from there (seed 7)."""
    torch.manual_seed(5)
    accelerator = hf_speed.Accelerator(hf_speed=MESHES[mesh][1])
    model = _with_buffers(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [
        torch.randint(3, 90, (8,), generator=torch.Generator().manual_seed(n)) for n in range(12)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=4 // accelerator.num_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    if seed:
        accelerator.load_state(directory)
        loader = accelerator.skip_first_batches(loader, 1)
    for number, ids in enumerate(loader):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
        if number == 0 and not seed:
            accelerator.save_state(directory)
    state = accelerator.get_state_dict(model)
    return {
        "losses": losses,
        "rate": schedule.get_last_lr(),
        "draw": torch.rand(()).item(),
        "buffers": {name: float(value) for name, value in state.items() if "count" in name},
    }


def test_a_loop_continues_on_another_mesh_with_the_buffers_of_all_stages(tmp_path: Path) -> None:
    first = run_ranks(_looped, 2, str(tmp_path), "pp2", 0)
    (one,) = run_ranks(_looped, 1, str(tmp_path / "one"), "one", 0)
    assert first[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert first[0]["rate"] == one["rate"]
    assert first[0]["buffers"] == {f"model.layers.{n}.counting.count": float(n) for n in range(4)}
    for mesh in ("pp2", "tp2", "dp2"):
        again = run_ranks(_looped, 2, str(tmp_path), mesh, 7)
        for each in again:
            assert each["losses"] == pytest.approx(one["losses"][1:], rel=1e-5), mesh
        assert again[0]["buffers"] == first[0]["buffers"]
        assert again[0]["rate"] == (one["rate"] if mesh != "dp2" else again[1]["rate"])
        if mesh != "dp2":
            # One batch, one random state, whichever files the processes would have read.
            assert again[0]["draw"] == again[1]["draw"]
