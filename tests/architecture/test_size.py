"""No file over 500 lines, no function over 60: a longer one hides two ideas.

The tables of exceptions are a ratchet: entries may shrink and go, never grow.
"""

import ast

from tests.architecture.sources import sources

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}

FOLDERS = ("hf_speed", "integrations", "scripts", "tests")


def test_files_are_short() -> None:
    lengths = {str(path): text.count("\n") for path, text in sources(*FOLDERS)}
    longer = {path: length for path, length in lengths.items() if length > MAX_FILE_LINES}
    _compare(longer, LONGER_FILES)


def test_functions_are_short() -> None:
    longer: dict[str, int] = {}
    for path, text in sources(*FOLDERS):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    longer[f"{path}:{node.name}"] = length
    _compare(longer, LONGER_FUNCTIONS)


def _compare(found: dict[str, int], allowed: dict[str, int]) -> None:
    grown = {name: length for name, length in found.items() if length > allowed.get(name, 0)}
    assert not grown, f"too long: {grown}; split them"
    shrunk = {name: length for name, length in allowed.items() if found.get(name, 0) < length}
    assert not shrunk, f"shorter now: {shrunk}; lower the table"
