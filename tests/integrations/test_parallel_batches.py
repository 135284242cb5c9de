"""Where several ranks share a batch: loaders, schedulers, metrics, generation, and refusals."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, ParallelismConfig
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.trainer_utils import seed_worker

import hf_speed
from hf_speed.engine import engine_of
from hf_speed.errors import ConfigError
from tests.integrations.toys import VOCABULARY, arguments, examples, flat, llama, trainer
from tests.support import run_ranks

PIPELINE: dict[str, Any] = {"mesh": {"pp": 2}, "zero": {"stage": 1}}
SLICES: dict[str, Any] = {"mesh": {"tp": 2}, "zero": {"stage": 1}}
BOTH: dict[str, Any] = {"mesh": {"pp": 2, "tp": 2}, "zero": {"stage": 1}}
GATHERED: dict[str, Any] = {"mesh": {"pp": 2}, "zero": {"stage": 3}}


class Numbers(IterableDataset):
    """0 to 10, without a length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


def _accelerator(config: Any, **options: Any) -> hf_speed.Accelerator:
    return hf_speed.Accelerator(
        hf_speed=config, dataloader_config=DataLoaderConfiguration(**options)
    )


def _passes(accelerator: hf_speed.Accelerator, loader: Any, count: int = 2) -> list[Any]:
    prepared = accelerator.prepare(loader)
    return [[batch.tolist() for batch in prepared] for _ in range(count)]


def _kept(accelerator: hf_speed.Accelerator, loader: Any) -> Any:
    prepared = accelerator.prepare(loader)
    return [accelerator.gather_for_metrics(batch).tolist() for batch in prepared]


def _loaders(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Ranks draw differently before: loaders must not depend on it.
    torch.manual_seed(dist.get_rank())
    seeded = _accelerator(config, use_seedable_sampler=True, data_seed=5)
    plain = _accelerator(config)
    found["num_batches"] = plain.num_batches
    shuffled = partial(DataLoader, list(range(11)), batch_size=2, shuffle=True)
    found["seedable"] = _passes(seeded, shuffled())
    found["shuffled"] = _passes(plain, shuffled())
    found["split"] = _passes(_accelerator(config, split_batches=True), shuffled())
    found["iterable"] = _passes(plain, DataLoader(Numbers(), batch_size=2))
    workers = partial(seed_worker, num_workers=1, rank=dist.get_rank())
    seeding = plain.prepare(DataLoader([1, 2], num_workers=1, worker_init_fn=workers))
    found["seeded by"] = seeding.worker_init_fn.keywords["rank"]
    found["kept"] = _kept(plain, DataLoader(list(range(11)), batch_size=2))
    found["kept iterable"] = _kept(plain, DataLoader(Numbers(), batch_size=2))
    prepared = plain.prepare(DataLoader(list(range(11)), batch_size=2))
    found["objects"] = [
        each
        for batch in prepared
        for each in plain.gather_for_metrics([str(n) for n in batch.tolist()])
    ]
    found["gathered"] = plain.gather(torch.tensor([dist.get_rank()])).tolist()
    nested = {"a": torch.tensor([True]), "b": (torch.tensor(2.0, dtype=torch.bfloat16),)}
    found["nested"] = plain.gather_for_metrics(nested)
    try:
        _accelerator(config, dispatch_batches=True).prepare(DataLoader(Numbers(), batch_size=2))
    except ConfigError as error:
        found["dispatch"] = str(error)
    return found


def _all_loaders(configs: list[Any]) -> list[Any]:
    return [_loaders(config) for config in configs]


def test_ranks_of_one_batch_get_the_same_rows_and_metrics_count_each_once() -> None:
    everyone = run_ranks(_all_loaders, 4, [PIPELINE, SLICES, BOTH])
    # rank = pp * 2 + dp, or dp * 2 + tp.
    owners = ([0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0])
    for place, indices in enumerate(owners):
        ranks = [found[place] for found in everyone]
        num_batches = max(indices) + 1
        for rank, index in enumerate(indices):
            mine, like = ranks[rank], ranks[indices.index(index)]
            assert mine["num_batches"] == num_batches
            assert mine["seeded by"] == index
            for key in ("seedable", "shuffled", "split", "iterable"):
                assert mine[key] == like[key], (place, rank, key)
            flat_kept = [row for batch in mine["kept"] for row in batch]
            assert flat_kept == list(range(11))
            assert [row for batch in mine["kept iterable"] for row in batch] == list(range(11))
            assert mine["objects"] == [str(n) for n in range(11)]
            assert mine["gathered"] == [0, 1, 2, 3]
            assert mine["nested"]["a"].tolist() == [True] * num_batches
            assert mine["nested"]["b"][0].tolist() == [2.0] * num_batches
            assert "dispatch_batches=True deals rows out to processes" in mine["dispatch"]
            first, second = mine["shuffled"]
            assert first != second
        if num_batches == 2:
            for key in ("shuffled", "iterable"):
                assert ranks[0][key] != ranks[indices.index(1)][key], (place, key)
        seen = {
            row
            for index in range(num_batches)
            for batch in ranks[indices.index(index)]["shuffled"][0]
            for row in batch
        }
        assert seen == set(range(11))


IDS = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([0, 1]), 0)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


def _generated(model: Any, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model.eval()
    told = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "pad_token_id": 0}
    return {name: model.generate(**told, **way).tolist() for name, way in WAYS.items()}


def _generates(configs: list[Any]) -> list[dict[str, Any]]:
    found = []
    for config in configs:
        accelerator = hf_speed.Accelerator(hf_speed=config)
        model = accelerator.prepare(llama(num_hidden_layers=4))
        # Each rank with another state of its own.
        found.append(_generated(model, seed=3 + dist.get_rank()))
    return found


def test_generate_gives_the_tokens_of_one_process_on_every_rank_of_a_batch() -> None:
    whole = llama(num_hidden_layers=4)
    # The state of the first rank that sees a batch.
    alone = [_generated(whole, seed=3 + rank) for rank in range(3)]
    owners = ([0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 2, 2], [0, 0, 0, 0])
    everyone = run_ranks(_generates, 4, [PIPELINE, GATHERED, SLICES, BOTH])
    for rank, found in enumerate(everyone):
        for place, firsts in enumerate(owners):
            assert found[place] == alone[firsts[rank]], (rank, place)


def _loop(config: Any, rows: int, precision: str) -> dict[str, Any]:
    torch.manual_seed(0)
    AcceleratorState._reset_state()
    accelerator = hf_speed.Accelerator(
        hf_speed=config, gradient_accumulation_steps=2, mixed_precision=precision
    )
    model = llama(num_hidden_layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=6)
    loader = DataLoader(examples(12), batch_size=rows)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses, norms, rates = [], [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
        rates.append(schedule.get_last_lr()[0])
    found = {"losses": losses, "norms": norms, "rates": rates}
    engine = engine_of(model)
    if engine is not None:
        # accelerate's autocast stays around the forward, which must be the model's own again.
        engine.detach()
        copied = LlamaForCausalLM(model.config)
        copied.load_state_dict(model.state_dict())
        rows_of_one = {name: value[None] for name, value in examples(1)[0].items()}
        with torch.no_grad():
            again = model.eval()(**rows_of_one).loss - copied.eval()(**rows_of_one).loss
        found["detached"] = float(again)
    return found


def _loops(cases: list[tuple[Any, int, str]]) -> list[dict[str, Any]]:
    return [_loop(*case) for case in cases]


def test_a_loop_with_accumulation_clipping_and_a_schedule_is_that_of_ddp() -> None:
    whole, rounded = run_ranks(_loops, 2, [(None, 1, "no"), (None, 1, "bf16")])[0]
    cases = [(PIPELINE, 1, "no"), (SLICES, 1, "no"), (PIPELINE, 1, "bf16"), (SLICES, 1, "bf16")]
    *exact, piped, sliced = run_ranks(_loops, 4, cases)[0]
    for each in exact:
        for key in ("losses", "norms"):
            torch.testing.assert_close(flat(each[key]), flat(whole[key]), rtol=2e-5, atol=1e-6)
        assert each["rates"] == whole["rates"]
    for each in (*exact, piped, sliced):
        assert abs(each["detached"]) < (1e-6 if each in exact else 2e-2)
    for each in (piped, sliced):
        # bf16 has 8 bits; norms of rounded gradients differ by a few times that.
        torch.testing.assert_close(
            flat(each["losses"]), flat(rounded["losses"]), rtol=2**-7, atol=0
        )
        torch.testing.assert_close(flat(each["norms"]), flat(rounded["norms"]), rtol=2**-5, atol=0)


def _message(act: Any) -> str:
    try:
        act()
    except ConfigError as error:
        return str(error)
    return "no error"


def _mixtral() -> MixtralForCausalLM:
    shapes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(
        MixtralConfig(**shapes, **heads, num_hidden_layers=4, output_router_logits=True)
    )


def _lora() -> Any:
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))


def _adafactor() -> None:
    model = llama(num_hidden_layers=4)
    optimizer = torch.optim.Adafactor(model.parameters())
    hf_speed.Accelerator(hf_speed=SLICES).prepare(model, optimizer)


def _with_fused_head() -> Any:
    from trl.trainer.utils import add_fused_lm_head

    model: Any = llama(num_hidden_layers=4)
    add_fused_lm_head(model)
    return model


def _told(directory: str, **arguments_of_others: Any) -> None:
    """Train with arguments that need another package, or another release."""
    made = trainer(directory, SLICES, model=llama(num_hidden_layers=4))
    for name, value in arguments_of_others.items():
        setattr(made.args, name, value)
    made.train()


def _diverging(config: Any) -> None:
    model = hf_speed.Accelerator(hf_speed=config).prepare(llama(num_hidden_layers=4))
    ids = torch.full((2, 4), 5 + dist.get_rank())
    model(input_ids=ids, labels=ids)


def _refused(directory: str) -> dict[str, str]:
    prepared = hf_speed.Accelerator(hf_speed=PIPELINE).prepare
    return {
        "rebalanced": _message(lambda: _told(directory, train_sampling_strategy="batch_rebalance")),
        "adafactor": _message(_adafactor),
        "fused head": _message(lambda: prepared(_with_fused_head())),
        "liger": _message(lambda: _told(directory, use_liger_kernel=True)),
        "router": _message(lambda: prepared(_mixtral())),
        "lora": _message(lambda: prepared(_lora())),
        "diverging": _message(lambda: _diverging(PIPELINE)),
        "world": _message(lambda: hf_speed.Accelerator(hf_speed={"mesh": {"pp": 3}})),
        "layers": _message(lambda: prepared(llama(num_hidden_layers=1))),
        "parallelism": _message(
            lambda: arguments(directory, SLICES, parallelism_config=ParallelismConfig(tp_size=2))
        ),
    }


def test_what_cannot_work_says_so_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(_refused, 2, str(tmp_path))
    assert first == second
    expected = {
        "rebalanced": "deals rows out to all 2 processes, but 2 of them share a batch",
        "adafactor": "mesh.tp=2 gives each rank slices of parameters, but Adafactor needs whole",
        "fused head": "a fused head that reads lm_head.weight by itself",
        "liger": "use_liger_kernel=True computes the loss from the whole weight",
        "router": "output_router_logits=True, which collects something of every layer",
        "lora": "carries PEFT adapters, which hf_speed can neither deal out nor divide",
        "diverging": "gave LlamaForCausalLM different inputs at its call 1",
        "world": "does not divide the world of 2 processes",
        "layers": "layers",
        "parallelism": "set mesh.pp, mesh.tp, mesh.dp_replicate",
    }
    for key, text in expected.items():
        assert text in first[key], (key, first[key])
