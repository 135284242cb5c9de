"""Trying a slice plan: a small model of the same class, whole and sliced, over a tiny batch.

The copy has the real widths and two layers, random values everywhere and no dropout; the user's
model is not touched, so it may be on `meta`. Outputs are compared, and so are the gradients of all
parameters: a region that takes too much in shows only there.
"""

import copy
from collections.abc import Mapping
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_speed.errors import ConfigError, DivergenceError, MeshError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.collectives import agree, all_gather_flat
from hf_speed.mesh.journal import Journal
from hf_speed.nn.sliced import Region, SlicedModel, SlicePlan, Span, slice_model

NUM_LAYERS = 2
SHAPE = (2, 5)
"""Sequences and tokens of the tiny batch."""
TOLERANCE = 1e-4
"""Of the largest value in a tensor, in fp32: far above another order of sums, far below a fault."""
FLOOR = 1e-3
"""Gradients are measured against at least this share of the largest of all: some are zero but for
rounding, as those of key biases are."""


class _Run(NamedTuple):
    output: Tensor
    gradients: dict[str, Tensor | None]


def verify(
    model: PreTrainedModel,
    plan: SlicePlan,
    *,
    tp: AxisGroup,
    journal: Journal,
    batch: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    sequence_parallel: bool = False,
) -> None:
    """Check that a model sliced by `plan` computes what the whole one does. Collective over `tp`.

    Args:
        model: any model of the class and config that the plan is for; not changed.
        plan: to be tried.
        tp: the ranks.
        journal: of the run.
        batch: inputs of the model without labels, alike on all ranks; None makes tokens.
        device: where the collectives of `tp` work; None is the CPU.
        sequence_parallel: try it with rows divided.

    Raises:
        ConfigError: outputs or gradients differ, or the sliced model cannot run: with the model's
            class and what differed.
    """
    where = device if device is not None else torch.device("cpu")
    small = _small_model(model)
    nn.Module.to(small, where)
    inputs = dict(batch) if batch is not None else _tokens(model)
    inputs = {name: value.to(where) for name, value in inputs.items()}
    whole = _try(small, inputs, what="whole", plan=plan)
    small.zero_grad()
    values = {name: each.detach().clone() for name, each in small.named_parameters()}
    done = slice_model(
        small,
        _restricted(plan, small),
        tp=tp,
        journal=journal,
        sequence_parallel=sequence_parallel,
    )
    mine = _try(small, inputs, what="sliced", plan=plan)
    found = _difference(mine, whole, done, tp=tp, journal=journal)
    # All ranks raise, or none: the others would wait for this one in the next collective.
    problem = agree(ConfigError(found) if found is not None else None, group=tp)
    done.undo(lambda name: values[name])
    if problem is not None:
        raise ConfigError(
            f"{plan.model} cannot be divided for mesh.tp={plan.num_ranks} by the plan found from "
            f"its {plan.source}: {problem.partition('ConfigError: ')[2]}. Set mesh.tp: 1.\n{plan}"
        )


def _small_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class, two layers deep, in fp32 on the CPU, the same on every rank."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    if isinstance(depth, int) and depth > NUM_LAYERS:
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == depth:
                setattr(text, name, value[:NUM_LAYERS])
        text.num_hidden_layers = NUM_LAYERS
    text.use_cache = False
    # The user's random numbers go on as if nothing had been made.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        made = type(model)(config).float()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made.eval()


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(1, words, SHAPE, generator=generator)}


def _restricted(plan: SlicePlan, small: nn.Module) -> SlicePlan:
    """The plan for those modules that the small model has."""
    paths = {path for path, _ in small.named_modules()}

    def here(region: Region) -> bool:
        return {region.entry, *region.columns, region.row or region.entry} <= paths

    span = plan.span
    if span is not None and span.last not in paths:
        stack = span.first.rpartition(".")[0]
        span = Span(span.first, f"{stack}.{len(list(small.get_submodule(stack).children())) - 1}")
    return SlicePlan(
        model=plan.model,
        source=plan.source,
        num_ranks=plan.num_ranks,
        rules={path: rule for path, rule in plan.rules.items() if path in paths},
        regions=tuple(region for region in plan.regions if here(region)),
        partial=tuple(path for path in plan.partial if path in paths),
        span=span,
    )


def _try(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, what: str, plan: SlicePlan
) -> _Run:
    """Forward and backward of a weighted sum of the first output."""
    try:
        output = model(**inputs)[0]
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(output.shape, generator=generator).to(output.device)
        (output * weights).sum().backward()
    except (MeshError, DivergenceError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        fix = "Give verify a batch that it runs on" if what == "whole" else "Set mesh.tp: 1"
        raise ConfigError(
            f"{plan.model} cannot be tried for mesh.tp={plan.num_ranks}: the {what} model fails on "
            f"{list(inputs)} of shape {SHAPE} with {type(error).__name__}: {error}. {fix}."
        ) from error
    return _Run(output.detach(), {name: each.grad for name, each in model.named_parameters()})


def _difference(
    mine: _Run, whole: _Run, done: SlicedModel, *, tp: AxisGroup, journal: Journal
) -> str | None:
    """What differs first and by how much; None where nothing does. Collective."""
    found: str | None = None
    error = _error(mine.output, whole.output, floor=0.0)
    if error > TOLERANCE:
        found = f"its outputs differ from the whole model's by {error:.1e} of the largest"
    present = [each for each in whole.gradients.values() if each is not None]
    floor = FLOOR * max((float(each.abs().max()) for each in present), default=0.0)
    for name, expected in whole.gradients.items():
        gradient = mine.gradients[name]
        if gradient is None or expected is None:
            if (gradient is None) != (expected is None):
                found = found or f"{name} gets a gradient in one of them only"
            continue
        sharers = done.partial.get(name)
        if sharers is not None:
            gradient = _sum_over(gradient, sharers, tp=tp, journal=journal)
        slicing = done.slicings.get(name)
        part = expected if slicing is None else slicing.cut(expected, tp.rank)
        error = _error(gradient, part, floor=floor)
        if error > TOLERANCE:
            found = found or (
                f"the gradient of {name} differs from the whole model's by {error:.1e} of the "
                f"largest"
            )
    return found


def _error(value: Tensor, expected: Tensor, *, floor: float) -> float:
    """The largest difference, as a share of the largest value."""
    if value.shape != expected.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    largest = max(float(expected.abs().max()), floor, torch.finfo(torch.float32).tiny)
    share = float((value - expected).abs().max()) / largest
    return float("inf") if isnan(share) else share


def _sum_over(
    value: Tensor, sharers: tuple[int, ...], *, tp: AxisGroup, journal: Journal
) -> Tensor:
    """The sum over some of the ranks: all hold a value of the same shape."""
    full = value.new_empty(tp.size, *value.shape)
    full[tp.rank] = value
    all_gather_flat(full.view(-1), group=tp, journal=journal).wait()
    return full[list(sharers)].sum(0)
