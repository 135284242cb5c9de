"""The Python files of this repository, parsed."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    """(path from the root, text) of every Python file in `folders`; the symlink is not followed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "hf_speed" / "integrations"):
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def attributes_read(text: str, *, of: str | None = None) -> set[str]:
    """Every name that `text` reads as `something.name`; with `of`, as `...of.name` only."""
    return {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and of in (None, _last_name(node.value))
    }


def _last_name(node: ast.expr) -> str | None:
    """`c` of `a.b.c`, and of `c`."""
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return None
