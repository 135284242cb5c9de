"""Checkpoints through the Trainer: Hub models, of which the best and the last whole ones stay."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.checkpoint.latest import read_latest
from hf_speed.errors import CheckpointError, ConfigError, HfSpeedError
from tests.integrations.toys import arguments, curve, examples, flat, llama, stage, trainer
from tests.support import RankError, run_ranks

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def _global_batch(options: dict[str, Any]) -> dict[str, Any]:
    """4 sequences a step over all ranks, whatever their number."""
    return options | {
        "per_device_train_batch_size": 4 // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
    }


def _full(directory: str, config: Any, options: dict[str, Any]) -> list[tuple[float, float]]:
    made = trainer(directory, config, **_global_batch(SAVING | options))
    made.train()
    return curve(made)


def _resumed(directory: str, config: Any, options: dict[str, Any]) -> list[tuple[float, float]]:
    # Other values than those that were saved: only the checkpoint can bring the right ones.
    made = trainer(directory, config, model=llama(seed=9), **_global_batch(SAVING | options))
    made.train(resume_from_checkpoint=True)
    return curve(made)


def _keep_only(directory: Path, step: int) -> None:
    for each in directory.glob("checkpoint-*"):
        if each.name != f"checkpoint-{step}":
            shutil.rmtree(each)


def test_every_checkpoint_is_a_hub_model(tmp_path: Path) -> None:
    run_ranks(_full, 2, str(tmp_path / "ours"), stage(3, checkpoint={"max_shard_bytes": 20000}), {})
    run_ranks(_full, 2, str(tmp_path / "stock"), None, {})
    ours = tmp_path / "ours" / "checkpoint-6"
    assert len(list(ours.glob("model-*.safetensors"))) > 1
    assert (ours / "training_args.bin").is_file()
    mine = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock" / "checkpoint-6").state_dict()
    assert mine.keys() == stock.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, stock[name], rtol=1e-4, atol=1e-5)


def _best(directory: str, config: Any) -> dict[str, Any]:
    made = trainer(
        directory,
        config,
        **SAVING,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        metric_for_best_model="eval_loss",
        # Upside down, so that the best is not the last.
        greater_is_better=True,
    )
    made.train()
    best = max(line["eval_loss"] for line in made.state.log_history if "eval_loss" in line)
    return {
        "best": best,
        "now": made.evaluate()["eval_loss"],
        "step": made.state.best_global_step,
        "files": sorted(each.name for each in Path(directory).glob("checkpoint-*")),
        "latest": read_latest(directory),
        "curve": curve(made),
    }


def _bests(directory: str, configs: list[Any]) -> list[dict[str, Any]]:
    found = []
    for index, config in enumerate(configs):
        home = Path(directory) / str(index)
        found.append(_best(str(home), config))
        dist.barrier()
    return found


def test_best_model_comes_back_and_save_total_limit_holds(tmp_path: Path) -> None:
    stock, *stages = run_ranks(_bests, 2, str(tmp_path), [None, stage(1), stage(3)])[0]
    assert stock["step"] < 6
    for each in stages:
        assert each["step"] == stock["step"]
        assert each["files"] == stock["files"]
        assert each["latest"].name in each["files"]
        assert each["now"] == pytest.approx(each["best"], rel=1e-6)
        torch.testing.assert_close(flat(each["curve"]), flat(stock["curve"]), rtol=1e-4, atol=0)


def _model_only(directory: str) -> tuple[float, float]:
    made = trainer(directory, stage(3), **SAVING, save_only_model=True)
    made.train()
    made.save_model()
    last = made.evaluate()["eval_loss"]
    again = trainer(directory, stage(2), model=llama(seed=7), **SAVING)
    again.train(resume_from_checkpoint=f"{directory}/checkpoint-6")
    return last, again.evaluate()["eval_loss"]


def test_weights_alone_are_loaded_from_a_model_without_state(tmp_path: Path) -> None:
    last, again = run_ranks(_model_only, 2, str(tmp_path))[0]
    assert last == pytest.approx(again, rel=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def _faults(directory: str) -> list[str]:
    home = Path(directory)
    made = trainer(directory, stage(1), **SAVING)
    made.train()
    messages = []

    def note(checkpoint: Path, model: Any = None) -> None:
        try:
            trainer(directory, stage(1), model=model, **SAVING).train(
                resume_from_checkpoint=str(checkpoint)
            )
        except HfSpeedError as error:
            messages.append(f"{type(error).__name__}: {error}")

    for name in ("missing", "truncated"):
        if dist.get_rank() == 0:
            shutil.copytree(home / "checkpoint-2", home / name)
            file = next((home / name / "hf_speed").glob("state-*rank00001*"))
            file.unlink() if name == "missing" else file.write_bytes(file.read_bytes()[:-8])
        dist.barrier()
        note(home / name)
    note(home / "checkpoint-2", llama(hidden_size=64))
    stock = trainer(f"{directory}/stock", None, **SAVING)
    stock.train()
    note(Path(f"{directory}/stock/checkpoint-2"))
    return messages


def test_damaged_and_foreign_checkpoints_raise_on_every_rank(tmp_path: Path) -> None:
    for missing, truncated, foreign, stock in run_ranks(_faults, 2, str(tmp_path)):
        assert missing.startswith(CheckpointError.__name__)
        assert "is missing" in missing
        assert truncated.startswith(CheckpointError.__name__)
        assert "bytes instead of" in truncated
        assert foreign.startswith(CheckpointError.__name__)
        assert "of another model" in foreign
        assert stock.startswith(ConfigError.__name__)
        assert "written without hf_speed" in stock


def _train_until_killed(directory: str) -> None:
    made = trainer(directory, stage(3), **SAVING)
    save = made._save_optimizer_and_scheduler

    def die_in_the_second_save(output_dir: str) -> None:
        if output_dir.endswith("checkpoint-4") and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    made._save_optimizer_and_scheduler = die_in_the_second_save
    made.train()


def _resume_newest(directory: str) -> tuple[list[float], str]:
    made = trainer(directory, stage(3), **SAVING)
    made.train(resume_from_checkpoint=True)
    refused = ""
    try:
        trainer(directory, stage(3), **SAVING).train(
            resume_from_checkpoint=f"{directory}/checkpoint-4-cut"
        )
    except CheckpointError as error:
        refused = str(error)
    return [line["loss"] for line in made.state.log_history if "loss" in line], refused


def _train_whole(directory: str) -> list[float]:
    made = trainer(directory, stage(3), **SAVING)
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def test_resume_passes_over_a_save_that_was_killed(tmp_path: Path) -> None:
    home = tmp_path / "killed"
    with pytest.raises(RankError):
        run_ranks(_train_until_killed, 2, str(home))
    assert {path.name for path in home.glob("checkpoint-*")} >= {"checkpoint-2"}
    unfinished = home / "checkpoint-4"
    assert unfinished.is_dir()
    assert not (unfinished / "hf_speed" / "manifest.json").exists()
    shutil.copytree(unfinished, home / "checkpoint-4-cut")
    losses, refused = run_ranks(_resume_newest, 2, str(home))[0]
    assert losses == run_ranks(_train_whole, 2, str(tmp_path / "whole"))[0]
    assert "manifest" in refused


def _fp16(directory: str, model: Any, *, resume: bool) -> list[dict[str, float]]:
    config = stage(2, precision={"loss_scale": {"initial": 1024.0, "window": 2}})
    made = hf_speed.Trainer(
        model=model,
        args=arguments(directory, config, fp16=True, gradient_accumulation_steps=1, **SAVING),
        train_dataset=examples(),
    )
    made.train(resume_from_checkpoint=resume or None)
    return [line for line in made.state.log_history if "loss" in line]


def _fp16_whole(directory: str) -> list[dict[str, float]]:
    return _fp16(directory, llama(), resume=False)


def _fp16_resumed(directory: str) -> list[dict[str, float]]:
    return _fp16(directory, llama(seed=9), resume=True)


def test_the_loss_scale_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    whole = run_ranks(_fp16_whole, 2, str(tmp_path))[0]
    _keep_only(tmp_path, 4)
    again = run_ranks(_fp16_resumed, 2, str(tmp_path))[0]
    for key in ("loss", "loss_scale", "learning_rate"):
        assert [line[key] for line in again] == [line[key] for line in whole]
    assert whole[-1]["loss_scale"] > whole[0]["loss_scale"]
