"""Refusing a plan that does not fit a model, before anything is changed."""

from typing import Any

from torch import Tensor, nn

from hf_speed.errors import ConfigError
from hf_speed.nn.sliced.layers import embedding_reason, is_linear, linear_sizes
from hf_speed.nn.sliced.plan import Row, Rule, SlicePlan, VocabEmbedding


def check_plan(model: nn.Module, plan: SlicePlan, num_ranks: int) -> None:
    """See that `plan` is one of `model` for `num_ranks`.

    Raises:
        ConfigError: it is of another model or other ranks; a module is none that can be sliced; a
            weight has a gradient, or is read by a module that stays whole.
    """
    if plan.num_ranks != num_ranks:
        raise ConfigError(
            f"The slice plan is for {plan.num_ranks} ranks, but mesh.tp={num_ranks}. Make it for "
            f"the ranks at hand."
        )
    modules = dict(model.named_modules())
    planned = {id(modules[path]) for path in plan.rules if path in modules}
    holders = _holders(model)
    for path, rule in plan.rules.items():
        module = modules.get(path)
        if module is None:
            raise ConfigError(
                f"The slice plan of {plan.model} names {path}, but this model has no such module."
            )
        _check_module(path, module, rule)
        weight: Any = module._parameters["weight"]
        if weight.grad is not None:
            raise ConfigError(
                f"{path}.weight has a gradient of its whole. Call model.zero_grad() before "
                f"slicing the model over mesh.tp={num_ranks}."
            )
        others = [name for name, each in holders[id(weight)] if id(each) not in planned]
        if others:
            raise ConfigError(
                f"{path}.weight is also the weight of {', '.join(others)}, which would read a "
                f"slice. Slice these modules too, or leave {path} whole."
            )


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that hold each parameter, by its id."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, module))
    return found


def _check_module(path: str, module: nn.Module, rule: Rule) -> None:
    reason = _reason(module, rule)
    if reason is not None:
        raise ConfigError(
            f"{path} cannot be sliced: {reason}. Adapters and quantised layers do not go with "
            f"mesh.tp > 1; merge or remove them, or set mesh.tp: 1."
        )
    size = _size(module, rule)
    if size != rule.slicing.size:
        raise ConfigError(
            f"{path} has {size} features to divide, but the slice plan is for {rule.slicing.size}: "
            f"the model was changed after the plan was made."
        )


def _reason(module: nn.Module, rule: Rule) -> str | None:
    """Why a module cannot be sliced by `rule`; None where it can."""
    if isinstance(rule, VocabEmbedding):
        reason = embedding_reason(module)
    else:
        reason = None if is_linear(module) else f"it is a {type(module).__name__}, not a linear"
    if reason is not None:
        return reason
    weight: Any = module._parameters["weight"]
    plain = type(weight.data) is Tensor
    return None if plain else f"its weight is a {type(weight.data).__name__}, not a plain tensor"


def _size(module: nn.Module, rule: Rule) -> int:
    """What there is to divide."""
    if isinstance(rule, VocabEmbedding):
        weight: Any = module._parameters["weight"]
        return int(weight.shape[0])
    inputs, outputs = linear_sizes(module)
    return inputs if isinstance(rule, Row) else outputs
