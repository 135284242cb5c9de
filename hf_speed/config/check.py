"""Checks of one config value; each error names the path, the value and what is legal."""

from collections.abc import Sequence

from hf_speed.errors import ConfigError


def integer(path: str, value: object, low: int, high: int) -> None:
    """Raise unless `value` is a whole number in `low..high`."""
    # bool is a subclass of int: `stage: true` would otherwise pass as 1.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(_wrong_type(path, value, f"a whole number from {low} to {high}"))
    if not low <= value <= high:
        raise ConfigError(f"{path}={value} is out of range: it goes from {low} to {high}.")


def number(path: str, value: object, low: float, high: float) -> None:
    """Raise unless `value` is a number in `low..high`; NaN is in no range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(_wrong_type(path, value, f"a number from {low:g} to {high:g}"))
    if not low <= value <= high:
        raise ConfigError(f"{path}={value} is out of range: it goes from {low:g} to {high:g}.")


def boolean(path: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(_wrong_type(path, value, "true or false"))


def one_of(path: str, value: object, options: Sequence[object]) -> None:
    """Raise unless `value` is one of `options`."""
    if value not in options or isinstance(value, bool):
        listed = ", ".join(repr(option) for option in options)
        raise ConfigError(f"{path}={value!r} is not a choice: it is one of {listed}.")


def names(path: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple; raise unless it is a list of one or more names, each once."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise ConfigError(_wrong_type(path, value, "'auto' or a list of module class names"))
    if not value:
        raise ConfigError(
            f"{path}=[] names no module class. Name at least one, or set {path}='auto'."
        )
    repeated = sorted({name for name in value if value.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"{path} names {', '.join(repeated)} more than once. Name each class once."
        )
    return tuple(value)


def counts(path: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple; raise unless it is a list of one or more whole numbers of at least 1."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(_wrong_type(path, value, "'parameters', 'time' or a list of counts"))
    for number_ in value:
        integer(f"{path}[]", number_, 1, 65536)
    return tuple(value)


def directories(path: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple; raise unless it is a list of directories, each once."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise ConfigError(_wrong_type(path, value, "a list of directories"))
    repeated = sorted({name for name in value if value.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"{path} names {', '.join(repeated)} more than once. Name each directory once, on a "
            "disk of its own."
        )
    return tuple(value)


def url(path: str, value: object) -> None:
    """Raise unless `value` is an address with a scheme, as in 's3://bucket/run'."""
    if not isinstance(value, str):
        raise ConfigError(_wrong_type(path, value, "an address, as in 's3://bucket/run'"))
    scheme, separator, rest = value.partition("://")
    if not (scheme and separator and rest):
        raise ConfigError(
            f"{path}={value!r} is no address: write it as in 's3://bucket/run', 'gs://bucket/run' "
            f"or 'file:///shared/run'."
        )


def section(path: str, value: object, kind: type) -> None:
    """Raise unless `value` is an instance of config class `kind`."""
    if not isinstance(value, kind):
        raise ConfigError(_wrong_type(path, value, f"a {kind.__name__}"))


def _wrong_type(path: str, value: object, wanted: str) -> str:
    message = f"{path}={value!r} is of type {type(value).__name__}: it must be {wanted}."
    return f"{message} {_hint(value)}".rstrip() if isinstance(value, str) else message


def _hint(text: str) -> str:
    """How to write the number that `text` looks like; empty if it looks like none."""
    try:
        float(text)
    except ValueError:
        return ""
    if "e" in text.lower():
        return "YAML reads an exponent only with a dot and a sign, as in 1.0e+6."
    return "Write it without quotes."
