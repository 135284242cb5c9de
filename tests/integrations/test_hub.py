"""Models that several ranks wrote load with plain transformers, and equal save_pretrained's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from hf_speed.checkpoint.saver import Saver
from hf_speed.errors import CheckpointError
from hf_speed.integrations.transformers.hub import plan_hub_model, save_hub_model
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from tests.support import run_ranks

AT_ONCE = Saver(IDENTITY, is_behind=False).begin("Saving a model")

MANY_BYTES = 2500
"""A file size at which every model here needs several, and an embedding has one of its own."""

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=64
    )
    return transformers.T5ForConditionalGeneration(config)


def marian() -> transformers.PreTrainedModel:
    """Keeps its position table out of its files."""
    config = transformers.MarianConfig(
        d_model=16,
        vocab_size=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=0,
    )
    return transformers.MarianMTModel(config)


def resnet() -> transformers.PreTrainedModel:
    """Has buffers that are saved: running means, counters in int64."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, Callable[..., transformers.PreTrainedModel]] = {
    "llama": llama,
    "mixtral": mixtral,
    "gpt2": gpt2,
    "t5": t5,
    "marian": marian,
    "resnet": resnet,
}


def build(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    return MODELS[name]()


def passing_by(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter in a buffer that the next one overwrites, as an engine yields them."""
    buffer = torch.empty(max(p.numel() for p in model.parameters()))
    for name, parameter in model.named_parameters():
        view = buffer[: parameter.numel()].view(parameter.shape)
        yield name, view.copy_(parameter.detach())
        buffer.fill_(float("nan"))


def tensors_in(directory: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert value.dtype == right[name].dtype, name


def _save_rank(directory: str) -> None:
    world = AxisGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "world")
    save = Saver(world, is_behind=False).begin("Saving models")
    for name in MODELS:
        for label, limit in (("one", 1 << 30), ("many", MANY_BYTES)):
            model = build(name)
            target = Path(directory) / f"{name}-{label}"
            save_hub_model(model, target, passing_by(model), save=save, max_shard_bytes=limit)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, saved by two ranks in one file and in many."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(_save_rank, 2, str(directory))
    return directory


@pytest.mark.parametrize("label", ["one", "many"])
@pytest.mark.parametrize("name", list(MODELS))
def test_plain_transformers_loads_what_two_ranks_saved(name: str, label: str, saved: Path) -> None:
    model = build(name)
    loaded, info = type(model).from_pretrained(saved / f"{name}-{label}", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("label", ["one", "many"])
@pytest.mark.parametrize("name", list(MODELS))
def test_files_hold_what_save_pretrained_writes(
    name: str, label: str, saved: Path, tmp_path: Path
) -> None:
    ours = saved / f"{name}-{label}"
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size=1 << 30 if label == "one" else MANY_BYTES)
    assert_same(tensors_in(ours), tensors_in(tmp_path))
    for file in ("config.json", "generation_config.json"):
        assert (ours / file).exists() == (tmp_path / file).exists()
        if (tmp_path / file).exists():
            assert json.loads((ours / file).read_text()) == json.loads(
                (tmp_path / file).read_text()
            )
    index = "model.safetensors.index.json"
    assert (ours / index).exists() == (tmp_path / index).exists()
    if label == "many":
        mine, theirs = (json.loads((d / index).read_text()) for d in (ours, tmp_path))
        assert mine["metadata"] == theirs["metadata"]
        assert mine["weight_map"].keys() == theirs["weight_map"].keys()


def test_files_stay_below_the_limit_and_are_shared_out(saved: Path) -> None:
    model = build("mixtral")
    plan = plan_hub_model(model, max_shard_bytes=MANY_BYTES)
    assert len(plan.files) > 4
    assert all(file.nbytes <= MANY_BYTES or len(file.tensors) == 1 for file in plan.files)
    assert {file.name for file in plan.files} == {
        path.name for path in (saved / "mixtral-many").glob("*.safetensors")
    }


def test_experts_get_the_names_of_the_hub() -> None:
    plan = plan_hub_model(build("mixtral"))
    names = {spec.name for file in plan.files for spec in file.tensors}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    group = next(g for g in plan.groups if "model.layers.1.mlp.experts.gate_up_proj" in g.sources)
    assert len(group.targets) == 8
    assert not group.is_rename


def test_tied_weights_are_planned_once_under_the_name_that_loads() -> None:
    plan = plan_hub_model(build("t5"))
    names = [spec.name for file in plan.files for spec in file.tensors]
    assert "shared.weight" in names
    assert "lm_head.weight" not in names
    assert plan.aliases["encoder.embed_tokens.weight"] == "shared.weight"


def test_weights_that_only_the_config_calls_tied_are_both_saved(tmp_path: Path) -> None:
    model = build("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE)
    assert {"lm_head.weight", "transformer.wte.weight"} < tensors_in(tmp_path).keys()


def test_dtype_casts_the_files_and_the_config_but_not_the_model(tmp_path: Path) -> None:
    model = build("resnet")
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE, dtype=torch.bfloat16)
    state = model.state_dict()
    wanted = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    assert_same(tensors_in(tmp_path), wanted)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.dtype != torch.bfloat16


def test_loaded_and_resized_model_saves_again(saved: Path, tmp_path: Path) -> None:
    model = transformers.MixtralForCausalLM.from_pretrained(saved / "mixtral-many")
    model.resize_token_embeddings(70)
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_second_save_with_fewer_files_leaves_none_of_the_first(tmp_path: Path) -> None:
    model = build("llama")
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE, max_shard_bytes=MANY_BYTES)
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_plain_module_is_saved_without_configs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE)
    assert_same(tensors_in(tmp_path), dict(model.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_lossy_reverse_falls_back_to_names_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_speed.integrations.transformers import hub

    def lossy(_: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v[:1] if k.endswith("gate_up_proj") else v for k, v in tensors.items()}

    monkeypatch.setattr(hub, "revert_weight_conversion", lossy)
    model = build("mixtral")
    save_hub_model(model, tmp_path, passing_by(model), save=AT_ONCE)
    assert "gate_up_proj would lose elements" in caplog.text
    assert_same(tensors_in(tmp_path), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_refused_with_the_way_to_save_them() -> None:
    import peft

    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"carries PEFT adapters.*save_pretrained"):
        plan_hub_model(model)
