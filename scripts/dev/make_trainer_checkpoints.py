"""Make the checkpoints of transformers' own Trainer that the importers are tested with.

    python scripts/dev/make_trainer_checkpoints.py tests/checkpoint/imports/trainers [NAME ...]

Two processes on the CPU (one for `plain`) train a Llama of 2 thousand parameters with
transformers' Trainer on DeepSpeed, FSDP 2 or nothing, save checkpoint-3, and go on to step 6.
DeepSpeed is in the extra `bench`. Beside each checkpoint, `expected.json` has the run's
arguments and data, and the losses that the Trainer itself logged.

What is in the checkpoint and is code or a pickle of the arguments is not kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BEFORE, AFTER, BATCH, TOKENS = 3, 3, 4, 8
CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": BEFORE + AFTER,
    "save_steps": BEFORE,
    "save_total_limit": None,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "max_grad_norm": 1.0,
    "seed": 11,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Of the run, whatever it runs on."""


def build_model() -> Any:
    """The same weights everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def rows() -> Any:
    """More than a run reads, so that its place in a shuffled epoch counts."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, CONFIG["vocab_size"], (40, TOKENS), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_run(out: Path, *, num_ranks: int, **options: Any) -> None:
    """Train, and keep what the Trainer saved in the middle."""
    from transformers import Trainer, TrainingArguments

    work = out.with_name(f"{out.name}.run")
    arguments = TrainingArguments(
        str(work), per_device_train_batch_size=BATCH // num_ranks, **ARGUMENTS, **options
    )
    trainer = Trainer(model=build_model(), args=arguments, train_dataset=rows())
    trainer.train()
    if int(os.environ["RANK"]) > 0:
        return
    shutil.copytree(
        work / f"checkpoint-{BEFORE}", out, ignore=shutil.ignore_patterns("*.py", "*args.bin")
    )
    shutil.rmtree(work)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    body = {
        "arguments": ARGUMENTS,
        "rows": [row["input_ids"].tolist() for row in rows()],
        "losses": {line["step"]: line["loss"] for line in lines},
        "rates": {line["step"]: line["learning_rate"] for line in lines},
        "grad_norms": {line["step"]: float(line["grad_norm"]) for line in lines},
        "versions": _versions(),
    }
    lines_of = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in body.items())
    (out / "expected.json").write_text("{" + ",\n ".join(lines_of) + "}\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """As users write one for the Trainer, with thresholds for a small model."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 16,
            "reduce_bucket_size": 4096,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "steps_per_print": 10**9,
    }


FSDP: dict[str, Any] = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}

RUNS: dict[str, tuple[int, Callable[[Path], None]]] = {
    "zero2": (
        2,
        functools.partial(trainer_run, num_ranks=2, deepspeed=deepspeed_config(2)),
    ),
    "zero3": (
        2,
        functools.partial(trainer_run, num_ranks=2, deepspeed=deepspeed_config(3)),
    ),
    "fsdp2": (2, functools.partial(trainer_run, num_ranks=2, **FSDP)),
    "plain": (1, functools.partial(trainer_run, num_ranks=1, use_cpu=True)),
}


def _admit_the_cpu() -> None:
    """Let accelerate count ranks of gloo: it knows DeepSpeed and FSDP on accelerators only.

    What it says of the hardware is changed, and nothing of what shards, trains and saves.
    """
    from accelerate.state import DistributedType, PartialState

    def backend(*_args: Any, **_kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = backend
    PartialState.set_device = device


def _rank(rank: int, name: str, out: str, port: int) -> None:
    num_ranks, run = RUNS[name]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    if num_ranks > 1:
        _admit_the_cpu()
    run(Path(out))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Make the named checkpoints, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []])
    arguments = parser.parse_args()
    for number, name in enumerate(arguments.names or RUNS):
        shutil.rmtree(arguments.out / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory) / name
            torch.multiprocessing.spawn(
                _rank, args=(name, str(made), 29710 + number), nprocs=RUNS[name][0]
            )
            shutil.copytree(made, arguments.out / name)
        size = sum(p.stat().st_size for p in (arguments.out / name).rglob("*") if p.is_file())
        print(f"{name}: {size:,} bytes")


if __name__ == "__main__":
    main()
