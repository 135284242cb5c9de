"""Train a small Llama from scratch: an ordinary Trainer script, whose hf_speed part is its import.

With --plain it imports transformers' own Trainer instead: the baseline of the table of bytes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bytes_alive import BytesAlive
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

if "--plain" in sys.argv:
    from transformers import Trainer, TrainingArguments
else:
    from hf_speed import Trainer, TrainingArguments


@dataclass
class ScriptArguments:
    """What TrainingArguments does not cover."""

    data: Path = field(metadata={"help": "Folder that data.py wrote"})
    bytes_json: Path | None = field(default=None, metadata={"help": "Where to write bytes alive"})
    plain: bool = field(default=False, metadata={"help": "Use transformers' Trainer"})
    hidden: int = 192
    layers: int = 6
    eval_blocks: int = 96


def main() -> None:
    """Train, evaluate along the way, save."""
    script, args = HfArgumentParser(
        (ScriptArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(script.data / "tokenizer")
    train_set = Dataset.load_from_disk(script.data / "dataset" / "train")
    test_set = Dataset.load_from_disk(script.data / "dataset" / "test")
    eval_set = Dataset.from_dict(test_set[: script.eval_blocks])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=script.hidden,
        intermediate_size=script.hidden * 11 // 4,
        num_hidden_layers=script.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    callbacks: list[TrainerCallback] = []
    if script.bytes_json:
        callbacks.append(BytesAlive(script.bytes_json))
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        state = {"world_size": args.world_size, "history": trainer.state.log_history}
        Path(args.output_dir, "history.json").write_text(json.dumps(state, indent=1))


if __name__ == "__main__":
    main()
