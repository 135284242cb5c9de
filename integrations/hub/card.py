"""The model card of a run: README.md with the metadata that the Hub reads.

Everything in it was recorded: the manifest says mesh, stage, optimizer, config, versions and what
the Trainer noted of the data; trainer_state.json has the losses. Paths of the training machine are
left out, and what came from files is written as text, never as markup.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_speed.checkpoint.export import read_config
from hf_speed.checkpoint.manifest import STATE_DIRECTORY
from hf_speed.checkpoint.reader import read_manifest

CARD_NAME = "README.md"

_NUM_ROWS = 12
"""Of the table of losses."""

_PUBLISHED = ("mesh", "pipe", "tensor", "zero", "precision", "offload")
"""Sections of the config; the others name buckets and directories, or find faults."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class CardFacts(NamedTuple):
    """What is known of a run.

    Attributes:
        name: of the model, as in the title.
        meta: as the manifest has it: mesh, stage, optimizer, param_groups, config, versions, notes.
        world_size: processes that trained; None: not known.
        state: as trainer_state.json has it.
        config: the model's own.
    """

    name: str
    meta: Mapping[str, Any]
    world_size: int | None
    state: Mapping[str, Any]
    config: Mapping[str, Any]


def facts_of_checkpoint(source: Path, name: str) -> CardFacts:
    """What a checkpoint, or a directory that save_pretrained has written, says of its run.

    Raises:
        CheckpointError: it is not whole.
    """
    manifest = read_manifest(source) if (source / STATE_DIRECTORY).is_dir() else None
    try:
        state = json.loads((source / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        state = {}  # Losses are a help to the reader, no part of the model.
    meta = {} if manifest is None else manifest.meta
    world_size = None if manifest is None else manifest.world_size
    config = read_config(source / "config.json")
    return CardFacts(name, meta, world_size, _table(state), config)


def write_card(directory: Path, facts: CardFacts) -> bool:
    """Write the card into a model's directory; False, and nothing, where there is one already."""
    path = directory / CARD_NAME
    if path.exists():
        return False
    path.write_text(make_card(facts), encoding="utf-8")
    return True


def make_card(facts: CardFacts) -> str:
    """The card as text: YAML between dashes, then Markdown."""
    from huggingface_hub import ModelCard

    sections = [
        f"# {_text(facts.name)}",
        _introduction(facts),
        "## Training",
        "\n".join(f"- {label}: {value}" for label, value in _training(facts)),
        *_losses(_table(facts.state)),
        *_config(_table(facts.meta.get("config"))),
        *_versions(facts),
    ]
    body = "\n\n".join(each for each in sections if each)
    header = _metadata(facts).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n{body}\n"))


def _metadata(facts: CardFacts) -> Any:
    from huggingface_hub import ModelCardData

    notes = _table(facts.meta.get("notes"))
    dataset = _repo_id(_table(notes.get("dataset")).get("hub_id"))
    return ModelCardData(
        model_name=facts.name,
        library_name="peft" if _is_adapter(facts) else "transformers",
        base_model=_repo_id(notes.get("base_model")),
        datasets=None if dataset is None else [dataset],
        tags=["hf_speed", "generated_from_trainer"] if facts.state else ["hf_speed"],
    )


def _is_adapter(facts: CardFacts) -> bool:
    return not facts.config


def _introduction(facts: CardFacts) -> str:
    architectures = facts.config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    kind = f"A {_text(names[0])}" if names else "A model"
    return (
        f"{kind}, trained with hf_speed. This card was made from what the run recorded: say here "
        "what the model is for, and where it fails."
    )


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """(label, value) of what is known; nothing for what is not."""
    notes = _table(facts.meta.get("notes"))
    dataset = _table(notes.get("dataset"))
    if dataset:
        yield "data set", ", ".join(f"{key} {_text(value)}" for key, value in dataset.items())
    if notes.get("base_model"):
        yield "started from", _text(notes["base_model"])
    for key, label in (("global_step", "optimizer steps"), ("epoch", "epochs")):
        if _is_number(facts.state.get(key)):
            yield label, f"{facts.state[key]:g}"
    seen = facts.state.get("num_input_tokens_seen")
    if _is_number(seen) and seen:
        yield "input tokens", f"{seen:,}"
    for label, value in _table(notes.get("arguments")).items():
        yield _text(label), _text(value)
    if facts.meta.get("optimizer"):
        yield "optimizer", f"{_text(facts.meta['optimizer'])}{_hyperparameters(facts.meta)}"
    if "stage" in facts.meta:
        yield "ZeRO stage", _text(facts.meta["stage"])
    mesh = _table(facts.meta.get("mesh"))
    if mesh:
        sizes = ", ".join(f"{_text(axis)} {_text(size)}" for axis, size in mesh.items())
        processes = f" ({facts.world_size} processes)" if facts.world_size else ""
        yield "mesh", sizes + processes


def _hyperparameters(meta: Mapping[str, Any]) -> str:
    groups = meta.get("param_groups")
    if not isinstance(groups, list) or not groups:
        return ""
    shown = {}
    for key in ("initial_lr", "lr", "betas", "momentum", "eps", "weight_decay"):
        values = [_table(group).get(key) for group in groups]
        present = list(dict.fromkeys(str(each) for each in values if each is not None))
        if present and not (key == "lr" and "initial_lr" in shown):
            shown[key] = " / ".join(present)
    return "".join(f", {key} {_text(value)}" for key, value in shown.items())


def _losses(state: Mapping[str, Any]) -> Iterator[str]:
    """A table of at most `_NUM_ROWS` lines over the run, the first and the last among them."""
    lines: dict[float, dict[str, float]] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else ():
        step: Any = _table(entry).get("step")
        found = {
            key: value
            for key, value in _table(entry).items()
            if (key in ("loss", "epoch") or key.startswith("eval_")) and _is_number(value)
        }
        if _is_number(step) and found.keys() - {"epoch"}:
            lines.setdefault(step, {}).update(found)
    steps = sorted(lines)
    if not steps:
        return
    evaluated = [step for step in steps if any(key.startswith("eval_") for key in lines[step])]
    chosen = sorted({*_spread(steps), *_spread(evaluated)})
    columns = [key for key in ("loss", "eval_loss") if any(key in line for line in lines.values())]
    yield "### Losses"
    rows = [["step", "epoch", *columns], ["---"] * (2 + len(columns))]
    for step in chosen:
        cells = (_number(lines[step].get(key)) for key in ("epoch", *columns))
        rows.append([f"{step:g}", *cells])
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    last = lines[evaluated[-1]] if evaluated else {}
    timing = ("_runtime", "_per_second", "_loss")
    results = [
        f"- {_text(key.removeprefix('eval_'))}: {value:.6g}"
        for key, value in last.items()
        if key.startswith("eval_") and not key.endswith(timing)
    ]
    if results:
        yield "### Last evaluation"
        yield "\n".join(results)


def _spread(steps: list[float]) -> list[float]:
    if len(steps) <= _NUM_ROWS:
        return steps
    last = _NUM_ROWS - 1
    return [steps[index * (len(steps) - 1) // last] for index in range(_NUM_ROWS)]


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    """The sections of hf_speed's config that say how, not where."""
    sections = {name: dict(_table(config[name])) for name in _PUBLISHED if name in config}
    sections.get("offload", {}).pop("paths", None)
    if sections:
        yield "### hf_speed config"
        # Indented, not fenced: no text in it can end the block.
        text = json.dumps(sections, indent=2)
        yield "\n".join(f"    {line}" for line in text.splitlines())


def _versions(facts: CardFacts) -> Iterator[str]:
    versions = _table(facts.meta.get("versions"))
    if versions:
        yield "### Versions"
        yield "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in versions.items())


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else ""


def _repo_id(value: Any) -> str | None:
    """A name on the Hub; None for what cannot be one."""
    return value if isinstance(value, str) and _REPO_ID.fullmatch(value) else None


def _text(value: Any) -> str:
    """One line of plain text: no character of it is markup."""
    line = " ".join(str(value).split())[:200]
    return re.sub(r"([\\`*{}\[\]<>#|$~])", r"\\\1", line)
