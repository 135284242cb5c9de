"""JSON that means one thing, and checks of what it holds: for files that others may have damaged.

Refused besides what is no JSON: NaN and infinities, numbers that no 64-bit machine has, a key twice
in one object, and nesting that no file of ours has.
"""

import json
import math
from typing import Any, TypeVar

from hf_speed.errors import CheckpointError

T = TypeVar("T")

MAX_DEPTH = 64
"""Lists and objects within one another."""

_SIZE_LIMIT = 1 << 63
_INT_LIMIT = 1 << 64
_INT_DIGITS = 20


def dump_json(value: object, what: str, *, indent: int | None = None) -> str:
    """Strict JSON: no NaN, no infinity, no object that would come back as something else.

    Raises:
        CheckpointError: names the value and why.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} cannot be stored as JSON: {error}. Give plain numbers, strings, lists and "
            f"dicts; tensors belong in the states."
        ) from error


def load_json(text: str, where: str) -> Any:
    """Parse strict JSON; `where` names its file in messages.

    Raises:
        CheckpointError: not JSON, or not strict.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            object_pairs_hook=_once,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}.") from error
    _check_depth(value, where)
    return value


def expect(value: object, kind: type[T], where: str, what: str) -> T:
    """The value, if it is of this type.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"{where}: {what} is {type(value).__name__} where {kind.__name__} is expected."
        )
    return value


def expect_text(value: object, where: str, what: str) -> str:
    """The value, if it is text that can be printed and be a file's name.

    Raises:
        CheckpointError: it is not.
    """
    text = expect(value, str, where, what)
    # JSON can spell halves of characters, which no file name and no terminal takes.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CheckpointError(f"{where}: {what} is {text!r}, which is no text.")
    return text


def expect_count(value: object, where: str, what: str) -> int:
    """The value, if it is a whole number from 0 to 2^63.

    Raises:
        CheckpointError: it is not.
    """
    if isinstance(value, int) and (isinstance(value, bool) or not 0 <= value < _SIZE_LIMIT):
        raise CheckpointError(f"{where}: {what} is {value!r} where a count is expected.")
    return expect(value, int, where, what)


def expect_sizes(value: object, where: str, what: str) -> tuple[int, ...]:
    """The value, if it is a list of counts.

    Raises:
        CheckpointError: it is not.
    """
    return tuple(expect_count(size, where, what) for size in expect(value, list, where, what))


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _bounded_int(digits: str) -> int:
    # Counted first: the time to read a number grows with the square of its length.
    if len(digits) > _INT_DIGITS + 1 or abs(int(digits)) >= _INT_LIMIT:
        raise ValueError(f"the number {digits[:_INT_DIGITS]}... has more than 64 bits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:_INT_DIGITS]} is not finite")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return table


def _check_depth(value: object, where: str) -> None:
    """Walk level by level, which takes no stack however deep the value is."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise CheckpointError(f"{where} is damaged: it is nested more than {MAX_DEPTH} deep.")
