"""Plain loops on hf_speed's Accelerator train as they do on accelerate's."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

import hf_speed
from hf_speed.engine import engine_of
from hf_speed.errors import ConfigError
from tests.integrations.toys import STAGES, examples, flat, llama, stage
from tests.support import run_ranks


def _fresh_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _loop(
    config: Any, *, accumulation: int = 1, clip: str = "norm", precision: str = "no"
) -> dict[str, Any]:
    """Two epochs over 20 sequences: 3 to a rank and step, so the last batch is uneven."""
    _fresh_state()
    kwargs = {} if config is None else {"hf_speed": config}
    kind = accelerate.Accelerator if config is None else hf_speed.Accelerator
    accelerator = kind(
        cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision, **kwargs
    )
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(examples(20), batch_size=3)
    # The optimizer before its model: order must not matter.
    optimizer, model, loader, schedule = accelerator.prepare(optimizer, model, loader, schedule)
    losses, norms = [], []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip == "norm":
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                elif accelerator.sync_gradients:
                    accelerator.clip_grad_value_(model.parameters(), 1e-3)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.gather(loss.detach()).mean()))
    model.eval()
    with torch.no_grad():
        seen = [
            accelerator.gather_for_metrics(model(**batch).logits.argmax(-1)) for batch in loader
        ]
    state = accelerator.get_state_dict(model)
    return {
        "losses": losses,
        "norms": norms,
        "rate": schedule.get_last_lr(),
        "predictions": torch.cat(seen),
        "state": {name: value.float().clone() for name, value in state.items()},
    }


def _loops(cases: list[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [_loop(config, **options) for config, options in cases]


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulation": 3}, {"clip": "value"}],
    ids=["plain", "accumulate", "clip-value"],
)
def test_a_loop_equals_the_same_loop_on_ddp(options: dict[str, Any]) -> None:
    ranks = run_ranks(_loops, 2, [(config, options) for config in (None, *STAGES)])
    ddp, *stages = ranks[0]
    for index, each in enumerate(stages):
        for key in ("losses", "norms", "rate"):
            torch.testing.assert_close(flat(each[key]), flat(ddp[key]), rtol=2e-6, atol=0)
        assert each["predictions"].shape == (20, 12)
        assert (each["predictions"] == ddp["predictions"]).float().mean() > 0.99
        assert each["state"].keys() == ddp["state"].keys()
        for name, value in each["state"].items():
            torch.testing.assert_close(value, ddp["state"][name], rtol=1e-4, atol=1e-5)
        # Rank 1: the whole state up to stage 2, nothing at stage 3.
        assert bool(ranks[1][1 + index]["state"]) == (index < 3)


def test_bf16_loop_follows_ddp() -> None:
    cases = [(config, {"precision": "bf16"}) for config in (None, stage(0), stage(3))]
    ddp, *stages = run_ranks(_loops, 2, cases)[0]
    for each in stages:
        # bf16 has 8 bits; stock autocast keeps gradients in fp32.
        torch.testing.assert_close(flat(each["losses"]), flat(ddp["losses"]), rtol=2**-7, atol=0)
        assert {value.dtype for value in each["state"].values()} == {torch.float32}


def test_bf16_over_parameters_of_their_own_dtype_is_accelerates_bf16() -> None:
    own = {"working_dtype": "own"}
    configs = (None, *(stage(number, precision=own) for number in (0, 2, 3)))
    ranks = run_ranks(_loops, 2, [(config, {"precision": "bf16"}) for config in configs])
    ddp, *stages = ranks[0]
    for each in stages:
        for key in ("losses", "norms"):
            torch.testing.assert_close(flat(each[key]), flat(ddp[key]), rtol=2e-6, atol=0)


def _no_sync(config: Any) -> dict[str, Any]:
    _fresh_state()
    accelerator = (
        hf_speed.Accelerator(cpu=True, hf_speed=config)
        if config
        else accelerate.Accelerator(cpu=True)
    )
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = examples(8)
    losses = []
    for step in range(3):
        mine = [rows[(step + 2 * micro + dist.get_rank()) % 8] for micro in range(3)]
        for micro, row in enumerate(mine):
            batch = {key: value[None] for key, value in row.items()}
            context = accelerator.no_sync(model) if micro < 2 else contextlib.nullcontext()
            with context:
                loss = model(**batch).loss / 3
                loss.backward()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses}


def _no_syncs(configs: list[Any]) -> list[dict[str, Any]]:
    return [_no_sync(config) for config in configs]


def test_no_sync_sums_on_the_rank_until_the_next_backward() -> None:
    ddp, *stages = run_ranks(_no_syncs, 2, [None, *STAGES])[0]
    for each in stages:
        torch.testing.assert_close(flat(each["losses"]), flat(ddp["losses"]), rtol=1e-6, atol=0)


def _set_up(config: Any, seed: int) -> tuple[Any, Any, Any, Any, Any]:
    _fresh_state()
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=config)
    model = llama(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    # Not shuffled: accelerate itself does not save where a plain RandomSampler stands.
    loader = DataLoader(examples(16), batch_size=4 // dist.get_world_size())
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def _epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any, schedule: Any) -> list[float]:
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
    return losses


def _save(directory: str, number: int) -> list[float]:
    accelerator, *rest = _set_up(stage(number), 0)
    _epoch(accelerator, *rest)
    accelerator.save_state(directory)
    return _epoch(accelerator, *rest)


def _load(directory: str, number: int) -> list[float]:
    accelerator, *rest = _set_up(stage(number), 8)
    accelerator.load_state(directory)
    return _epoch(accelerator, *rest)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_load_state_continues_what_save_state_saved(tmp_path: Path, number: int) -> None:
    whole = run_ranks(_save, 2, str(tmp_path), number)[0]
    assert run_ranks(_load, 2, str(tmp_path), number)[0] == whole
    assert (tmp_path / "config.json").is_file()
    other = run_ranks(_load, 2, str(tmp_path), 3 - number)[0]
    torch.testing.assert_close(flat(other), flat(whole), rtol=1e-6, atol=0)


def _two_at_once(number: int, seed: int) -> tuple[Any, list[Any], list[Any], Any]:
    """A teacher and a student, each with its optimizer, and a frozen third."""
    _fresh_state()
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=stage(number))
    models = [llama(seed), llama(seed + 1, num_hidden_layers=1), llama(seed + 2)]
    models[2].requires_grad_(requires_grad=False)
    optimizers = [
        torch.optim.AdamW(models[0].parameters(), lr=1e-2),
        torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9),
    ]
    loader = DataLoader(examples(16), batch_size=4 // dist.get_world_size())
    *prepared, loader = accelerator.prepare(*models, *optimizers, loader)
    return accelerator, prepared[:3], prepared[3:], loader


def _teach(accelerator: Any, models: list[Any], optimizers: list[Any], loader: Any) -> list[float]:
    losses = []
    for batch in loader:
        outputs = [model(**batch) for model in models]
        gap = outputs[1].logits - outputs[0].logits.detach() - outputs[2].logits
        loss = outputs[0].loss + gap.square().mean()
        accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
    return losses


def _save_two(directory: str, number: int) -> list[float]:
    parts = _two_at_once(number, 0)
    _teach(*parts)
    parts[0].save_state(directory)
    return _teach(*parts)


def _load_two(directory: str, number: int) -> list[float]:
    parts = _two_at_once(number, 8)
    parts[0].load_state(directory)
    return _teach(*parts)


def test_several_models_share_a_state_and_continue_from_it(tmp_path: Path) -> None:
    whole = run_ranks(_save_two, 2, str(tmp_path), 3)[0]
    assert run_ranks(_load_two, 2, str(tmp_path), 3)[0] == whole
    other = run_ranks(_load_two, 2, str(tmp_path), 1)[0]
    torch.testing.assert_close(flat(other), flat(whole), rtol=2e-6, atol=0)
    for index in range(3):
        assert (tmp_path / f"model_{index}" / "model.safetensors").is_file()


def _ours(**kwargs: Any) -> hf_speed.Accelerator:
    return hf_speed.Accelerator(cpu=True, hf_speed=stage(1), **kwargs)


def _two_models() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    _ours().prepare(first, second, both)


def _some_parameters() -> None:
    accelerator = _ours()
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    accelerator.clip_grad_norm_([model.weight], 1.0)


def _wrapped_later() -> None:
    accelerator = _ours()
    inner = accelerator.prepare(torch.nn.Linear(4, 4))
    accelerator.prepare(torch.nn.Sequential(inner, torch.nn.Linear(4, 4)))


def _hooked() -> None:
    hook = accelerate.utils.DDPCommunicationHookType.FP16
    _ours(kwargs_handlers=[accelerate.utils.DistributedDataParallelKwargs(comm_hook=hook)])


def _uneven() -> None:
    accelerator = _ours()
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    with accelerator.join_uneven_inputs([model], even_batches=False):
        pass


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (_two_models, "prepare one nn.Module that holds them all"),
    (_some_parameters, "Pass model.parameters()"),
    (_wrapped_later, "prepare the outermost model once"),
    (lambda: _ours(kwargs_handlers=[accelerate.utils.GradScalerKwargs()]), "precision.loss_scale"),
    (lambda: _ours(dynamo_backend="eager"), "torch.compile"),
    (_hooked, "precision.reduce_dtype"),
    (
        lambda: _ours(fsdp_plugin=accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)),
        "Remove fsdp_plugin",
    ),
    (_uneven, "Leave even_batches=True"),
]


def _refusals() -> None:
    for action, message in REFUSED:
        _fresh_state()
        with pytest.raises(ConfigError, match=re.escape(message)):
            action()


def test_what_cannot_take_effect_is_an_error() -> None:
    run_ranks(_refusals, 2)


def _joined() -> tuple[list[int], bool]:
    _fresh_state()
    uneven = accelerate.DataLoaderConfiguration(even_batches=False)
    accelerator = hf_speed.Accelerator(cpu=True, hf_speed=stage(3), dataloader_config=uneven)
    model, loader = accelerator.prepare(llama(), DataLoader(examples(5), batch_size=2))
    sizes = []
    with accelerator.join_uneven_inputs([model], even_batches=True):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            sizes.append(len(batch["labels"]))
    return sizes, loader.batch_sampler.even_batches


def test_joining_evens_the_batches_out_where_asked() -> None:
    assert run_ranks(_joined, 2) == [([2, 2], False), ([2, 2], False)]


def _without_config() -> dict[str, Any]:
    _fresh_state()
    accelerator = hf_speed.Accelerator(cpu=True)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    return {
        "engine": engine_of(model) is None,
        "model": type(prepared).__name__,
        "optimizer": type(wrapped).__name__,
    }


def test_without_a_config_it_is_accelerates_own() -> None:
    expected = {
        "engine": True,
        "model": "DistributedDataParallel",
        "optimizer": "AcceleratedOptimizer",
    }
    assert run_ranks(_without_config, 2)[0] == expected


def _environment() -> dict[str, Any]:
    accelerator = hf_speed.Accelerator(cpu=True)
    model = accelerator.prepare(llama())
    engine = engine_of(model)
    return {"stage": None if engine is None else engine.config.stage}


def test_the_launcher_carries_the_config_in_the_environment() -> None:
    found = run_ranks(_environment, 2, env={"HF_SPEED_CONFIG": '{"zero": {"stage": 2}}'})[0]
    assert found == {"stage": 2}
