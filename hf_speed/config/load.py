"""From what a user gives (a path, JSON text, a mapping, a SpeedConfig) to a checked SpeedConfig.

text -> mapping (YAML or JSON, no key twice) -> tree (no unknown key) -> SpeedConfig (each class
checks its values).
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hf_speed.config.owned import DEEPSPEED_NAMES, OWNED_KEYS
from hf_speed.config.tree import AUTO, SpeedConfig
from hf_speed.errors import ConfigError


def load_config(value: str | PathLike[str] | Mapping[str, Any] | SpeedConfig | None) -> SpeedConfig:
    """Make a SpeedConfig of whatever a user gives.

    Args:
        value: None (every choice left to hf_speed), a path to a .yaml, .yml or .json file, JSON
            text that begins with `{`, a mapping, or a SpeedConfig, which is returned as it is.

    Raises:
        ConfigError: the file cannot be read; a key is unknown, given twice, or belongs to
            TrainingArguments; a value has the wrong type or lies out of range.
    """
    if isinstance(value, SpeedConfig):
        return value
    if value is None:
        return SpeedConfig()
    if isinstance(value, Mapping):
        return _build(SpeedConfig, value, path="")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _build(SpeedConfig, _parse_json(value, source="the given JSON text"), path="")
    if isinstance(value, str | PathLike):
        return _build(SpeedConfig, _read(Path(value)), path="")
    raise ConfigError(
        f"A config of type {type(value).__name__} cannot be read: give a path to a .yaml or .json "
        "file, JSON text, a dict, or a SpeedConfig."
    )


def _read(path: Path) -> object:
    """The content of a config file."""
    if path.suffix not in {".yaml", ".yml", ".json"}:
        raise ConfigError(f"The config file {str(path)!r} does not end in .yaml, .yml or .json.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The config file {str(path.absolute())!r} cannot be read: {error}."
        ) from error
    return (
        _parse_json(text, source=str(path))
        if path.suffix == ".json"
        else _parse_yaml(text, source=str(path))
    )


def _parse_json(text: str, *, source: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}.") from error


def _parse_yaml(text: str, *, source: str) -> object:
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # A SafeLoader all the same.
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}.") from error
    return {} if content is None else content


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader for which a key given twice is an error: PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        _unique([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep=deep)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(
                f"The key {key!r} is given twice in one section: only one of its values could take "
                "effect."
            )
    return dict(pairs)


def _build(kind: type, tree: object, *, path: str) -> Any:
    """An instance of config class `kind` from a mapping; `path` is where it sits, '' at the top."""
    if isinstance(tree, kind):
        return tree
    if not isinstance(tree, Mapping):
        keys = ", ".join(entry.name for entry in fields(kind))
        where = path or "The config"
        raise ConfigError(
            f"{where}={tree!r} is of type {type(tree).__name__}: it must be a section with keys "
            f"{keys}."
        )
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(_unknown_key(full))
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, path=full)
        else:
            values[key] = _without_auto(value, hints[key])
    return kind(**values)


def _without_auto(value: object, hint: Any) -> object:
    """None for `auto` where the field may be left to hf_speed."""
    may_be_left_out = type(None) in getattr(hint, "__args__", ())
    return None if value == AUTO and may_be_left_out else value


def known_paths(kind: type = SpeedConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted path of the tree, sections included: `zero`, `zero.stage`, ..."""
    for name, hint in get_type_hints(kind).items():
        full = f"{prefix}.{name}" if prefix else name
        yield full
        if isinstance(hint, type) and is_dataclass(hint):
            yield from known_paths(hint, full)


def _unknown_key(path: str) -> str:
    """Why the key at `path` is refused, and what to write instead."""
    key = path.rpartition(".")[2]
    if key in OWNED_KEYS:
        owner = OWNED_KEYS[key]
        return (
            f"{path!r} does not belong in the hf_speed config: {owner} owns it. Remove it here and "
            "set it there, so that it is said once."
        )
    if key in DEEPSPEED_NAMES:
        return f"{path!r} is DeepSpeed's name. {DEEPSPEED_NAMES[key]}"
    return f"Unknown config key {path!r}. Did you mean {_nearest(path)!r}?"


def _nearest(path: str) -> str:
    """The known path most like `path`; the last name weighs most: its section may be wrong."""
    prefix, _, key = path.rpartition(".")

    def likeness(candidate: str) -> float:
        other_prefix, _, other = candidate.rpartition(".")
        names = difflib.SequenceMatcher(None, key.lower(), other.lower()).ratio()
        return (
            2 * names + difflib.SequenceMatcher(None, prefix.lower(), other_prefix.lower()).ratio()
        )

    return max(known_paths(), key=likeness)
