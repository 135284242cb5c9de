"""`save_pretrained` of a prepared model, in the words of transformers' examples."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.errors import ShardedParameterError
from tests.integrations.toys import examples, llama, stage
from tests.support import run_ranks

CASES: list[tuple[int, str, dict[str, Any]]] = [
    (0, "bf16", {}),
    (2, "no", {"max_shard_size": "20KB"}),
    (3, "no", {}),
    (3, "bf16", {"variant": "best"}),
]


def _prepared(number: int, precision: str, model: Any) -> tuple[Any, Any]:
    """After one step, so that the files cannot hold what the model came with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=stage(number), mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    row = examples()[accelerator.process_index]
    accelerator.backward(model(**{key: value[None] for key, value in row.items()}).loss)
    optimizer.step()
    return accelerator, model


def _save_as_the_examples_do(accelerator: Any, model: Any, home: str, **options: Any) -> None:
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        home,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        **options,
    )
    accelerator.wait_for_everyone()


def _save_all(directory: str) -> list[dict[str, torch.Tensor]]:
    states = []
    for index, (number, precision, options) in enumerate(CASES):
        accelerator, model = _prepared(number, precision, llama())
        _save_as_the_examples_do(accelerator, model, f"{directory}/{index}", **options)
        state = accelerator.get_state_dict(model)
        states.append({name: value.clone() for name, value in state.items()})
        # As the other half of the examples does.
        if accelerator.is_main_process:
            model.save_pretrained(f"{directory}/{index}-state", state_dict=state)
    return states


def test_the_way_of_the_examples_saves_masters_from_all_ranks(tmp_path: Path) -> None:
    states = run_ranks(_save_all, 2, str(tmp_path))[0]
    for index, (_, _, options) in enumerate(CASES):
        for home, variant in ((f"{index}", options.get("variant")), (f"{index}-state", None)):
            loaded = AutoModelForCausalLM.from_pretrained(
                tmp_path / home, variant=variant, dtype="auto"
            )
            for name, value in loaded.state_dict().items():
                assert value.dtype is torch.float32
                torch.testing.assert_close(value, states[index][name], rtol=0, atol=0)
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    assert (tmp_path / "3" / "model.best.safetensors").is_file()


def _alone(directory: str) -> None:
    _, model = _prepared(3, "no", llama())
    with pytest.raises(
        ShardedParameterError, match=r"is_main_process=accelerator.*get_state_dict\(model\)"
    ):
        model.save_pretrained(directory)
    accelerator, model = _prepared(2, "no", llama())
    copied = copy.deepcopy(model)
    if accelerator.is_main_process:
        model.save_pretrained(f"{directory}/one")
        copied.save_pretrained(f"{directory}/copy")


def test_one_rank_alone_saves_below_stage_3_and_is_told_how_above(tmp_path: Path) -> None:
    run_ranks(_alone, 2, str(tmp_path))
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / home) for home in ("one", "copy")
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def _adapters(directory: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    accelerator, model = _prepared(3, "no", get_peft_model(llama(), config))
    _save_as_the_examples_do(accelerator, model, directory)
    state = accelerator.get_state_dict(model)
    return {name: value for name, value in state.items() if "lora_" in name}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_saved_in_pefts_own_layout(tmp_path: Path) -> None:
    state = run_ranks(_adapters, 2, str(tmp_path))[0]
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).state_dict()
    assert any(value.any() for name, value in state.items() if "lora_B" in name)
    for name, value in state.items():
        assert torch.equal(loaded[name], value)
