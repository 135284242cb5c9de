"""What a Trainer knows of a run and an engine does not: its data, its start, its arguments.

It goes into `engine.notes`, from there into the manifest, and from there into the model card.
Nothing of it names a place on this machine.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)@")


def notes_of(trainer: Any) -> dict[str, Any]:
    """JSON: "dataset", "base_model" and "arguments", as far as they are known."""
    found = {
        "dataset": _dataset(getattr(trainer, "train_dataset", None)),
        "base_model": _base_model(trainer.model),
        "arguments": _arguments(trainer),
    }
    return {key: value for key, value in found.items() if value}


def _dataset(dataset: Any) -> dict[str, Any]:
    """Name, configuration, split and rows of a data set of `datasets`; else its rows."""
    found: dict[str, Any] = {}
    info = getattr(dataset, "info", None)
    for key, name in (("name", "dataset_name"), ("config", "config_name")):
        value = getattr(info, name, None)
        if isinstance(value, str) and value != "default":
            found[key] = value
    if getattr(dataset, "split", None) is not None:
        found["split"] = str(dataset.split)
    sources = getattr(info, "download_checksums", None)
    matches = (_HUB_FILE.match(str(each)) for each in sources or ())
    names = {match[1] for match in matches if match is not None}
    if len(names) == 1:
        found["hub_id"] = names.pop()
    with contextlib.suppress(TypeError):  # A stream has no length, and there may be no data set.
        found["rows"] = len(dataset)
    return found


def _base_model(model: Any) -> str | None:
    """Where the model came from, if that is a name on the Hub."""
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    is_name = isinstance(name, str) and name and not Path(name).exists()
    return name if is_name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _arguments(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps
    batches = getattr(trainer.accelerator, "num_batches", args.world_size)
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    scheduler = args.lr_scheduler_type
    return {
        "sequences a step": rows * batches,
        "learning rate": args.learning_rate,
        "schedule": f"{getattr(scheduler, 'value', scheduler)}, {args.warmup_steps} warmup",
        "gradient clipping": args.max_grad_norm,
        "seed": args.seed,
        **({"computes in": precision} if precision else {}),
    }
