"""Where a model can be cut: its list of layers, and what runs before and after them.

    model
      embeddings      before     first stage only
      layers          the list   dealt out to the stages
      norm, head      after      last stage only

The list is named by the config's `base_model_pp_plan` where there is one, and else it is the list
of like modules with the most parameters. What stands before it in a module's definition runs before
it, unless the plan, the model's output embeddings or a name (`final_layer_norm`) say otherwise; the
stand-ins of `stage` check that it does. Modules without parameters (rotary tables) stay on every
stage; dropout acts where its place in the forward is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.pipe.partition import Costs


class Place(NamedTuple):
    """A module as an attribute of another one: `parent.key`, at `path` from the model."""

    path: str
    parent: nn.Module
    key: str

    @property
    def module(self) -> nn.Module:
        """What stands there now."""
        found = self.parent._modules[self.key]
        if found is None:
            raise KeyError(self.path)
        return found


LAST_NAMES = ("final", "lm_head")
"""How names of modules begin that some models define before the layers and use after them."""


class Body(NamedTuple):
    """The parts of a model that stages are made of.

    Attributes:
        path: of the list of layers.
        layers: its members, in order.
        before: what runs before them and cannot stand idle on other stages.
        after: what runs after them, likewise.
        dropout: what may run before them or after them, and draws random numbers.
    """

    path: str
    layers: tuple[Place, ...]
    before: tuple[Place, ...]
    after: tuple[Place, ...]
    dropout: tuple[Place, ...]

    def costs(self) -> Costs:
        """Parameters of each part that a token is multiplied with: tables are looked up only."""
        return Costs(
            tuple(_multiplied(place.module) for place in self.layers),
            sum(_multiplied(place.module) for place in self.before),
            sum(_multiplied(place.module) for place in self.after),
        )


def find_body(model: nn.Module) -> Body:
    """Find the parts of `model`. Reads its structure, never a value.

    Raises:
        ConfigError: it has an encoder and a decoder, no list of layers, or parameters beside its
            modules, which belong to no stage.
    """
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"mesh.pp > 1 cannot cut {name}: each layer of its decoder reads the end of its "
            f"encoder, so its layers are not one chain. Set mesh.pp=1; mesh.tp and zero.stage=3 "
            f"divide it too."
        )
    path = _planned_list(model, config) or _largest_list(model)
    if path is None:
        raise ConfigError(
            f"mesh.pp > 1 needs a list of layers, and {name} has no nn.ModuleList or nn.Sequential "
            f"of two or more modules of one class. Set mesh.pp=1."
        )
    last = _planned_after(config)
    before, after = _around(model, path, last | _heads(model))
    layers = model.get_submodule(path)
    places = tuple(Place(f"{path}.{key}", layers, key) for key in layers._modules)
    return Body(
        path,
        places,
        before=tuple(place for place in before if not _is_dropout(place.module)),
        after=tuple(place for place in after if not _is_dropout(place.module)),
        dropout=tuple(place for place in (*before, *after) if _is_dropout(place.module)),
    )


def _planned_list(model: nn.Module, config: Any) -> str | None:
    """The list that the config's plan names."""
    plan: Mapping[str, Any] = getattr(config, "base_model_pp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    for key in plan:
        for root in (f"{prefix}.", "") if base is not None else ("",):
            try:
                found = model.get_submodule(f"{root}{key}")
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList) and len(found) > 0:
                return f"{root}{key}"
    return None


def _planned_after(config: Any) -> frozenset[str]:
    """Names that the config's plan has after the layers."""
    keys = list(getattr(config, "base_model_pp_plan", None) or ())
    return frozenset(keys[keys.index("layers") + 1 :]) if "layers" in keys else frozenset()


def _heads(model: nn.Module) -> frozenset[str]:
    """Names of the model's own modules that hold its output embeddings."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return frozenset(
        name
        for name, module in model.named_children()
        if head is not None and any(each is head for each in module.modules())
    )


def _largest_list(model: nn.Module) -> str | None:
    lists = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(each) for each in module}) == 1
    }
    return max(lists, key=lambda path: lists[path], default=None)


def _around(
    model: nn.Module, path: str, after_by_plan: frozenset[str]
) -> tuple[list[Place], list[Place]]:
    """What stands beside the list, on the way from the model to it."""
    before: list[Place] = []
    after: list[Place] = []
    *way, last = path.split(".")
    parent: nn.Module = model
    for depth, key in enumerate([*way, last]):
        prefix = "".join(f"{each}." for each in path.split(".")[:depth])
        direct = [name for name, value in parent._parameters.items() if value is not None]
        if direct:
            raise ConfigError(
                f"mesh.pp > 1 cannot cut {type(model).__name__}: {prefix}{direct[0]} is a "
                f"parameter of {type(parent).__name__} itself, so no stage owns it. Set mesh.pp=1."
            )
        seen = False
        # Inner modules run between the outer ones: before the outer `after`, after the outer
        # `before`.
        later = []
        for name, module in parent._modules.items():
            if name == key:
                seen = True
            elif module is not None and _matters(module):
                place = Place(f"{prefix}{name}", parent, name)
                is_late = seen or name in after_by_plan or name.startswith(LAST_NAMES)
                (later if is_late else before).append(place)
        after[:0] = later
        parent = parent.get_submodule(key)
    return before, after


def _matters(module: nn.Module) -> bool:
    """Whether a module would do harm, or waste memory, on a stage that it is not on."""
    return _is_dropout(module) or next(module.parameters(), None) is not None


def _is_dropout(module: nn.Module) -> bool:
    """Whether a module draws random numbers and has no parameters."""
    draws = any(isinstance(each, nn.Dropout) for each in module.modules())
    return draws and next(module.parameters(), None) is None


def _multiplied(module: nn.Module) -> float:
    tables = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    return float(sum(p.numel() for p in module.parameters() if id(p) not in tables))
