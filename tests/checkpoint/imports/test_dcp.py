"""torch's distributed checkpoints in other forms than accelerate's, and names on the Hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_speed
from hf_speed.checkpoint import StateReader
from hf_speed.checkpoint.imports import open_foreign
from hf_speed.checkpoint.imports.convert import inverse
from hf_speed.errors import CheckpointError
from tests.checkpoint.imports.toys import FIXTURES, toy_weights


def _states(weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"exp_avg": value * 2, "exp_avg_sq": value * 3, "step": torch.tensor(5.0)}
        for name, value in weights.items()
    }


def _group(**settings: Any) -> dict[str, Any]:
    return {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.1, **settings}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch warns of saving without a process group."""
    monkeypatch.setattr("torch.distributed.checkpoint.state_dict_saver.warnings.warn", _ignore)


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Say nothing."""


def _save(directory: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=str(directory))


def test_model_and_optimizer_in_one_directory(tmp_path: Path) -> None:
    weights = toy_weights()
    groups = [_group(params=list(weights)[:2]), _group(params=list(weights)[2:], lr=0.25)]
    optimizer = {"state": _states(weights), "param_groups": groups}
    more = {"lr_scheduler": {"last_epoch": 5}, "extra": torch.ones(2)}
    _save(tmp_path / "nested", {"model": weights, "optimizer": optimizer, **more})
    flat: dict[str, Any] = {}
    for name, values in _states(weights).items():
        flat |= {f"state.{name}.{kind}": value for kind, value in values.items()}
        for key, value in _group().items():
            flat[f"param_groups.{name}.{key}"] = value
    _save(tmp_path / "flat", {"model": weights, "optim": flat})
    for form, lrs in (("nested", [0.5, 0.25]), ("flat", [0.5])):
        foreign = open_foreign(tmp_path / form)
        assert set(foreign.weights) == foreign.trained == set(weights)
        for name, value in weights.items():
            assert torch.equal(foreign.weights[name].read(), value)
            assert torch.equal(foreign.states[name]["exp_avg_sq"].read(), value * 3)
            assert foreign.scalars[name] == {"step": 5.0}
        assert [group["lr"] for group in foreign.param_groups or ()] == lrs
        assert foreign.step == 5


def test_weights_alone(tmp_path: Path) -> None:
    _save(tmp_path / "src", toy_weights())
    foreign = open_foreign(tmp_path / "src")
    assert foreign.weights.keys() == toy_weights().keys()
    assert foreign.trained is None
    assert foreign.param_groups is None


def test_wrappers_are_taken_off_names(tmp_path: Path) -> None:
    weights = {"_orig_mod.a._checkpoint_wrapped_module.b": torch.ones(2)}
    _save(tmp_path / "src", {"model": weights})
    assert set(open_foreign(tmp_path / "src").weights) == {"a.b"}


def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    weights = toy_weights()
    _save(
        tmp_path / "other",
        {"model": weights, "optimizer": {"state": _states({"x": torch.ones(1)})}},
    )
    with pytest.raises(CheckpointError, match="state of x, which is no weight"):
        open_foreign(tmp_path / "other")
    _save(tmp_path / "none", {"train_state": {"step": torch.ones(2)}})
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_foreign(tmp_path / "none")
    two = tmp_path / "two"
    _save(two / "pytorch_model_fsdp_0", {"model": weights})
    _save(two / "pytorch_model_fsdp_1", {"model": weights})
    with pytest.raises(CheckpointError, match="several models"):
        open_foreign(two)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(FIXTURES / "fsdp2", source)
    part = source / "pytorch_model_fsdp_0" / "__1_0.distcp"
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp has \d+ bytes.*cut short"):
        hf_speed.import_checkpoint(source, tmp_path / "out")
    part.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp, which holds .* is missing"):
        open_foreign(source)
    (source / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"\x80\x04}.")
    with pytest.raises(CheckpointError, match=r"\.metadata is dict, no metadata"):
        open_foreign(source)


def test_a_grad_scaler_beside_it_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(FIXTURES / "fsdp2", source)
    scaler = {"scale": 512.0, "growth_factor": 2.0, "_growth_tracker": 7}
    torch.save(scaler, source / "scaler.pt")
    wanted = {"scale": 512.0, "good_steps": 7.0, "tolerance": 1.0}
    assert open_foreign(source).loss_scale == wanted


# ---- names and layouts of transformers ----


def _mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        bos_token_id=1, eos_token_id=2, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    return MixtralForCausalLM(config)


def _saved(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    names = list(weights)
    optimizer = {"state": _states(weights), "param_groups": [_group(params=names)]}
    _save(directory, {"model": weights, "optimizer": optimizer})
    model.config.save_pretrained(directory)  # type: ignore[operator, union-attr]


def test_experts_that_are_fused_in_memory_are_single_on_the_hub(tmp_path: Path) -> None:
    """Whether the run named its tensors as memory has them, or as the Hub."""
    model = _mixtral()
    memory = {name: value.detach() for name, value in model.named_parameters()}
    model.save_pretrained(tmp_path / "hub")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    assert memory.keys() != hub.keys()
    for form, weights in (("memory", memory), ("hub_names", hub)):
        _saved(model, weights, tmp_path / form)
        hf_speed.import_checkpoint(tmp_path / form, tmp_path / f"{form}_out")
        files = load_file(tmp_path / f"{form}_out" / "model.safetensors")
        assert files.keys() == hub.keys()
        assert all(torch.equal(files[name], hub[name]) for name in hub)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{form}_out")
        assert all(torch.equal(loaded.get_parameter(name), memory[name]) for name in memory)
        with StateReader(tmp_path / f"{form}_out") as reader:
            assert set(reader.meta["parameters"]) == set(memory)
            for name, value in memory.items():
                stored = reader.read(name, "exp_avg", 0, value.numel())
                assert torch.equal(stored, value.reshape(-1) * 2), name


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    _mixtral().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"MixtralForCausalLM, which needs .*does not have"):
        hf_speed.import_checkpoint(FIXTURES / "fsdp2", tmp_path / "out", config=tmp_path)
    model = _mixtral()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    _saved(model, weights | {"more.weight": torch.ones(1)}, tmp_path / "more")
    with pytest.raises(CheckpointError, match=r"more\.weight, which was trained, but the config's"):
        hf_speed.import_checkpoint(tmp_path / "more", tmp_path / "out")
    name = "model.norm.weight"
    _saved(model, weights | {name: torch.ones(9)}, tmp_path / "shape")
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(9,\) in the checkpoint"):
        hf_speed.import_checkpoint(tmp_path / "shape", tmp_path / "out")


def test_tensors_without_a_place_are_noted(tmp_path: Path) -> None:
    model = _mixtral()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    optimizer = {"state": _states(weights), "param_groups": [_group(params=list(weights))]}
    old = {"model.rotary_emb.inv_freq": torch.ones(2)}
    _save(tmp_path / "src", {"model": weights | old, "optimizer": optimizer})
    model.config.save_pretrained(tmp_path / "src")
    result = hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert any("inv_freq" in note for note in result.notes)


def test_a_conversion_that_adds_cannot_be_turned_back() -> None:
    def swap(values: Any) -> dict[str, Tensor]:
        return {"x": values["a"].t(), "y": values["b"]}

    shapes = {"a": (2, 3), "b": (4,)}
    values = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    back = inverse(swap, shapes)(swap(values))
    assert all(torch.equal(back[name], values[name]) for name in values)
    with pytest.raises(CheckpointError, match="a, b on the Hub cannot be turned back"):
        inverse(lambda values: {"x": values["a"], "y": values["b"] * 0}, shapes)
