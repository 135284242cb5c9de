"""Every config field is read by some room: an option that nothing reads would be ignored."""

from dataclasses import fields

from hf_speed.config import ResolvedConfig, ResolvedOffload, known_paths
from tests.architecture.sources import attributes_read, sources

OF_THE_TABLE = {"param_dtype", "stage_reason", "reason"}
"""Fields of ResolvedConfig and ResolvedOffload that only their printed table shows."""


def _read_outside_config() -> set[str]:
    names: set[str] = set()
    for path, text in sources("hf_speed", "integrations"):
        if path.parts[1] not in {"config", "cli"}:
            names |= attributes_read(text)
    return names


def test_every_config_field_is_read() -> None:
    leaves = {path.rpartition(".")[2] for path in known_paths() if "." in path}
    dead = leaves - _read_outside_config()
    assert not dead, f"no room reads {sorted(dead)}"


def test_every_resolved_field_is_read() -> None:
    names = {entry.name for entry in fields(ResolvedConfig)} - OF_THE_TABLE
    dead = names - _read_outside_config()
    assert not dead, f"no room reads {sorted(dead)}"


def test_every_resolved_offload_field_is_read_as_one() -> None:
    """Its names are common words (`parameters`, `step`): only `offload.name` counts."""
    read: set[str] = set()
    for path, text in sources("hf_speed", "integrations"):
        if path.parts[1] not in {"config", "cli"}:
            read |= attributes_read(text, of="offload")
    names = {entry.name for entry in fields(ResolvedOffload)} - OF_THE_TABLE
    dead = names - read
    assert not dead, f"no room reads offload.{sorted(dead)}"


def test_every_config_field_is_documented() -> None:
    import ast

    text = next(text for path, text in sources("hf_speed") if path.name == "tree.py")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef):
            continue
        for before, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(before, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(before.target)} has no doc line"
