"""Load an exported model with plain transformers and continue some prompts; hf_speed stays out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

PROMPTS = ("def __init__(self", "import os\n", "class ")


def main() -> None:
    """Print one continuation per prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if any(name.partition(".")[0] == "hf_speed" for name in sys.modules):
        raise SystemExit("hf_speed was imported: this was to be plain transformers.")
    elements = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__} with {elements:,} parameters, from {args.model}")
    set_seed(0)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=48, do_sample=True, top_k=20, temperature=0.7
            )
        print(f"--- {prompt!r}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
