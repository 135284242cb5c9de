"""Turn the machine's Python standard library into a tokenizer and a dataset for language modelling.

Text: every .py file of the standard library, without its tests. The files are split before they
are tokenised, so that no block of the evaluation set has neighbours in the training set.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages",
    "encodings", "__pycache__",
}  # fmt: skip
END = "<|end|>"


def read_files() -> list[str]:
    """Read the library's source files, in a fixed shuffled order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if SKIPPED.isdisjoint(p.relative_to(root).parts)]
    random.Random(0).shuffle(paths := sorted(paths))
    texts = [p.read_text("utf-8", errors="ignore") for p in tqdm(paths, desc="Reading")]
    size = sum(map(len, texts)) / 1e6
    print(f"{len(texts)} files of the standard library in {root}, {size:.1f} million characters")
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `vocab` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bar = tqdm(texts, desc="Training the tokenizer")
    tokenizer.train_from_iterator(bar, trainer, length=len(texts))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, *, block: int, part: str
) -> Dataset:
    """Tokenise the files of one part, and group them into blocks of `block` tokens."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer([text + END for text in batch["text"]])["input_ids"]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        whole = len(ids) // block * block
        blocks = [ids[i : i + block] for i in range(0, whole, block)]
        return {"input_ids": blocks, "labels": blocks}

    encoded = Dataset.from_dict({"text": texts}).map(
        encode, batched=True, batch_size=50, remove_columns="text", desc=f"Tokenising ({part})"
    )
    # Its map() is typed as if a Dataset could give a DatasetDict.
    blocks: Any = encoded.map(
        group, batched=True, batch_size=100, desc=f"Grouping into blocks ({part})"
    )
    return blocks


def main() -> None:
    """Write the tokenizer and the dataset into --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--block", type=int, default=128)
    args = parser.parse_args()
    texts = read_files()
    tokenizer = train_tokenizer(texts, args.vocab)
    tokenizer.save_pretrained(args.out / "tokenizer")
    held_out = max(1, len(texts) // 20)
    print(f"tokenizer: {len(tokenizer)} tokens")
    for part, files in (("test", texts[:held_out]), ("train", texts[held_out:])):
        dataset = tokenise(files, tokenizer, block=args.block, part=part)
        dataset.save_to_disk(args.out / "dataset" / part)
        print(f"{part}: {len(files)} files, {len(dataset) * args.block / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
