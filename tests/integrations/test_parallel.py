"""The Trainer in a pipeline and with divided layers does what it does without them."""

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import hf_speed
from hf_speed.errors import HfSpeedError
from hf_speed.integrations.transformers import metrics
from tests.integrations.toys import (
    VOCABULARY,
    arguments,
    checkpointing,
    curve,
    examples,
    flat,
    llama,
    trainer,
)
from tests.support import run_ranks

PIPELINE = {"mesh": {"pp": 2}, "zero": {"stage": 2}}
SLICES = {"mesh": {"tp": 2}, "zero": {"stage": 3}}
BOTH = {"mesh": {"pp": 2, "tp": 2}, "zero": {"stage": 1}}
SAME_MATHS = {"rtol": 1e-5, "atol": 1e-7}
WHOLE = {"per_device_train_batch_size": 4}
"""Of one process, or of ranks that all share a batch: what two take together."""


def _metrics(prediction: Any) -> dict[str, float]:
    chosen = prediction.predictions[:, :-1].argmax(-1)
    wanted = prediction.label_ids[:, 1:]
    counts = wanted != -100
    return {"accuracy": float((chosen == wanted)[counts].mean()), "rows": float(len(chosen))}


class _Seconds:
    """A clock that goes on by a second each time it is read."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self._count))


def _trained(directory: str, config: Any, options: dict[str, Any]) -> dict[str, Any]:
    metrics.time = _Seconds()
    made = hf_speed.Trainer(
        model=llama(num_hidden_layers=4),
        args=arguments(
            directory,
            config,
            include_num_input_tokens_seen="all",
            # One row to a batch, so that means over batches are means over rows.
            per_device_eval_batch_size=1,
            **options,
        ),
        train_dataset=examples(),
        eval_dataset=examples(7, seed=2),
        compute_metrics=_metrics,
    )
    made.remove_callback(transformers.PrinterCallback)
    # Stock DDP would train unwrapped after an evaluation; an engine takes over at either.
    stock_ddp = config is None and dist.get_world_size() > 1
    before = [] if stock_ddp else [made.evaluate()["eval_loss"]]
    result = made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    unlabelled = [{"input_ids": row["input_ids"]} for row in examples(5, seed=3)]
    after = made.evaluate()
    return {
        "curve": curve(made),
        "rates": [line["learning_rate"] for line in lines],
        "before": before,
        "losses": [after["eval_loss"], result.training_loss],
        "metrics": [after["eval_accuracy"], after["eval_rows"]],
        "predictions": torch.tensor(made.predict(unlabelled).predictions),
        "tokens": made.state.num_input_tokens_seen,
        "steps": [made.state.max_steps, made.state.epoch],
        "speeds": [line.get("tokens_per_second") for line in lines],
        "batch": made.get_total_train_batch_size(made.args),
    }


def _all_trained(directory: str, cases: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    return [_trained(directory, config, options) for config, options in cases]


def _assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(flat(mine["curve"]), flat(theirs["curve"]), **SAME_MATHS)
    torch.testing.assert_close(flat(mine["losses"]), flat(theirs["losses"]), **SAME_MATHS)
    torch.testing.assert_close(mine["predictions"], theirs["predictions"], rtol=1e-4, atol=1e-5)
    for key in ("rates", "metrics", "tokens", "steps", "batch"):
        assert mine[key] == theirs[key], key


def test_four_ranks_train_evaluate_and_predict_as_stock_ranks_do(tmp_path: Path) -> None:
    (two,) = run_ranks(_all_trained, 2, str(tmp_path), [(None, {})])[0]
    (one,) = run_ranks(_all_trained, 1, str(tmp_path), [(None, WHOLE)])[0]
    cases = [(PIPELINE, {}), (SLICES, {}), (BOTH, WHOLE)]
    everyone = run_ranks(_all_trained, 4, str(tmp_path), cases)
    for pipeline, slices, both in everyone:
        _assert_same(pipeline, two)
        _assert_same(slices, two)
        _assert_same(both, one)
        for mine, theirs in ((slices, pipeline), (both, one)):
            torch.testing.assert_close(flat(mine["before"]), flat(theirs["before"]), **SAME_MATHS)
        for each in (pipeline, slices, both):
            # 2 micro-steps of 4 rows of 12 tokens, however many ranks have seen them.
            assert each["speeds"] == [96.0] * 4
    assert one["metrics"][1] == 7


def _classified(directory: str, config: Any) -> dict[str, Any]:
    """A model whose loss is a mean over rows, which the Trainer divides by micro-steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_labels=3, **sizes, **drops)
    )
    rows = [{**row, "labels": torch.tensor(index % 3)} for index, row in enumerate(examples(10))]
    # 10 rows: the last step of an epoch has one micro-batch, and that is a smaller one.
    options = WHOLE | {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3}
    made = hf_speed.Trainer(
        model=model, args=arguments(directory, config, **options), train_dataset=rows
    )
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    predicted = made.predict(rows[:5])
    return {
        "curve": curve(made),
        "predictions": predicted.predictions.tolist(),
        "loss": predicted.metrics["test_loss"],
    }


def _headless(directory: str, config: Any) -> list[list[list[float]]]:
    """Predictions of a model without a head: hidden states, and the pooled ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    model = BertModel(BertConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes))
    rows = [{"input_ids": row["input_ids"]} for row in examples(5)]
    made = hf_speed.Trainer(model=model, args=arguments(directory, config))
    return [each.tolist() for each in made.predict(rows).predictions]


OPTIONS: list[dict[str, Any]] = [
    {"average_tokens_across_devices": False},
    {"max_grad_norm": 0.1, "optim": "sgd"},
    checkpointing(use_reentrant=False),
    checkpointing(use_reentrant=True),
    {"gradient_accumulation_steps": 5, "num_train_epochs": 2, "max_steps": -1},
]


class _LossOfLogits(hf_speed.Trainer):
    """A user's Trainer, whose loss is made of the outputs."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())


def _sum_of_losses(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total / num_items_in_batch


def _losses_of_ones_own(directory: str, config: Any) -> list[Any]:
    """Curves of three losses that are computed outside of the model, or why there are none."""
    found: list[Any] = []
    for options, own, kind in (
        ({"label_smoothing_factor": 0.1}, {}, hf_speed.Trainer),
        ({}, {"compute_loss_func": _sum_of_losses}, hf_speed.Trainer),
        ({}, {}, _LossOfLogits),
    ):
        made = kind(
            model=llama(num_hidden_layers=4),
            args=arguments(directory, config, **WHOLE, **options, max_steps=2),
            train_dataset=examples(),
            **own,
        )
        made.remove_callback(transformers.PrinterCallback)
        try:
            made.train()
        except HfSpeedError as error:
            found.append(str(error))
        else:
            found.append(curve(made))
    return found


def _head_alone(directory: str, config: Any) -> list[tuple[float, float]]:
    """Of a model whose head alone is trained: other stages have nothing to step."""
    model = llama(num_hidden_layers=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("lm_head")
    made = trainer(directory, config, model=model, **WHOLE, max_steps=2)
    made.train()
    return curve(made)


def _enabled(directory: str, config: Any) -> list[tuple[float, float]]:
    """Of stock classes, taught the field."""
    hf_speed.enable()
    try:
        told = arguments(directory, None, **WHOLE, max_steps=2).to_dict() | {"hf_speed": config}
        known = transformers.TrainingArguments.__dataclass_fields__
        args = transformers.TrainingArguments(**{k: v for k, v in told.items() if k in known})
        model = llama(num_hidden_layers=4)
        made = transformers.Trainer(model=model, args=args, train_dataset=examples())
        made.remove_callback(transformers.PrinterCallback)
        made.train()
    finally:
        hf_speed.disable()
    return curve(made)


def _optioned(directory: str, config: Any) -> dict[str, Any]:
    found = []
    for options in OPTIONS:
        made = trainer(
            directory,
            config,
            model=llama(num_hidden_layers=4),
            **(WHOLE | {"max_steps": 2} | options),
        )
        made.train()
        found.append(curve(made))
    return {
        "curves": found,
        "classified": _classified(directory, config),
        "enabled": _enabled(directory, config),
        "head": _head_alone(directory, config),
        "headless": _headless(directory, config),
        "own": _losses_of_ones_own(directory, config),
    }


def test_options_of_the_trainer_mean_what_they_mean_in_one_process(tmp_path: Path) -> None:
    one = run_ranks(_optioned, 1, str(tmp_path), None)[0]
    pipeline = run_ranks(_optioned, 2, str(tmp_path), {"mesh": {"pp": 2}})[0]
    slices = run_ranks(_optioned, 2, str(tmp_path), {"mesh": {"tp": 2}})[0]
    for two in (pipeline, slices):
        for mine, theirs in zip(two["curves"], one["curves"], strict=True):
            torch.testing.assert_close(flat(mine), flat(theirs), **SAME_MATHS)
        for key in ("enabled", "head"):
            torch.testing.assert_close(flat(two[key]), flat(one[key]), **SAME_MATHS)
        for mine, theirs in zip(two["headless"], one["headless"], strict=True):
            torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-4, atol=1e-5)
        for key, value in one["classified"].items():
            mine = two["classified"][key]
            torch.testing.assert_close(flat(mine), flat(value), rtol=2e-5, atol=1e-6)
    for mine, theirs in zip(slices["own"][:2], one["own"][:2], strict=True):
        torch.testing.assert_close(flat(mine), flat(theirs), **SAME_MATHS)
    assert "reads the logits of a training step" in slices["own"][2]
    smoothed, function, own = pipeline["own"]
    assert "label_smoothing_factor=0.1 computes the loss from logits" in smoothed
    assert "compute_loss_func computes the loss from logits" in function
    assert "_LossOfLogits.compute_loss failed with TypeError" in own
