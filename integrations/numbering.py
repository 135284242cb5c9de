"""Which parameter has which number in the optimizer.pt of a plain Trainer.

The file has no names. The Trainer makes two groups, what decays and what does not, each in the
model's order; other loops often make one. Each way of counting that is known is tried, and holds if
every group has the right size and every moment the shape of its parameter. Where none holds, or
several do and disagree, the state is left out, and a note says so.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers import Trainer as PlainTrainer

from hf_speed.checkpoint.imports import Foreign
from hf_speed.checkpoint.imports.foreign import Numbered, optimizer_name
from hf_speed.integrations.transformers.hub import plan_hub_model, tensors_of

Numbers = dict[str, int]
"""Parameter's name in memory -> its number."""


def name_states(model: PreTrainedModel | None, foreign: Foreign, notes: list[str]) -> Foreign:
    """The checkpoint with its numbered state by name; as it was where the names cannot be found.

    Args:
        model: on the meta device; None where there is no config.
        foreign: with the weights of that model.
        notes: gets a line for what is left out.
    """
    numbered = foreign.numbered
    if numbered is None:
        return foreign
    problem = "the model's config, which would say what is counted, is missing"
    if model is not None:
        numbers, problem = find_numbers(model, numbered)
        stored = _stored_names(model, foreign)
        apart = [name for name in numbers if name not in stored]
        if apart:
            problem = f"{apart[0]} is stored in other pieces on the Hub than in memory"
        elif numbers:
            return _named(foreign, numbered, {stored[name]: n for name, n in numbers.items()})
    notes.append(
        f"{numbered.path.name} has moments by number and is left out: {problem}. Resume the "
        f"checkpoint with what wrote it, and save it by name (FSDP, DeepSpeed, "
        f"torch.distributed.checkpoint), if they are wanted."
    )
    return foreign


def _named(foreign: Foreign, numbered: Numbered, numbers: Numbers) -> Foreign:
    states = {name: numbered.states[n] for name, n in numbers.items() if n in numbered.states}
    scalars = {name: numbered.scalars[n] for name, n in numbers.items() if n in numbered.scalars}
    kinds = {kind for values in states.values() for kind in values}
    steps = {values["step"] for values in scalars.values() if "step" in values}
    step = foreign.step
    return foreign._replace(
        origin=f"{foreign.origin} with {numbered.path.name}",
        states=states,
        scalars=scalars,
        trained=frozenset(numbers),
        param_groups=numbered.settings,
        optimizer=foreign.optimizer or optimizer_name(kinds, numbered.settings),
        step=int(max(steps)) if step is None and steps else step,
        stage=0,
    )


def find_numbers(model: PreTrainedModel, numbered: Numbered) -> tuple[Numbers, str]:
    """(numbers by parameter's name in memory, ""), or none and the reason why."""
    parameters = dict(model.named_parameters())
    found: list[Numbers] = []
    for groups in _countings(model, parameters):
        sizes = tuple(len(group) for group in groups)
        if sizes != tuple(len(group) for group in numbered.groups):
            continue
        names = (name for group in groups for name in group)
        numbers = dict(zip(names, (n for group in numbered.groups for n in group), strict=True))
        fits = all(
            value.shape == tuple(parameters[name].shape)
            for name, number in numbers.items()
            for value in numbered.states.get(number, {}).values()
        )
        if fits and numbers not in found:
            found.append(numbers)
    if len(found) == 1:
        return found[0], ""
    if found:
        return {}, "several orders of the parameters fit its shapes"
    sizes = [len(group) for group in numbered.groups]
    return {}, (
        f"its groups of {sizes} parameters are not those that a Trainer makes of a "
        f"{type(model).__name__}, or their moments have other shapes"
    )


def _countings(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[list[str]]]:
    """Ways in which loops group a model's parameters."""
    plain: Any = PlainTrainer
    decayed = set(plain.get_decay_parameter_names(None, model))
    matrices = {name for name, value in parameters.items() if value.dim() > 1}
    for chosen in (decayed, matrices, set(parameters)):
        groups = [
            [name for name in parameters if name in chosen],
            [name for name in parameters if name not in chosen],
        ]
        yield groups
        yield [group for group in groups if group]


def _stored_names(model: PreTrainedModel, foreign: Foreign) -> dict[str, str]:
    """Parameter's name in memory -> that of its tensor in the checkpoint."""
    renamed = {
        source: group.targets[0]
        for group in plan_hub_model(model).groups
        if group.is_rename and group.targets
        for source in group.sources
    }
    found: dict[str, str] = {}
    for stored in tensors_of(model).parameters:
        names = (*stored.names, *(renamed[name] for name in stored.names if name in renamed))
        here = next((name for name in names if name in foreign.weights), None)
        if here is not None:
            found |= dict.fromkeys(stored.names, here)
    return found
