"""The Trainer on an engine trains as stock DDP and as one process do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_speed
from hf_speed.engine import engine_of
from tests.integrations.toys import (
    STAGES,
    VOCABULARY,
    checkpointing,
    curve,
    examples,
    flat,
    llama,
    llama_config,
    stage,
    trainer,
)
from tests.support import run_ranks

SAME_MATHS = {"rtol": 1e-5, "atol": 1e-7}


def _curves(
    directory: str, configs: list[Any], options: dict[str, Any]
) -> list[list[tuple[float, float]]]:
    found = []
    for config in configs:
        made = trainer(directory, config, **options)
        made.train()
        found.append(curve(made))
    return found


def test_every_stage_equals_stock_ddp_and_one_process(tmp_path: Path) -> None:
    ddp, *stages = run_ranks(_curves, 2, str(tmp_path), [None, *STAGES], {})[0]
    (alone,) = run_ranks(_curves, 1, str(tmp_path), [None], {"per_device_train_batch_size": 4})[0]
    torch.testing.assert_close(flat(ddp), flat(alone), **SAME_MATHS)
    for each in stages:
        torch.testing.assert_close(flat(each), flat(ddp), rtol=1e-6, atol=0)
        assert [f"{loss:.4g}" for loss, _ in each] == [f"{loss:.4g}" for loss, _ in ddp]


@pytest.mark.filterwarnings("ignore")
def test_one_process_with_a_config_equals_one_without(tmp_path: Path) -> None:
    # In this process, which no launcher started: no process group at all.
    plain, *stages = _curves(str(tmp_path), [None, *STAGES], {})
    for each in stages:
        torch.testing.assert_close(flat(each), flat(plain), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"average_tokens_across_devices": False},
        {"max_grad_norm": 0.1, "optim": "sgd"},
        checkpointing(use_reentrant=False),
        checkpointing(use_reentrant=True),
        {"gradient_accumulation_steps": 5, "num_train_epochs": 2, "max_steps": -1},
        {
            "gradient_accumulation_steps": 1,
            "accelerator_config": {
                "gradient_accumulation_kwargs": {"num_steps": 2, "sync_each_batch": True}
            },
        },
    ],
    ids="-".join,
)
def test_options_of_the_trainer_mean_what_they_mean_under_ddp(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ddp, *stages = run_ranks(_curves, 2, str(tmp_path), [None, stage(2), stage(3)], options)[0]
    for each in stages:
        torch.testing.assert_close(flat(each), flat(ddp), rtol=1e-6, atol=0)


def _evaluate_train_train(directory: str, config: Any) -> dict[str, Any]:
    made = trainer(directory, config)
    model = made.model
    before = made.evaluate()["eval_loss"]
    made.train()
    first = curve(made)
    after = made.evaluate()["eval_loss"]
    predictions = torch.tensor(made.predict(examples(5, seed=3)).predictions)
    made.train()
    return {
        "evaluations": [before, after, made.evaluate()["eval_loss"]],
        "curves": [first, curve(made)],
        "predictions": predictions,
        "same_model": made.model is model
        and made.accelerator.unwrap_model(made.model_wrapped) is model,
    }


def _all_evaluate_train_train(directory: str, configs: list[Any]) -> list[dict[str, Any]]:
    return [_evaluate_train_train(directory, config) for config in configs]


def test_evaluate_before_train_and_train_twice(tmp_path: Path) -> None:
    (plain,) = run_ranks(_all_evaluate_train_train, 1, str(tmp_path), [None])[0]
    alone = run_ranks(_all_evaluate_train_train, 1, str(tmp_path), [stage(2), stage(3)])[0]
    for each in alone:
        assert each["same_model"]
        torch.testing.assert_close(flat(each["curves"]), flat(plain["curves"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            flat(each["evaluations"]), flat(plain["evaluations"]), rtol=1e-6, atol=0
        )
    two = run_ranks(_all_evaluate_train_train, 2, str(tmp_path), [stage(0), stage(1), stage(3)])[0]
    for each in two:
        assert each["same_model"]
        torch.testing.assert_close(flat(each["curves"]), flat(two[0]["curves"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            flat(each["evaluations"]), flat(two[0]["evaluations"]), **SAME_MATHS
        )
        torch.testing.assert_close(each["predictions"], two[0]["predictions"], rtol=1e-4, atol=1e-5)
    # What DDP cannot tell (stock accelerate trains unwrapped after an evaluation): nothing was
    # learned twice or lost.
    assert two[0]["curves"][1][0][0] < two[0]["curves"][0][0][0]


def _logged(directory: str, config: Any, options: dict[str, Any]) -> list[dict[str, float]]:
    made = trainer(directory, config, **options)
    made.train()
    return [line for line in made.state.log_history if "loss" in line]


def test_log_lines_carry_tokens_bytes_memory_and_scale(tmp_path: Path) -> None:
    lines = run_ranks(_logged, 2, str(tmp_path), stage(1), {"logging_steps": 2})[0]
    elements = sum(parameter.numel() for parameter in llama().parameters())
    assert len(lines) == 2
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert line["peak_host_bytes"] > 1e6
        assert line["grad_norm"] > 0
        assert "loss_scale" not in line
        # Stage 1 at 2 ranks: half the gradients out and half the parameters out, 4 bytes each, and
        # padding and scalars.
        assert line["bytes_sent_per_step"] == pytest.approx(4 * elements, rel=0.05)
    silent = run_ranks(_logged, 2, str(tmp_path), stage(1, debug={"stats": False}), {})[0]
    assert "tokens_per_second" not in silent[0]


def _schedule(
    directory: str, config: Any
) -> tuple[list[float], list[tuple[float, float]], dict[str, torch.dtype]]:
    # Slow: the first steps of Adam make whole steps of rounding errors.
    made = trainer(directory, config, bf16=True, learning_rate=1e-3)
    made.train()
    dtypes = {name: parameter.dtype for name, parameter in made.model.named_parameters()}
    return (
        [line["learning_rate"] for line in made.state.log_history if "loss" in line],
        curve(made),
        dtypes,
    )


def _schedules(directory: str, configs: list[Any]) -> list[Any]:
    return [_schedule(directory, config) for config in configs]


def test_bf16_follows_stock_ddp_closely_and_all_stages_agree(tmp_path: Path) -> None:
    stock, *stages = run_ranks(_schedules, 2, str(tmp_path), [None, *STAGES])[0]
    for rates, losses, dtypes in stages:
        assert rates == stock[0]
        assert set(dtypes.values()) == {torch.bfloat16}
        # bf16 has 8 bits, hence 2**-8 for a loss, a mean over tokens, and four times that for the
        # norm of rounded gradients. Stock autocast keeps gradients and the weights of norms in
        # fp32; stages 2 and 3 round each micro-step's gradient, 0 and 1 the sum of both.
        for other in (stages[0][1], stock[1]):
            mine, theirs = flat(losses), flat(other)
            torch.testing.assert_close(mine[:, 0], theirs[:, 0], rtol=2**-8, atol=0)
            torch.testing.assert_close(mine[:, 1], theirs[:, 1], rtol=2**-6, atol=0)


def _fp16(directory: str, config: Any) -> dict[str, Any]:
    made = trainer(directory, config, fp16=True, max_steps=6)
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    return {key: [line[key] for line in lines] for key in ("loss", "learning_rate", "loss_scale")}


def test_fp16_skips_a_step_that_overflows_on_every_rank_and_holds_the_schedule(
    tmp_path: Path,
) -> None:
    scale = {"initial": 2.0**32, "hysteresis": 1}
    config = stage(2, precision={"loss_scale": scale})
    first, second = run_ranks(_fp16, 2, str(tmp_path), config)
    assert first["loss_scale"] == second["loss_scale"]
    assert first["loss_scale"][0] == 2.0**31
    # A skipped step leaves the learning rate where it was.
    assert first["learning_rate"][0] == first["learning_rate"][1]


def _fresh() -> torch.nn.Module:
    return llama()


def _model_init(directory: str, config: Any) -> list[list[tuple[float, float]]]:
    made = hf_speed.Trainer(
        model_init=_fresh, args=trainer(directory, config).args, train_dataset=examples()
    )
    made.train()
    first = curve(made)
    made.train()
    return [first, curve(made)]


def _model_inits(directory: str, configs: list[Any]) -> list[Any]:
    return [_model_init(directory, config) for config in configs]


def test_model_init_makes_a_new_engine_for_every_train(tmp_path: Path) -> None:
    stock, *stages = run_ranks(_model_inits, 2, str(tmp_path), [None, stage(1), stage(3)])[0]
    for each in stages:
        torch.testing.assert_close(flat(each), flat(stock), rtol=1e-6, atol=0)


def _own_loop_object(directory: str) -> tuple[bool, bool, bool, int]:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    made = hf_speed.Trainer(
        model=model,
        args=trainer(directory, stage(3)).args,
        train_dataset=examples(),
        optimizers=(optimizer, schedule),
    )
    made.train()
    engine = engine_of(model)
    kept = (
        engine is not None
        and engine.optimizer is optimizer
        and made.optimizer.optimizer is optimizer
    )
    return made.model is model, kept, made.is_deepspeed_enabled, dist.get_world_size()


def test_model_and_optimizer_stay_the_users_objects(tmp_path: Path) -> None:
    assert run_ranks(_own_loop_object, 2, str(tmp_path))[0] == (True, True, False, 2)


def _router(directory: str, config: Any, accumulation: int) -> list[tuple[float, float]]:
    sizes = {
        key: getattr(llama_config(), key)
        for key in ("vocab_size", "hidden_size", "num_hidden_layers")
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            # So large that the auxiliary loss is a third of the whole.
            router_aux_loss_coef=1.0,
        )
    )
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0,
    }
    made = trainer(directory, config, model=model, **options)
    made.train()
    return curve(made)


def test_a_routers_auxiliary_loss_counts_once_whatever_the_ranks_and_micro_steps(
    tmp_path: Path,
) -> None:
    once = flat(run_ranks(_router, 1, str(tmp_path), stage(1), 1)[0])
    plain = flat(run_ranks(_router, 1, str(tmp_path), None, 1)[0])
    torch.testing.assert_close(once, plain, rtol=1e-6, atol=0)
    # The same four micro-batches, split differently: stock transformers makes 4 times as much of
    # the auxiliary loss.
    alone = flat(run_ranks(_router, 1, str(tmp_path), stage(1), 4)[0])
    for number in (1, 3):
        two = flat(run_ranks(_router, 2, str(tmp_path), stage(number), 2)[0])
        torch.testing.assert_close(two, alone, rtol=2e-6, atol=0)
    assert float((alone[0, 0] - once[0, 0]).abs()) < 0.1


def _generating(directory: str, config: Any) -> tuple[Any, Any, float]:
    torch.manual_seed(0)
    shapes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shapes)
    )
    generator = torch.Generator().manual_seed(2)
    rows = [
        {
            "input_ids": torch.randint(3, VOCABULARY, (6,), generator=generator),
            "labels": torch.randint(3, VOCABULARY, (5,), generator=generator),
        }
        for _ in range(10)
    ]
    kind = hf_speed.integrate_args(transformers.Seq2SeqTrainingArguments)
    args = kind(
        directory,
        hf_speed=config,
        predict_with_generate=True,
        generation_max_length=9,
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    made = hf_speed.integrate_trainer(transformers.Seq2SeqTrainer)(
        model=model, args=args, train_dataset=rows, eval_dataset=rows
    )
    made.train()
    seen = made.predict(rows)
    return curve(made), seen.predictions.tolist(), seen.metrics["test_loss"]


def _generatings(directory: str, configs: list[Any]) -> list[Any]:
    return [_generating(directory, config) for config in configs]


def test_predict_with_generate_equals_ddp(tmp_path: Path) -> None:
    ddp, *stages = run_ranks(_generatings, 2, str(tmp_path), [None, stage(1), stage(3)])[0]
    for losses, predictions, loss in stages:
        torch.testing.assert_close(flat(losses), flat(ddp[0]), rtol=1e-6, atol=0)
        assert predictions == ddp[1]
        assert loss == pytest.approx(ddp[2], rel=1e-6)
