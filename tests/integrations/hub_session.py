"""What a user does with the Hub, in a process of its own.

huggingface_hub reads its settings when it is imported, so a process that has them from the start
talks to the server of the tests. Prints what it saw as JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_speed
from hf_speed.cli import main
from hf_speed.errors import CheckpointError
from tests.integrations.toys import llama, stage, trainer

NAME = "my-org/my-model"


def session(checkpoint: str, scratch: str) -> dict[str, Any]:
    """Push a checkpoint in several ways and load it by name after each."""
    saw: dict[str, Any] = {}
    stored = AutoModelForCausalLM.from_pretrained(checkpoint)

    def loaded(**options: Any) -> bool:
        model = AutoModelForCausalLM.from_pretrained(NAME, **options)
        found = dict(model.named_parameters())
        return all(torch.equal(found[name], value) for name, value in stored.named_parameters())

    done = hf_speed.export(
        checkpoint, NAME, max_shard_size="20KB", push_to_hub=True, private=True, commit_message="1"
    )
    saw["first"] = [done.directory, done.url, list(done.files)]
    saw["first is the model"] = loaded()
    saw["tokenizer"] = AutoTokenizer.from_pretrained(NAME).encode("b a")
    # One file now: the files and the index of before must go.
    saw["status"] = main(["export", checkpoint, NAME, "--push_to_hub", "--max_shard_size", "1GB"])
    saw["second is the model"] = loaded(force_download=True)
    options: dict[str, Any] = {"push_to_hub": True, "revision": "trial", "dtype": torch.bfloat16}
    hf_speed.export(checkpoint, NAME, **options)
    trial = AutoModelForCausalLM.from_pretrained(NAME, revision="trial")
    saw["trial"] = str(trial.dtype)
    hf_speed.export(llama(seed=4), "my-org/live", push_to_hub=True)
    live = AutoModelForCausalLM.from_pretrained("my-org/live")
    saw["live is the model"] = all(
        torch.equal(left, right)
        for left, right in zip(live.parameters(), llama(seed=4).parameters(), strict=True)
    )
    saw["run"] = _pushed_run(Path(scratch).with_name("run"))
    saw["left behind"] = sorted(path.name for path in Path(scratch).iterdir())
    return saw


def _pushed_run(home: Path) -> list[str]:
    """Let the Trainer push each checkpoint and, in the end, its directory; what that holds."""
    options: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "my-org/run"}
    made = trainer(home, stage(0), max_steps=1, save_strategy="steps", save_steps=1, **options)
    made.train()
    made.push_to_hub()
    return sorted(path.name for path in home.iterdir())


def refused(checkpoint: str) -> str:
    """What is said where the token may not write."""
    token = os.environ["HF_TOKEN"]
    os.environ["HF_TOKEN"] = "hf_wrong"
    try:
        hf_speed.export(checkpoint, NAME, push_to_hub=True)
    except CheckpointError as error:
        return str(error)
    finally:
        os.environ["HF_TOKEN"] = token
    return "it was taken"


if __name__ == "__main__":
    before = refused(sys.argv[1])
    sys.stdout.write(json.dumps({"refused": before, **session(*sys.argv[1:])}))
