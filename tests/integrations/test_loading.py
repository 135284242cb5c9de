"""At stage 3 models are loaded and made in slices, and are the same models."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import hf_speed
from hf_speed.engine import engine_of
from hf_speed.errors import ConfigError, ShardedParameterError
from hf_speed.integrations.transformers import from_config, loading
from tests.integrations.toys import (
    arguments,
    curve,
    examples,
    flat,
    llama,
    llama_config,
    stage,
    trainer,
)
from tests.support import run_ranks

STAGE3 = stage(3)


def _mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = llama_config().to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    config = MixtralConfig(
        **{key: sizes[key] for key in kept}, num_key_value_heads=2, num_local_experts=4
    )
    return MixtralForCausalLM(config)


def _prepared(model: Any, precision: str = "no") -> Any:
    AcceleratorState._reset_state()
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=STAGE3, mixed_precision=precision)
    return accelerator.prepare(model)


def _equals(model: Any, plain: Any) -> bool:
    """Whether a prepared model has the values of a plain one, buffers and tied names included."""
    engine = engine_of(model)
    if engine is None:
        return False
    values = {name: value.clone() for name, value in engine.full_parameters(master=True)}
    expected = dict(plain.named_parameters())
    same = values.keys() == expected.keys() and all(
        torch.equal(values[name], expected[name]) for name in expected
    )
    buffers = dict(plain.named_buffers())
    return same and all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def _held(model: Any) -> int:
    """Elements of parameters that this rank holds after loading, before the engine has them."""
    waiting = [
        rows
        for module in model.modules()
        for rows in vars(module).get("_hf_speed_waiting", {}).values()
    ]
    small = sum(
        each.numel()
        for each in model.parameters()
        if not isinstance(each, loading.WaitingParameter)
    )
    return small + sum(rows.local.numel() for rows in waiting)


def _load(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("llama", "tied", "mixtral"):
        home = f"{directory}/{name}"
        plain = AutoModelForCausalLM.from_pretrained(home)
        model = hf_speed.from_pretrained(AutoModelForCausalLM, home, hf_speed=STAGE3)
        total = sum(each.numel() for each in plain.parameters())
        found[f"{name} share"] = _held(model) / total
        found[f"{name} equal"] = _equals(_prepared(model), plain)
    home = f"{directory}/llama"
    model = hf_speed.from_pretrained(AutoModelForCausalLM, home, hf_speed=STAGE3)
    found["bf16 equal"] = _equals(
        _prepared(model, "bf16"), AutoModelForCausalLM.from_pretrained(home)
    )
    # A head that the checkpoint lacks is drawn as plain from_pretrained draws it.
    torch.manual_seed(4)
    plain_head = AutoModelForSequenceClassification.from_pretrained(home, num_labels=40)
    torch.manual_seed(4)
    head = hf_speed.from_pretrained(
        AutoModelForSequenceClassification, home, hf_speed=STAGE3, num_labels=40
    )
    found["head equal"] = _equals(_prepared(head), plain_head)
    # Once loaded, stock from_pretrained is stock again.
    found["restored"] = _held(AutoModelForCausalLM.from_pretrained(home)) == sum(
        each.numel() for each in AutoModelForCausalLM.from_pretrained(home).parameters()
    )
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_from_pretrained_reads_slices_of_the_same_model(tmp_path: Path, world_size: int) -> None:
    llama().save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    _mixtral().save_pretrained(tmp_path / "mixtral")
    for found in run_ranks(_load, world_size, str(tmp_path)):
        assert all(
            value for name, value in found.items() if name.endswith(("equal", "restored"))
        ), found
        for name in ("llama", "tied", "mixtral"):
            # One row more than its share, and what is too small to be sliced.
            assert found[f"{name} share"] < 1 / world_size + 0.12


def _from_config() -> dict[str, Any]:
    torch.manual_seed(0)
    model = from_config(AutoModelForCausalLM, llama_config(), hf_speed=STAGE3)
    share = _held(model) / sum(each.numel() for each in model.parameters())
    training = model.training
    prepared = _prepared(model)
    engine = engine_of(prepared)
    if engine is None:
        raise RuntimeError("No engine.")
    values = {name: value.clone() for name, value in engine.full_parameters()}
    batch = {key: value[None] for key, value in examples(1)[0].items()}
    loss = float(prepared(**batch).loss)
    return {"share": share, "training": training, "values": values, "loss": loss}


def test_from_config_draws_the_same_model_on_any_number_of_ranks() -> None:
    two, three = run_ranks(_from_config, 2)[0], run_ranks(_from_config, 3)[0]
    assert two["share"] < 0.6
    assert two["training"]
    for name, value in two["values"].items():
        assert torch.equal(value, three["values"][name])
        spread = float(value.std())
        assert spread == 0.0 if "norm" in name else spread == pytest.approx(0.02, rel=0.1)
    assert two["loss"] == pytest.approx(three["loss"], rel=1e-6)


def _model_of(directory: str, way: str) -> Any:
    if way == "plain":
        return AutoModelForCausalLM.from_pretrained(directory)
    return hf_speed.from_pretrained(AutoModelForCausalLM, directory, hf_speed=STAGE3)


def _orders(directory: str) -> dict[str, Any]:
    def train(**given: Any) -> list[tuple[float, float]]:
        made = hf_speed.Trainer(
            args=arguments(directory, STAGE3), train_dataset=examples(), **given
        )
        made.train()
        return curve(made)

    seen: list[bool] = []

    def model_init() -> Any:
        model = AutoModelForCausalLM.from_pretrained(directory)
        seen.append(_held(model) < 0.7 * sum(each.numel() for each in model.parameters()))
        return model

    def lora(way: str) -> Any:
        model = _model_of(directory, way)
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return get_peft_model(model, config)

    return {
        "plain": train(model=_model_of(directory, "plain")),
        "sliced": train(model=_model_of(directory, "sliced")),
        "model_init": train(model_init=model_init),
        "sliced in model_init": all(seen) and len(seen) == 2,
        "lora plain": train(model=lora("plain")),
        "lora sliced": train(model=lora("sliced")),
    }


def test_a_model_in_slices_trains_as_a_whole_one_in_any_order(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    found = run_ranks(_orders, 2, str(tmp_path))[0]
    torch.testing.assert_close(flat(found["sliced"]), flat(found["plain"]), rtol=0, atol=0)
    torch.testing.assert_close(flat(found["model_init"]), flat(found["plain"]), rtol=0, atol=0)
    assert found["sliced in model_init"]
    torch.testing.assert_close(
        flat(found["lora sliced"]), flat(found["lora plain"]), rtol=0, atol=0
    )


def _before_a_process_group(directory: str) -> float:
    model = hf_speed.from_pretrained(AutoModelForCausalLM, directory, hf_speed=STAGE3)
    return (
        trainer(directory, STAGE3, model=model).evaluate()["eval_loss"] + 0 * dist.get_world_size()
    )


def _whole(directory: str) -> float:
    return trainer(
        directory, None, model=AutoModelForCausalLM.from_pretrained(directory)
    ).evaluate()["eval_loss"]


def test_the_model_may_come_before_the_arguments_that_start_the_world(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "ACCELERATE_USE_CPU": "1"}
    sliced = run_ranks(_before_a_process_group, 2, str(tmp_path), backend=None, env=env)[0]
    assert sliced == pytest.approx(run_ranks(_whole, 2, str(tmp_path))[0], rel=1e-6)


def _reads(directory: str) -> str:
    model = hf_speed.from_pretrained(AutoModelForCausalLM, directory, hf_speed=STAGE3)
    try:
        model.model.embed_tokens.weight.sum()
    except ShardedParameterError as error:
        return str(error)
    return "read"


def test_a_waiting_parameter_says_what_to_do_when_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert (
        "Hand the model to Trainer or Accelerator.prepare first"
        in run_ranks(_reads, 2, str(tmp_path))[0]
    )


def _placed(directory: str) -> str:
    try:
        hf_speed.from_pretrained(
            AutoModelForCausalLM, directory, hf_speed=STAGE3, device_map="auto"
        )
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_device_map_is_refused_at_stage_3(tmp_path: Path) -> None:
    assert "Leave device_map out" in run_ranks(_placed, 2, str(tmp_path))[0]


def test_one_process_loads_plainly(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = hf_speed.from_pretrained(AutoModelForCausalLM, tmp_path, hf_speed=STAGE3)
    assert not any(isinstance(each, loading.WaitingParameter) for each in model.parameters())


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon.")


class _Watch(threading.Thread):
    """Samples the memory of this process every 2 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.base = self.peak = _own_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.peak = max(self.peak, _own_bytes())


def _peak(directory: str) -> tuple[int, int]:
    # What a first engine allocates besides is not the model's.
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=STAGE3)
    accelerator.prepare(torch.nn.Linear(4, 4))
    watch = _Watch()
    watch.start()
    model = accelerator.prepare(
        hf_speed.from_pretrained(AutoModelForCausalLM, directory, hf_speed=STAGE3)
    )
    watch.ended.set()
    watch.join()
    return watch.peak - watch.base, sum(each.numel() * 4 for each in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_loading_takes_its_slices_and_at_most_one_file(tmp_path: Path) -> None:
    shapes = {
        "vocab_size": 6000,
        "hidden_size": 640,
        "intermediate_size": 1600,
        "num_hidden_layers": 5,
    }
    llama(**shapes).save_pretrained(tmp_path, max_shard_size="24MB")
    file = max(each.stat().st_size for each in tmp_path.glob("*.safetensors"))
    for peak, model_bytes in run_ranks(_peak, 2, str(tmp_path)):
        # 16 MiB: what the allocator keeps of buffers that were given back; a second file is more.
        assert file > 20 << 20
        assert peak < model_bytes / 2 + file + (16 << 20)
