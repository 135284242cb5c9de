"""PEFT's LoRA and TRL's SFTTrainer, the real packages, on an engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import hf_speed
from hf_speed.engine import engine_of
from hf_speed.errors import CheckpointError
from hf_speed.integrations.weights import load_model
from tests.integrations.toys import (
    VOCABULARY,
    arguments,
    checkpointing,
    curve,
    examples,
    flat,
    llama,
    stage,
)
from tests.support import run_ranks

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}

CHECKPOINTING = checkpointing(use_reentrant=False)


def _lora(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(llama(), config)


def _trainer(directory: str, config: Any, options: dict[str, Any], seed: int = 0) -> Any:
    return hf_speed.Trainer(
        model=_lora(seed), args=arguments(directory, config, **options), train_dataset=examples()
    )


def _adapters(directory: str) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(llama(), directory)
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def _lora_runs(directory: str, configs: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for index, config in enumerate(configs):
        home = f"{directory}/{index}"
        made = _trainer(home, config, options | SAVING)
        made.train()
        made.save_model(f"{home}/last")
        dist.barrier()
        again = made
        if config is not None:
            # Without an engine transformers 5.17 cannot resume on CPUs: torch.load of 'cpu:0'.
            again = _trainer(home, config, options | SAVING, seed=5)
            again.train(resume_from_checkpoint=f"{home}/checkpoint-2")
        files = sorted(each.name for each in Path(f"{home}/last").iterdir())
        found.append(
            {
                "curve": curve(made),
                "again": curve(again),
                "adapters": _adapters(f"{home}/last"),
                "files": files,
            }
        )
    return found


@pytest.mark.parametrize("options", [{}, CHECKPOINTING], ids=["plain", "checkpointing"])
def test_lora_trains_saves_and_resumes_as_under_ddp(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ddp, *stages = run_ranks(_lora_runs, 2, str(tmp_path), [None, stage(2), stage(3)], options)[0]
    for each in stages:
        torch.testing.assert_close(flat(each["curve"]), flat(ddp["curve"]), rtol=1e-6, atol=0)
        assert each["again"] == each["curve"]
        assert each["files"] == ddp["files"]
        assert "adapter_model.safetensors" in each["files"]
        for name, value in each["adapters"].items():
            torch.testing.assert_close(value, ddp["adapters"][name], rtol=1e-4, atol=1e-5)


def _incomplete_adapter(directory: str) -> str:
    made = _trainer(directory, stage(2), {"max_steps": 1, "save_strategy": "no"})
    made.train()
    made.save_model(f"{directory}/last")
    path = Path(f"{directory}/last/adapter_model.safetensors")
    tensors = load_file(path)
    removed = tensors.pop(min(tensors))
    assert removed.numel()
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(made.speed_engine, f"{directory}/last")
    return str(caught.value)


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    (message,) = run_ranks(_incomplete_adapter, 1, str(tmp_path))
    assert "lacks 1 of its 8 tensors, first base_model.model.model.layers.0" in message


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        f"w{index}": index for index in range(3, VOCABULARY)
    }
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _texts() -> Dataset:
    rows = examples()
    return Dataset.from_list(
        [
            {"text": " ".join(f"w{int(each)}" for each in row["input_ids"][: 4 + index % 8])}
            for index, row in enumerate(rows)
        ]
    )


def _sft(directory: str, config: Any, *, peft: bool) -> list[tuple[float, float]]:
    options: dict[str, Any] = {
        "output_dir": directory,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
    }
    lora = (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if peft
        else None
    )
    kind: Any = SFTTrainer if config is None else hf_speed.integrate_trainer(SFTTrainer)
    arguments_kind: Any = SFTConfig if config is None else hf_speed.integrate_args(SFTConfig)
    args = (
        arguments_kind(**options) if config is None else arguments_kind(**options, hf_speed=config)
    )
    model = llama()
    # TRL draws the adapters' first values itself.
    torch.manual_seed(0)
    made = kind(
        model=model,
        args=args,
        train_dataset=_texts(),
        processing_class=_tokenizer(),
        peft_config=lora,
    )
    made.train()
    if (engine_of(made.model) is not None) != (config is not None):
        raise RuntimeError("The engine is not where the config says.")
    return curve(made)


def _sft_runs(directory: str, configs: list[Any], peft: str) -> list[list[tuple[float, float]]]:
    return [_sft(directory, config, peft=peft == "lora") for config in configs]


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_sft_trainer_equals_itself_under_ddp(tmp_path: Path, peft: str) -> None:
    ddp, *stages = run_ranks(_sft_runs, 2, str(tmp_path), [None, stage(1), stage(3)], peft)[0]
    for each in stages:
        torch.testing.assert_close(flat(each), flat(ddp), rtol=1e-6, atol=0)
