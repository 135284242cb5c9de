"""What is gathered together: a unit is normally one transformer block.

Planning is pure: it looks at module classes and parameter names, never at values. Parameters that
belong to no block (embeddings, final norm, head) and those that several blocks share form the root
unit, which stays gathered from the start of the forward to the end of the backward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from hf_speed.errors import ConfigError


class ParameterPlace(NamedTuple):
    """One attribute through which a parameter is reached."""

    module: nn.Module
    key: str


class ParameterEntry(NamedTuple):
    """One parameter and all its places; tied parameters have several.

    Attributes:
        name: its first name in `model.named_parameters()`.
        parameter: the user's object.
        places: every (module, attribute) that holds it.
    """

    name: str
    parameter: nn.Parameter
    places: tuple[ParameterPlace, ...]


class UnitPlan(NamedTuple):
    """A module and the parameters that are gathered when it runs."""

    name: str
    module: nn.Module
    entries: tuple[ParameterEntry, ...]
    is_root: bool


def plan_units(
    model: nn.Module,
    block_classes: Sequence[str] | None = None,
    *,
    names: Mapping[int, str] | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
) -> list[UnitPlan]:
    """Divide the parameters of `model` in units: blocks in definition order, then the root.

    Args:
        model: any module; Transformers models name their blocks in `_no_split_modules`.
        block_classes: class names of the modules that become units; None finds them.
        names: id of a parameter -> its name, where another one than the first here is meant: that
            in the whole model, of which this is a part.
        blocks: what becomes units, as `find_blocks` has found it in the whole model; None finds it
            here.

    Raises:
        ConfigError: a class in `block_classes` is not in the model.
    """
    if blocks is None:
        blocks = find_blocks(model, block_classes)
    owner_of_module: dict[nn.Module, nn.Module] = {}
    for block in blocks.values():
        for module in block.modules():
            owner_of_module[module] = block

    entries: dict[int, ParameterEntry] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            known = entries.get(id(parameter))
            here = f"{prefix}.{key}" if prefix else key
            name = here if names is None else names.get(id(parameter), here)
            place = ParameterPlace(module, key)
            if known is None:
                entries[id(parameter)] = ParameterEntry(name, parameter, (place,))
            else:
                entries[id(parameter)] = known._replace(places=(*known.places, place))

    by_block: dict[nn.Module, list[ParameterEntry]] = {block: [] for block in blocks.values()}
    root: list[ParameterEntry] = []
    for entry in entries.values():
        owners = {owner_of_module.get(place.module) for place in entry.places}
        owner = owners.pop()
        # A parameter tied across units must be there for all of them: the root holds it.
        (root if owners or owner is None else by_block[owner]).append(entry)
    units = [
        UnitPlan(name, block, tuple(by_block[block]), is_root=False)
        for name, block in blocks.items()
        if by_block[block]
    ]
    return [*units, UnitPlan("", model, tuple(root), is_root=True)]


def find_blocks(
    model: nn.Module, block_classes: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The modules of `model` that become units, by path.

    Raises:
        ConfigError: a class in `block_classes` is not in the model.
    """
    if block_classes is not None:
        return _named_blocks(model, block_classes)
    declared = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    blocks = _outermost(model, lambda module: type(module).__name__ in declared)
    return blocks or _layer_lists(model)


def _named_blocks(model: nn.Module, block_classes: Sequence[str]) -> dict[str, nn.Module]:
    present = {type(module).__name__ for module in model.modules()}
    missing = sorted(set(block_classes) - present)
    if missing:
        raise ConfigError(
            f"zero.units names {missing}, but {type(model).__name__} has no such module. "
            f"It has: {', '.join(sorted(present))}."
        )
    return _outermost(model, lambda module: type(module).__name__ in block_classes)


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Modules for which `wanted` holds, without those inside another one; never the model."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module is model or module in inside:
            continue
        if wanted(module):
            found[name] = module
            inside.update(module.modules())
    return found


def _layer_lists(model: nn.Module) -> dict[str, nn.Module]:
    """The members of each outermost ModuleList or Sequential of several modules of one class."""
    found: dict[str, nn.Module] = {}
    lists = _outermost(
        model,
        lambda module: (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(module) > 1
            and len({type(each) for each in module}) == 1
            and any(True for _ in module.parameters())
        ),
    )
    for prefix, layers in lists.items():
        for name, layer in layers.named_children():
            found[f"{prefix}.{name}"] = layer
    return found
