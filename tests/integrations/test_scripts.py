"""Scripts as others ship them, with the one import changed: accelerate's and TRL's own.

They are run from the installed packages. What they fetch from the network (a data set, a model, a
metric) has a local stand-in here.
"""

import contextlib
import os
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import accelerate
import accelerate.accelerator
import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import hf_speed
from hf_speed.run import main as run_script
from tests.integrations.toys import VOCABULARY, llama, stage
from tests.support import run_ranks


def _fresh_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def _rebound(config: Any) -> Iterator[None]:
    """`accelerate.Accelerator` means ours, as if a script's import line were changed."""
    if config is None:
        yield
        return

    class Ours(hf_speed.Accelerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, hf_speed=config, **kwargs)

    with (
        mock.patch.object(accelerate, "Accelerator", Ours),
        mock.patch.object(accelerate.accelerator, "Accelerator", Ours),
    ):
        yield


def _upstream_script(name: str, config: Any) -> None:
    _fresh_state()
    with _rebound(config):
        runpy.run_module(f"accelerate.test_utils.scripts.{name}", run_name="__main__")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("test_script", 0),
        ("test_script", 1),
        ("test_script", 2),
        ("test_ops", 0),
        ("test_ops", 3),
        ("test_sync", 0),
    ],
)
def test_accelerates_own_scripts_run(name: str, number: int) -> None:
    # Their sections in 16 bit mean fp32 parameters under autocast.
    run_ranks(_upstream_script, 2, name, stage(number, precision={"working_dtype": "own"}))


@pytest.mark.parametrize(
    ("name", "number", "line", "why"),
    [
        # Trained as under DDP, it then reads `unwrap_model(model).a`, which no rank holds.
        (
            "test_script",
            3,
            "torch.testing.assert_close(",
            r"values of a of shape \(\).*gathered\(model, \['a'\]\)",
        ),
        # It compares parameter.grad, which from stage 1 on is in the optimizer's parts.
        ("test_sync", 1, "allclose(param.grad, ddp_param.grad)", r"gradient of a .*get_full_grad"),
        ("test_sync", 3, "allclose(param.grad, ddp_param.grad)", r"gradient of a .*get_full_grad"),
        # What they are about is refused: batches that run out, and another backend.
        ("test_distributed_data_loop", 1, "join_uneven_inputs([ddp_model])", "even_batches=True"),
        ("test_merge_weights", 3, "Accelerator(fsdp_plugin=plugin)", "Remove fsdp_plugin"),
    ],
)
def test_accelerates_own_scripts_stop_where_they_ask_for_what_is_not_there(
    name: str, number: int, line: str, why: str
) -> None:
    with pytest.raises(AssertionError, match=why) as caught:
        run_ranks(_upstream_script, 2, name, stage(number, precision={"working_dtype": "own"}))
    assert line in str(caught.value)


# ---- scripts that train a model on data ----


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[CLS]", "[SEP]"]
    words = {name: index for index, name in enumerate(special)}
    words |= {f"w{index}": index for index in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", eos_token="[SEP]"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT and a Llama with their tokenizers."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    for name, model in (("bert", BertForSequenceClassification(config)), ("llama", llama())):
        model.save_pretrained(home / name)
        _tokenizer().save_pretrained(home / name)
    return home


def _data(*_: Any, **__: Any) -> datasets.DatasetDict:
    """Pairs of sentences, alike or not, and a text: what load_dataset gives, whatever is asked."""
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randrange(4, 9)))

    def split(count: int) -> datasets.Dataset:
        rows = []
        for index in range(count):
            first = sentence()
            second = first if index % 2 else sentence()
            rows.append({"idx": index, "sentence1": first, "sentence2": second, "label": index % 2})
        return datasets.Dataset.from_list(rows)

    return datasets.DatasetDict({"train": split(64), "validation": split(33)})


def _texts(*_: Any, **__: Any) -> datasets.DatasetDict:
    return _data().rename_column("sentence1", "text").remove_columns(["idx", "sentence2", "label"])


class _Accuracy:
    """Stands for evaluate's metrics, which are downloaded."""

    def __init__(self, *_: str) -> None:
        self.hits: list[bool] = []

    def add_batch(self, *, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.hits += (predictions == references).tolist()

    def compute(self) -> dict[str, float]:
        hits, self.hits = self.hits, []
        return {"accuracy": sum(hits) / len(hits)}


@contextlib.contextmanager
def _offline(words: list[str], load: Any) -> Iterator[None]:
    evaluate = ModuleType("evaluate")
    vars(evaluate)["load"] = _Accuracy
    with (
        mock.patch.dict(sys.modules, {"evaluate": evaluate}),
        mock.patch.object(datasets, "load_dataset", load),
        mock.patch.object(sys, "argv", words),
    ):
        yield


def _external_script(name: str, words: list[str], config: Any) -> None:
    _fresh_state()
    module = f"accelerate.test_utils.scripts.external_deps.{name}"
    with _rebound(config), _offline([name, *words], _data):
        runpy.run_module(module, run_name="__main__")


def _same_weights(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # Sums in another order: AdamW divides tiny gradients by their own tiny size.
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


def test_accelerates_training_script_gives_the_model_that_it_gives_under_ddp(
    made: Path, tmp_path: Path
) -> None:
    homes = [tmp_path / "ddp", tmp_path / "ours"]
    for home, config in zip(homes, (None, stage(3)), strict=True):
        home.mkdir()
        words = ["--model_name_or_path", str(made / "bert"), "--output_dir", str(home)]
        run_ranks(_external_script, 2, "test_performance", words, config)
    _same_weights(homes[1] / "model.safetensors", homes[0] / "model.safetensors")
    results = [(home / "all_results.json").read_text() for home in homes]
    assert results[0] == results[1]


def test_accelerates_checkpointing_script_saves_and_resumes(made: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(made / "bert"), "--output_dir", str(tmp_path)]
    run_ranks(_external_script, 2, "test_checkpointing", words, stage(3))
    assert (tmp_path / "epoch_0" / "model.safetensors").is_file()
    # It compares accuracy, learning rates and the epoch with what it wrote before.
    again = [*words, "--resume_from_checkpoint", str(tmp_path / "epoch_0")]
    run_ranks(_external_script, 2, "test_checkpointing", again, stage(3))


def test_accelerates_metrics_script_runs() -> None:
    run_ranks(_external_script, 2, "test_metrics", [], stage(3))


def _sft(words: list[str]) -> None:
    import trl.scripts.sft

    script = str(trl.scripts.sft.__file__)
    with _offline(["sft", *words], _texts):
        if "HF_SPEED_CONFIG" in os.environ:
            run_script([script, *words])
        else:
            runpy.run_path(script, run_name="__main__")


def test_trls_script_trains_with_no_line_changed(made: Path, tmp_path: Path) -> None:
    words = {
        "model_name_or_path": str(made / "llama"),
        "dataset_name": "any",
        "max_length": "16",
        "max_steps": "4",
        "learning_rate": "1e-2",
        "bf16": "false",
        "use_cpu": "true",
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
    }
    line = [part for name, value in words.items() for part in (f"--{name}", value)]
    # One process, and not DDP, which may wait for ever once the script has ended its process group.
    whole = [*line, "--per_device_train_batch_size", "16", "--output_dir", str(tmp_path / "one")]
    run_ranks(_sft, 1, whole)
    mine = [*line, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "ours")]
    run_ranks(_sft, 2, mine, env={"HF_SPEED_CONFIG": '{"zero": {"stage": 3}}'})
    _same_weights(tmp_path / "ours" / "model.safetensors", tmp_path / "one" / "model.safetensors")
