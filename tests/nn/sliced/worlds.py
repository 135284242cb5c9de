"""Whole and sliced models over the same batch, side by side on the ranks of a world."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_speed.integrations.transformers.slice_plan import plan_for
from hf_speed.mesh import AxisGroup, Lane, ParallelMesh
from hf_speed.mesh.journal import Journal
from hf_speed.nn.sliced import SlicedModel, slice_model
from tests.engine.toys import global_batch, toy_model

SLICES_CHANGE_THE_ORDER = {"rtol": 1e-5, "atol": 1e-6}
"""DESIGN, law 1: the same maths in another order. The floor is that of sums near zero."""


class World(NamedTuple):
    """The ranks of one test."""

    tp: AxisGroup
    journal: Journal


def world() -> World:
    """All ranks as tensor-parallel ones."""
    mesh = ParallelMesh({"tp": dist.get_world_size()}, device=torch.device("cpu"), timeout_s=60.0)
    return World(mesh.axis("tp", lane=Lane.CONTROL), mesh.journal)


class Result(NamedTuple):
    """What one training step gives: the loss and whole gradients by name."""

    loss: Tensor
    gradients: dict[str, Tensor]


def sliced(model: nn.Module, place: World, **options: Any) -> SlicedModel:
    """Slice `model` by the plan that is found for it."""
    plan = plan_for(model, place.tp.size)
    return slice_model(model, plan, tp=place.tp, journal=place.journal, **options)


def step(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """One forward and backward."""
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def whole_step(model: nn.Module, batch: Mapping[str, Any]) -> Result:
    """Of a whole model."""
    loss = step(model, batch)
    return Result(loss, {name: each.grad for name, each in model.named_parameters()})


def sliced_step(
    model: nn.Module, done: SlicedModel, place: World, batch: Mapping[str, Any]
) -> Result:
    """Of a sliced one: gradients summed over the ranks that share them, and joined."""
    loss = step(model, batch)
    return Result(loss, joined(model, done, place, lambda parameter: parameter.grad))


def joined(
    model: nn.Module, done: SlicedModel, place: World, value: Callable[[nn.Parameter], Any]
) -> dict[str, Tensor]:
    """A value of each parameter, as of the whole model."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        mine = value(parameter)
        assert mine is not None, name
        everyone: list[Any] = [None] * place.tp.size
        dist.all_gather_object(everyone, (mine, done.partial.get(name, (place.tp.rank,))))
        sums = [sum(everyone[other][0] for other in sharers) for _, sharers in everyone]
        slicing = done.slicings.get(name)
        if slicing is None:
            # What is whole is alike everywhere, to the bit.
            assert all(torch.equal(each, sums[0]) for each in sums), name
        found[name] = sums[0] if slicing is None else slicing.join(sums)
    return found


def whole_values(model: nn.Module, done: SlicedModel, place: World) -> dict[str, Tensor]:
    """Values of the whole model's parameters."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        everyone: list[Any] = [None] * place.tp.size
        dist.all_gather_object(everyone, parameter.detach())
        slicing = done.slicings.get(name)
        found[name] = everyone[0] if slicing is None else slicing.join(everyone)
    return found


def assert_close(ours: Result, theirs: Result) -> None:
    """Loss and every gradient."""
    torch.testing.assert_close(ours.loss, theirs.loss, **SLICES_CHANGE_THE_ORDER)
    assert list(ours.gradients) == list(theirs.gradients)
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(
            gradient,
            theirs.gradients[name],
            **SLICES_CHANGE_THE_ORDER,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(
    kind: str,
    place: World,
    *,
    overrides: Mapping[str, Any],
    batch: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> SlicedModel:
    """A step of the sliced model is that of the whole one, on every rank."""
    batch = batch if batch is not None else global_batch(kind, 0)
    theirs = whole_step(lively(toy_model(kind, **overrides)), batch)
    model = lively(toy_model(kind, **overrides))
    done = sliced(model, place, **options)
    assert_close(sliced_step(model, done, place, batch), theirs)
    return done


def lively(model: nn.Module) -> nn.Module:
    """The model with no parameter at its initial zero or one, where faults would not show."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.train()
