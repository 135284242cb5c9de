"""enable() teaches stock classes the field, TRL's among them, and disable() takes it back."""

import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
import trl

import hf_speed
from hf_speed.engine import engine_of
from tests.integrations.toys import curve, examples, flat, llama, stage
from tests.support import run_ranks

CLASSES = (
    transformers.TrainingArguments,
    transformers.Seq2SeqTrainingArguments,
    trl.SFTConfig,
    transformers.Trainer,
    accelerate.Accelerator,
)

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def _contents() -> list[dict[str, Any]]:
    return [dict(vars(cls)) for cls in CLASSES]


@pytest.mark.filterwarnings("ignore")
def test_disable_puts_back_every_attribute(tmp_path: Path) -> None:
    before = _contents()
    hf_speed.enable()
    try:
        hf_speed.enable()
        args = transformers.TrainingArguments(str(tmp_path), hf_speed=stage(2), **OPTIONS)
        assert args.hf_speed_config.zero.stage == 2
        assert args.to_dict()["hf_speed"] == stage(2)
        assert dataclasses.replace(args, hf_speed=None).hf_speed_config is None
        late = dataclasses.make_dataclass(
            "Late", [("extra", int, 1)], bases=(transformers.TrainingArguments,)
        )
        assert (
            late(output_dir=str(tmp_path), hf_speed=stage(1), **OPTIONS).hf_speed_config.zero.stage
            == 1
        )
        parser = transformers.HfArgumentParser(trl.SFTConfig)
        line = [
            "--output_dir",
            str(tmp_path),
            "--bf16",
            "False",
            "--report_to",
            "none",
            "--use_cpu",
            "True",
        ]
        (parsed,) = parser.parse_args_into_dataclasses(
            [*line, "--hf_speed", '{"zero": {"stage": 3}}']
        )
        assert parsed.hf_speed_config.zero.stage == 3
    finally:
        hf_speed.disable()
    assert _contents() == before
    with pytest.raises(TypeError, match="hf_speed"):
        transformers.TrainingArguments(str(tmp_path), hf_speed=stage(2), **OPTIONS)


def _stock_classes(directory: str) -> dict[str, Any]:
    plain = _stock(directory, None)
    hf_speed.enable()
    found = {str(number): _stock(directory, stage(number)) for number in (1, 3)}
    model = torch.nn.Linear(4, 4)
    accelerate.Accelerator(cpu=True, hf_speed=stage(1)).prepare(model)
    untouched = torch.nn.Linear(4, 4)
    accelerate.Accelerator(cpu=True).prepare(untouched)
    hf_speed.disable()
    return {
        "plain": plain,
        **found,
        "accelerator": engine_of(model) is not None and engine_of(untouched) is None,
    }


def _stock(directory: str, config: Any) -> list[tuple[float, float]]:
    keywords = {} if config is None else {"hf_speed": config}
    made = transformers.Trainer(
        model=llama(),
        args=transformers.TrainingArguments(directory, **OPTIONS, **keywords),
        train_dataset=examples(),
    )
    made.train()
    if (engine_of(made.model) is not None) != (config is not None):
        raise RuntimeError("The engine is not where the config says.")
    return curve(made)


def test_stock_classes_train_on_an_engine_after_enable(tmp_path: Path) -> None:
    found = run_ranks(_stock_classes, 2, str(tmp_path))[0]
    assert found["accelerator"]
    for number in ("1", "3"):
        torch.testing.assert_close(flat(found[number]), flat(found["plain"]), rtol=1e-6, atol=0)
