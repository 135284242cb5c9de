"""Models that go to a pipeline or are divided are loaded and made in slices, whole on no rank."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_speed
from hf_speed.engine import engine_of
from hf_speed.integrations.transformers import from_config, loading
from tests.integrations.toys import llama, llama_config
from tests.support import run_ranks

MESHES: list[dict[str, Any]] = [
    {"mesh": {"pp": 2, "tp": 2}, "zero": {"stage": 1}},
    {"mesh": {"pp": 2}, "zero": {"stage": 3}},
    {"mesh": {"tp": 4}, "zero": {"stage": 0}},
]


def _held(model: Any) -> int:
    """Elements of parameters that this rank holds after loading, before an engine has them."""
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


def _loaded(directory: str, config: dict[str, Any], name: str) -> dict[str, Any]:
    home = f"{directory}/{name}"
    plain = AutoModelForCausalLM.from_pretrained(home)
    total = sum(each.numel() for each in plain.parameters())
    model = hf_speed.from_pretrained(AutoModelForCausalLM, home, hf_speed=config)
    held = _held(model) / total
    model = hf_speed.Accelerator(hf_speed=config).prepare(model)
    engine = engine_of(model)
    assert engine is not None
    kept = sum(group.master.numel() for group in engine.parts.groups) / total
    values = {key: value.clone() for key, value in engine.full_parameters(master=True)}
    expected = dict(plain.named_parameters())
    ids = torch.arange(3, 15).view(2, 6)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain_logits = plain.eval()(input_ids=ids).logits
    engine.detach()
    return {
        "held": held,
        "kept": kept,
        "equal": values.keys() == expected.keys()
        and all(torch.equal(values[key], expected[key]) for key in expected),
        "detached": all(
            torch.equal(value, expected[key]) for key, value in model.named_parameters()
        ),
        "logits": float((logits - plain_logits).abs().max()),
    }


def _made(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shapes = llama_config(num_hidden_layers=4)
    model = from_config(AutoModelForCausalLM, shapes, hf_speed=config)
    model = hf_speed.Accelerator(hf_speed=config).prepare(model)
    engine = engine_of(model)
    assert engine is not None
    return {key: value.clone() for key, value in engine.full_parameters(master=True)}


def _mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = llama_config(num_hidden_layers=4).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    shapes = {key: sizes[key] for key in kept} | {"intermediate_size": 48}
    return MixtralForCausalLM(
        MixtralConfig(**shapes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )


def _everything(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, config in enumerate(MESHES):
        for name in ("llama", "tied"):
            found[f"{name} {index}"] = _loaded(directory, config, name)
    found["mixtral"] = _loaded(directory, MESHES[1], "mixtral")
    found["made"] = [_made(config) for config in MESHES]
    return found


def test_each_rank_reads_its_rows_and_keeps_its_part(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    llama(**heads).save_pretrained(tmp_path / "llama")
    llama(tie_word_embeddings=True, **heads).save_pretrained(tmp_path / "tied")
    _mixtral().save_pretrained(tmp_path / "mixtral")
    for found in run_ranks(_everything, 4, str(tmp_path)):
        made = found.pop("made")
        for key in made[0]:
            assert all(torch.equal(each[key], made[0][key]) for each in made), key
        for name, each in found.items():
            assert each["equal"], name
            assert each["detached"], name
            assert each["logits"] < 1e-5, name
            assert each["held"] < 0.4, name
            # Uneven stages and embeddings on two of them: the largest part of four.
            assert each["kept"] < 0.45, (name, each["kept"])
