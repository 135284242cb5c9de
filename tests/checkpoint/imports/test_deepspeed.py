"""DeepSpeed's layout, made small: what is joined, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_speed
from hf_speed.checkpoint import StateReader
from hf_speed.checkpoint.imports import open_foreign
from hf_speed.checkpoint.imports.deepspeed import _loss_scale
from hf_speed.checkpoint.imports.pickles import Record
from hf_speed.errors import CheckpointError, ConfigError
from tests.checkpoint.imports.toys import (
    DynamicLossScaler,
    toy_weights,
    write_zero2,
    zero2_trees,
)

Trees = tuple[dict[str, Any], list[dict[str, Any]]]


def _edit(change: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> Trees:
    model, optims = zero2_trees(toy_weights())
    change(model, [tree["optimizer_state_dict"] for tree in optims])
    return model, optims


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_all_ranks_are_joined(tmp_path: Path, ranks: int) -> None:
    weights = toy_weights()
    write_zero2(tmp_path / "src", *zero2_trees(weights, ranks))
    foreign = open_foreign(tmp_path / "src")
    assert foreign.origin == f"DeepSpeed 0.0.toy, ZeRO stage 2, {ranks} rank(s)"
    for name, value in weights.items():
        assert torch.equal(foreign.weights[name].read(), value)
        assert torch.equal(foreign.states[name]["exp_avg"].read(), value * 2)
        assert torch.equal(foreign.states[name]["exp_avg_sq"].read(), value * 3)
    assert foreign.scalars["last.bias"] == {"step": 4.0}
    assert foreign.param_groups == ({"lr": 0.5, "betas": [0.9, 0.99]},)
    assert (foreign.step, foreign.num_ranks, foreign.optimizer) == (4, ranks, "AdamW")


def test_without_a_config_tensors_keep_their_names(tmp_path: Path) -> None:
    write_zero2(tmp_path / "src", *zero2_trees(toy_weights()))
    result = hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert any("no config.json" in note for note in result.notes)
    assert (result.num_parameters, result.num_states, result.step) == (3, 3, 4)
    with StateReader(tmp_path / "out") as reader:
        assert reader.meta["parameters"]["middle.weight"] == [4, 4]
        assert reader.meta["mesh"]["dp_shard"] == 2
        assert reader.meta["imported_from"].startswith("DeepSpeed")


def test_older_places_of_the_step_are_read(tmp_path: Path) -> None:
    """Its own Adam keeps it in the group; an elastic checkpoint beside a list of states."""

    def in_group(_model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
        for tree in optims:
            base = tree["base_optimizer_state"]
            del base["state"][0]["step"]
            base["param_groups"][0]["step"] = 9

    def elastic(_model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
        for tree in optims:
            states = list(tree["base_optimizer_state"]["state"].values())
            del states[0]["step"]
            tree["base_optimizer_state"] = states
            tree["base_optimizer_state_step"] = 8

    for name, change, step in (("group", in_group, 9.0), ("elastic", elastic, 8.0)):
        write_zero2(tmp_path / name, *_edit(change))
        foreign = open_foreign(tmp_path / name)
        assert foreign.scalars["first.weight"] == {"step": step}
        assert torch.equal(
            foreign.states["first.weight"]["exp_avg"].read(), toy_weights()["first.weight"] * 2
        )


def _shuffled(_model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
    for tree in optims:
        for addresses in tree["param_slice_mappings"]:
            for address in addresses.values():
                address.start = 0


def _padded(_model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
    for tree in optims:
        tree["param_alignment_paddings"] = [[1, 1, 1]]


def _both(model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
    _shuffled(model, optims)
    _padded(model, optims)


@pytest.mark.parametrize("change", [_shuffled, _padded])
def test_of_two_accounts_of_places_the_right_one_is_taken(tmp_path: Path, change: Any) -> None:
    """DeepSpeed's own mapping is wrong with round_robin_gradients."""
    write_zero2(tmp_path, *_edit(change))
    foreign = open_foreign(tmp_path)
    for name, value in toy_weights().items():
        assert torch.equal(foreign.weights[name].read(), value)


def test_places_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    write_zero2(tmp_path, *_edit(_both))
    says = "cannot be told apart. By the order .*middle.weight is not its weight.*By param_slice"
    with pytest.raises(CheckpointError, match=says):
        open_foreign(tmp_path)


def _drop(key: str) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    return lambda _model, optims: [tree.pop(key) for tree in optims] and None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("single_partition_of_fp32_groups"), "single_partition_of_fp32_groups is NoneType"),
        (
            lambda _m, optims: optims[0].update(partition_count=[3]),
            "3 ranks share the optimizer's state, but there are 2 files",
        ),
        (
            lambda model, _o: model["param_shapes"][0].update({"last.bias": torch.Size([7])}),
            r"last\.bias has shape \(7,\) in param_shapes, but its weight has \(6,\)",
        ),
        (
            lambda model, _o: model["param_shapes"][0].update({"last.bias": "long"}),
            "the shape of last.bias is str",
        ),
        (lambda model, _o: model.update(param_shapes=None), "written without ZeRO"),
        (lambda model, _o: model.update(module=[1]), "module is list where a dict belongs"),
        (
            lambda _m, optims: optims[0].update(single_partition_of_fp32_groups=[7]),
            "no masters of optimizer group 0",
        ),
        (
            lambda _m, optims: optims[0]["single_partition_of_fp32_groups"].__setitem__(
                0, torch.zeros(2)
            ),
            "reach beyond their files",
        ),
        (
            lambda _m, optims: optims[0].update(
                fp32_flat_groups=[], ds_zero_partition_groups=[], optimizer_state_dict={}
            ),
            "divides experts over ranks",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    write_zero2(tmp_path, *_edit(change))
    with pytest.raises(CheckpointError, match=says):
        open_foreign(tmp_path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    save = write_zero2(tmp_path, *zero2_trees(toy_weights(), 3))
    optim = "zero_pp_rank_{}_mp_rank_{}_optim_states.pt"
    (save / optim.format(1, "00")).rename(save / "aside")
    with pytest.raises(CheckpointError, match="lacks the file of rank 1"):
        open_foreign(tmp_path)
    (save / "aside").rename(save / optim.format(1, "01"))
    with pytest.raises(CheckpointError, match=r"mp_rank 01.*ds_to_universal"):
        open_foreign(tmp_path)
    for path in save.glob("*optim*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="stage 0"):
        open_foreign(tmp_path)
    (save / "layer_03-model_00-model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"layer_03.*pipeline or to experts"):
        open_foreign(tmp_path)


def test_the_tag_must_name_a_directory_beside_it(tmp_path: Path) -> None:
    save = write_zero2(tmp_path, *zero2_trees(toy_weights()))
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere', which is no directory"):
        open_foreign(tmp_path)
    (tmp_path / "latest").unlink()
    assert open_foreign(tmp_path).step == 4  # There is only one.
    shutil.copytree(save, tmp_path / "global_step5")
    with pytest.raises(CheckpointError, match="it holds global_step4, global_step5"):
        open_foreign(tmp_path)
    assert open_foreign(tmp_path / "global_step5").step == 4


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    write_zero2(tmp_path / "src", *zero2_trees(toy_weights()))
    out = tmp_path / "out"
    calls: list[tuple[dict[str, Any], str]] = [
        ({"kind": "megatron"}, "kind='megatron' is unknown; use one of auto, deepspeed"),
        ({"config": tmp_path}, r"has no config\.json"),
        ({"dtype": "int8"}, "dtype='int8' is no floating-point dtype"),
        ({"max_shard_size": "many"}, "max_shard_size='many' is no size"),
    ]
    for options, says in calls:
        with pytest.raises(ConfigError, match=says):
            hf_speed.import_checkpoint(tmp_path / "src", out, **options)
    with pytest.raises(ConfigError, match="is no directory"):
        hf_speed.import_checkpoint(tmp_path / "absent", out)
    with pytest.raises(ConfigError, match="exists already and is not empty"):
        hf_speed.import_checkpoint(tmp_path / "src", tmp_path)
    hf_speed.import_checkpoint(tmp_path / "src", out)
    with pytest.raises(ConfigError, match="is a checkpoint of hf_speed already"):
        hf_speed.import_checkpoint(out, tmp_path / "again")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds notes\.txt. Known are"):
        hf_speed.import_checkpoint(tmp_path / "other", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    save = write_zero2(tmp_path / "src", *zero2_trees(toy_weights()))
    path = save / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"rank_1_mp_rank_00_optim_states\.pt .*cut short"):
        hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["src"]


def test_moments_without_a_step_need_one(tmp_path: Path) -> None:
    def forget(model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
        model["global_steps"] = None
        for tree in optims:
            del tree["base_optimizer_state"]["state"][0]["step"]

    write_zero2(tmp_path / "src", *_edit(forget))
    with pytest.raises(CheckpointError, match="says of no step"):
        hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out")
    hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out", step=6)
    with StateReader(tmp_path / "out") as reader:
        assert reader.scalars["first.weight"] == {"step": 6.0}


def test_the_loss_scaler_is_translated(tmp_path: Path) -> None:
    def scaled(_model: dict[str, Any], optims: list[dict[str, Any]]) -> None:
        for tree in optims:
            tree["loss_scaler"] = DynamicLossScaler(
                cur_scale=2.0**10, cur_iter=20, last_overflow_iter=14, cur_hysteresis=2
            )

    write_zero2(tmp_path, *_edit(scaled))
    wanted = {"scale": 1024.0, "good_steps": 5.0, "tolerance": 2.0}
    assert open_foreign(tmp_path).loss_scale == wanted
    static = Record()
    static.fields = {"cur_scale": 1.0}
    assert _loss_scale(static) is None


def test_adapters_are_refused(tmp_path: Path) -> None:
    weights = {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}
    write_zero2(tmp_path / "src", *zero2_trees(weights))
    with pytest.raises(CheckpointError, match="PEFT model"):
        hf_speed.import_checkpoint(tmp_path / "src", tmp_path / "out")
