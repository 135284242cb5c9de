"""Tiers behind the Trainer and the Accelerator: the same numbers, files and calls."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.offload import DiskStore
from tests.integrations.toys import (
    checkpointing,
    curve,
    examples,
    flat,
    llama,
    stage,
    trainer,
)
from tests.support import run_ranks

KINDS = ("optimizer", "gradients", "parameters")
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def _tiers(tier: str, scratch: Path, **more: Any) -> dict[str, Any]:
    """Everything on one tier; `scratch` exists."""
    paths = {"paths": [str(scratch)]} if tier == "disk" else {}
    return {**dict.fromkeys(KINDS, tier), **paths, **more}


def _curves(
    directory: str, configs: list[Any], options: dict[str, Any]
) -> list[list[tuple[float, float]]]:
    found = []
    for config in configs:
        made = trainer(directory, config, **options)
        made.train()
        found.append(curve(made))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"bf16": True},
        {"optim": "sgd"},
        checkpointing(use_reentrant=False),
        checkpointing(use_reentrant=True),
    ],
    ids="-".join,
)
def test_the_trainer_trains_alike_on_every_tier(tmp_path: Path, options: dict[str, Any]) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    configs = [
        stage(3),
        stage(3, offload=_tiers("disk", scratch, update="torch")),
        stage(3, offload=_tiers("disk", scratch, activations="disk", activation_min_bytes=1024)),
        stage(
            1, offload={"optimizer": "host", "activations": "host", "activation_min_bytes": 1024}
        ),
    ]
    plain, exact, *fused = run_ranks(_curves, 2, str(tmp_path), configs, options)[0]
    torch.testing.assert_close(flat(exact), flat(plain), rtol=0, atol=0)
    # A kernel's last bit of a master may round a 16-bit weight the other way.
    rtol = 2**-6 if "bf16" in options else 1e-5
    for each in fused:
        torch.testing.assert_close(flat(each), flat(plain), rtol=rtol, atol=1e-7)


def _save(directory: str, config: Any) -> tuple[list[tuple[float, float]], list[dict[str, float]]]:
    made = trainer(directory, config, **SAVING)
    made.train()
    return curve(made), made.state.log_history


def _resume(directory: str, config: Any) -> list[tuple[float, float]]:
    made = trainer(directory, config, model=llama(seed=9), **SAVING)
    made.train(resume_from_checkpoint=f"{directory}/checkpoint-2")
    return curve(made)


def test_a_run_resumes_from_one_tier_on_another_and_its_checkpoint_is_a_hub_model(
    tmp_path: Path,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    directory = str(tmp_path / "run")
    disk = stage(3, offload=_tiers("disk", scratch, update="fused"))
    whole, log = run_ranks(_save, 2, directory, disk)[0]
    assert any(line.get("peak_disk_bytes", 0) > 0 for line in log)
    others = [disk, stage(2, offload=_tiers("host", scratch, update="fused")), stage(0)]
    for config in others:
        again = run_ranks(_resume, 2, directory, config)[0]
        # At stage 0 the user's optimizer updates: the same maths in another order.
        exact = config is not others[-1]
        torch.testing.assert_close(
            flat(again), flat(whole), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7
        )
    loaded = AutoModelForCausalLM.from_pretrained(f"{directory}/checkpoint-4")
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in llama().parameters()
    )
    # Ranks that end without ceremony leave empty directories, which the next start removes.
    DiskStore([scratch]).close()
    assert list(scratch.iterdir()) == []


def _predict_and_generate(directory: str, config: Any) -> tuple[list[float], list[list[int]]]:
    made = trainer(directory, config)
    before = made.evaluate()["eval_loss"]
    made.train()
    after = made.evaluate()["eval_loss"]
    prompt = torch.tensor([[5, 6, 7]])
    tokens = made.model.generate(prompt, max_new_tokens=4, do_sample=False)
    return [before, after], tokens.tolist()


def test_evaluation_and_generation_work_with_parameters_on_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for number in (0, 3):
        tiers = _tiers("disk", scratch, update="torch")
        plain = run_ranks(_predict_and_generate, 2, str(tmp_path), stage(number))[0]
        disk = run_ranks(_predict_and_generate, 2, str(tmp_path), stage(number, offload=tiers))[0]
        assert disk == plain


def _adapters(directory: str, config: Any) -> list[tuple[float, float]]:
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    model = peft.get_peft_model(llama(), lora)
    made = trainer(directory, config, model=model, **SAVING)
    made.train()
    return curve(made)


def test_lora_trains_alike_over_a_frozen_base_on_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    tiers = _tiers("disk", scratch, update="torch")
    plain = run_ranks(_adapters, 2, str(tmp_path / "a"), stage(3))[0]
    disk = run_ranks(_adapters, 2, str(tmp_path / "b"), stage(3, offload=tiers))[0]
    assert flat(plain).std() > 0
    torch.testing.assert_close(flat(disk), flat(plain), rtol=0, atol=0)
    assert (tmp_path / "b" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def _loop(directory: str, offload: dict[str, Any]) -> list[float]:
    """An Accelerate loop that saves, goes on, and goes back."""
    config = stage(3, offload=offload)
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=config)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(examples(8), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []

    def epoch() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(accelerator.reduce(loss.detach(), "mean").item())

    epoch()
    accelerator.save_state(directory)
    epoch()
    half = len(losses) // 2
    accelerator.load_state(directory)
    epoch()
    assert losses[half : 2 * half] == losses[2 * half :]
    return losses


def test_an_accelerate_loop_saves_and_loads_its_state_on_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    plain = run_ranks(_loop, 2, str(tmp_path / "a"), {"update": "torch"})[0]
    disk = run_ranks(_loop, 2, str(tmp_path / "b"), _tiers("disk", scratch, update="torch"))[0]
    assert disk == plain
