"""An optimizer's state dict that numbers its parameters, as `torch.save` keeps it beside a model.

    optimizer.pt     of the plain Trainer
    optimizer.bin    of accelerate's save_state

The numbers count the parameters group by group. Which parameter has which number is not in the file
and is found with the model, in integrations/numbering.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_speed.checkpoint.imports.archive import StoredTensor, load_archive
from hf_speed.checkpoint.imports.foreign import (
    ForeignTensor,
    Numbered,
    Strips,
    hyperparameters,
    integer,
    mapping,
    number,
    sequence,
    text,
)
from hf_speed.errors import CheckpointError

_NAMES = ("optimizer.pt", "optimizer.bin")


def read_numbered(directory: Path) -> Numbered | None:
    """Such a file of a directory; None where there is none.

    Raises:
        CheckpointError: it is damaged, names what it should not, or is no optimizer's state.
    """
    for path in (directory / name for name in _NAMES):
        if path.is_file():
            return _parse(mapping(load_archive(path), "the file", str(path)), path)
    return None


def _parse(tree: Mapping[Any, Any], path: Path) -> Numbered:
    where = str(path)
    listed = sequence(tree.get("param_groups"), "param_groups", where)
    groups = [mapping(group, "a group", where) for group in listed]
    numbers = tuple(
        tuple(_index(each, where) for each in sequence(group.get("params"), "params", where))
        for group in groups
    )
    known = [each for members in numbers for each in members]
    states: dict[int, dict[str, ForeignTensor]] = {}
    scalars: dict[int, dict[str, float]] = {}
    for key, values in mapping(tree.get("state"), "state", where).items():
        index = _index(key, where)
        for kind, value in mapping(values, f"the state of {index}", where).items():
            name = text(kind, f"a state of {index}", where)
            if isinstance(value, StoredTensor) and value.shape:
                states.setdefault(index, {})[name] = Strips.whole(value)
            elif (counter := number(value)) is not None:
                scalars.setdefault(index, {})[name] = counter
            elif value is not None:
                raise CheckpointError(
                    f"{where}: {name} of {index} is neither a tensor nor a number."
                )
    strange = sorted({*states, *scalars} - set(known))
    if strange or len(set(known)) < len(known):
        raise CheckpointError(
            f"{where} has the state of parameter {strange[0]}, which is in no group."
            if strange
            else f"{where} has a parameter in two groups."
        )
    settings = tuple(hyperparameters(group) for group in groups)
    return Numbered(path, numbers, settings, states, scalars)


def _index(value: object, where: str) -> int:
    found = integer(value)
    if found is None or found < 0:
        raise CheckpointError(f"{where} calls a parameter {value!r:.40} where a number belongs.")
    return found
