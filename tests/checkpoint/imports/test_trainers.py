"""What transformers' own Trainer saves, on DeepSpeed, on FSDP and on nothing, goes on here.

The checkpoints are of one run, at step 3; what the Trainer logged of steps 4 to 6 is beside them.
See scripts/dev/make_trainer_checkpoints.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_speed
from hf_speed.checkpoint import StateReader
from hf_speed.checkpoint.imports import open_foreign
from hf_speed.checkpoint.imports.foreign import Strips
from hf_speed.errors import CheckpointError
from hf_speed.integrations.importing import Imported
from hf_speed.integrations.numbering import find_numbers

TRAINERS = Path(__file__).parent / "trainers"
STEP, STEPS = 3, ("4", "5", "6")


def _said(name: str) -> dict[str, Any]:
    return json.loads((TRAINERS / name / "expected.json").read_text(encoding="utf-8"))


def _import(source: Path, out: Path) -> Imported:
    # The Trainer puts no config.json into checkpoints of FSDP's shards.
    has_own = (source / "config.json").is_file()
    return hf_speed.import_checkpoint(source, out, config=None if has_own else TRAINERS / "plain")


def _go_on(name: str, source: Path, out: Path, stage: int) -> list[dict[str, Any]]:
    """Lines of the log, from the same script with hf_speed."""
    said = _said(name)
    args = hf_speed.TrainingArguments(
        str(out), hf_speed={"zero": {"stage": stage}}, per_device_train_batch_size=4, use_cpu=True,
        **(said["arguments"] | {"save_strategy": "no"}),
    )  # fmt: skip
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in said["rows"]]
    # Other weights than those of the checkpoint, which are to replace them.
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(source).config)
    trainer = hf_speed.Trainer(model=model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(source))
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("name", "stage"), [("zero2", 3), ("zero3", 2), ("fsdp2", 1), ("plain", 3)]
)
def test_the_trainers_script_goes_on_with_its_own_losses(
    tmp_path: Path, name: str, stage: int
) -> None:
    said = _said(name)
    result = _import(TRAINERS / name, tmp_path / "imported")
    assert (result.step, result.num_states, result.notes) == (STEP, 12, ())
    lines = _go_on(name, tmp_path / "imported", tmp_path / "out", stage)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        step = str(line["step"])
        assert line["loss"] == pytest.approx(said["losses"][step], rel=1e-6), step
        assert line["learning_rate"] == said["rates"][step], step
        assert line["grad_norm"] == pytest.approx(said["grad_norms"][step], rel=1e-6), step


def _plain(tmp_path: Path, change: Any = None) -> Path:
    """A copy of the plain Trainer's checkpoint, its optimizer's state dict changed."""
    source = tmp_path / "source"
    shutil.copytree(TRAINERS / "plain", source)
    if change is not None:
        tree = torch.load(source / "optimizer.pt", weights_only=True)
        change(tree)
        torch.save(tree, source / "optimizer.pt")
    return source


def test_moments_get_the_names_of_the_parameters_that_they_are_of(tmp_path: Path) -> None:
    source = _plain(tmp_path)
    hf_speed.import_checkpoint(source, tmp_path / "out")
    state = torch.load(source / "optimizer.pt", weights_only=True)["state"]
    model = AutoModelForCausalLM.from_pretrained(source)
    names = [name for name, _ in model.named_parameters()]
    ordered = [n for n in names if "norm" not in n] + [n for n in names if "norm" in n]
    with StateReader(tmp_path / "out") as reader:
        assert reader.meta["optimizer"] == "AdamW"
        for number, name in enumerate(ordered):
            value = state[number]["exp_avg"]
            assert torch.equal(reader.read(name, "exp_avg", 0, value.numel()), value.flatten()), (
                name
            )
            assert reader.scalars[name] == {"step": STEP}


def test_moments_that_cannot_be_named_are_left_out_with_a_note(tmp_path: Path) -> None:
    """And are missed: losses are others then."""

    def two_less(tree: Any) -> None:
        tree["param_groups"][0]["params"] = tree["param_groups"][0]["params"][:-1]
        del tree["state"][8]

    source = _plain(tmp_path, two_less)
    result = hf_speed.import_checkpoint(source, tmp_path / "out")
    assert result.num_states == 0
    assert (
        "groups of [8, 3] parameters are not those that a Trainer makes of a Llama"
        in (result.notes[0])
    )
    assert any("starts its optimizer anew" in note for note in result.notes)
    lines = _go_on("plain", tmp_path / "out", tmp_path / "run", 2)
    wanted = _said("plain")["losses"]
    assert lines[3]["loss"] == pytest.approx(wanted["4"], rel=1e-6)
    assert lines[5]["loss"] != pytest.approx(wanted["6"], rel=1e-4)


def test_one_group_is_in_the_models_order_and_no_config_gives_no_names(tmp_path: Path) -> None:
    names = [
        n for n, _ in AutoModelForCausalLM.from_pretrained(TRAINERS / "plain").named_parameters()
    ]
    ordered = [n for n in names if "norm" not in n] + [n for n in names if "norm" in n]

    def join(tree: Any) -> None:
        old = {name: tree["state"][number] for number, name in enumerate(ordered)}
        tree["state"] = {number: old[name] for number, name in enumerate(names)}
        tree["param_groups"] = [tree["param_groups"][0] | {"params": list(range(12))}]

    source = _plain(tmp_path, join)
    assert hf_speed.import_checkpoint(source, tmp_path / "out").num_states == 12
    with StateReader(tmp_path / "out") as reader:
        state = torch.load(source / "optimizer.pt", weights_only=True)["state"]
        last = names.index("model.norm.weight")
        assert torch.equal(reader.read(names[last], "exp_avg", 0, 8), state[last]["exp_avg"])
    (source / "config.json").unlink()
    result = hf_speed.import_checkpoint(source, tmp_path / "bare")
    assert result.num_states == 0
    assert any("the model's config, which would say" in note for note in result.notes)


class _Odd(torch.nn.Module):
    """By name `norm` does not decay, by dimensions `scale` does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.norm = torch.nn.Linear(3, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.zeros(4))


def test_orders_that_fit_alike_are_not_guessed_between(tmp_path: Path) -> None:
    foreign = open_foreign(_plain(tmp_path))
    assert foreign.numbered is not None
    odd: Any = _Odd()
    counted = foreign.numbered._replace(groups=((0, 1), (2,)), states={}, scalars={})
    assert find_numbers(odd, counted) == ({}, "several orders of the parameters fit its shapes")
    # A moment's shape tells.
    for last, name in ((4,), "scale"), ((3, 3), "norm.weight"):
        value = Strips(last, torch.float32, ())
        numbers, _ = find_numbers(odd, counted._replace(states={2: {"exp_avg": value}}))
        assert numbers[name] == 2


def test_a_run_goes_on_where_the_config_beside_it_was_edited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "imported"
    _import(TRAINERS / "plain", home)
    for name in ("config.json", "generation_config.json"):
        body = json.loads((home / name).read_text()) | {"bos_token_id": 3}
        (home / name).write_text(json.dumps(body))
    lines = _go_on("plain", home, tmp_path / "out", 0)
    assert lines[5]["loss"] == pytest.approx(_said("plain")["losses"]["6"], rel=1e-6)
    assert caplog.text.count("config.json has ") == 2
    assert f"{home}/generation_config.json has" in caplog.text
    assert "was imported and has no RNG states of ours. The Trainer goes on with" in caplog.text


def test_no_optimizers_state_is_refused_by_name(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "param_groups is NoneType where a list belongs": lambda tree: tree.pop("param_groups"),
        "the state of parameter 9, which is in no group": lambda tree: tree["param_groups"].pop(),
        "has a parameter in two groups": lambda tree: tree["param_groups"][1]["params"].append(0),
        "calls a parameter 'x'": lambda tree: tree["state"].update(x={}),
        "exp_avg of 0 is neither a tensor": lambda tree: tree["state"][0].update(exp_avg="x"),
    }
    for number, (message, change) in enumerate(cases.items()):
        source = _plain(tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=message):
            open_foreign(source)
