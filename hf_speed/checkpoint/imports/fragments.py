"""Where DeepSpeed's ranks keep the parts of masters and moments.

Stages 1 and 2 flatten an optimizer group, and a rank holds one stretch of it. Parameters follow
each other in the order of `param_shapes`, with paddings between that the optimizer's file lists. It
lists their places as well (`param_slice_mappings`), but wrongly with `round_robin_gradients` (as of
DeepSpeed 0.19.8): so either account must agree with the weights that the model computed with.

Stage 3 divides each parameter by itself: of n elements, rank R of W holds ceil(n / W) from
R * ceil(n / W) on. A rank's shares of a sub-group follow each other in the order of `param_shapes`.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from hf_speed.checkpoint.imports.archive import StoredTensor
from hf_speed.checkpoint.imports.foreign import (
    ForeignTensor,
    Strip,
    Strips,
    hyperparameters,
    integer,
    mapping,
    number,
    plain_name,
    sequence,
    text,
)
from hf_speed.checkpoint.imports.pickles import Record
from hf_speed.errors import CheckpointError

FP32 = "fp32"
"""What a mapping of handles calls the masters."""

_COMPARED = 1024
"""Elements of a weight that are compared with its master."""

Flat = Mapping[str, StoredTensor]
"""What a rank has of a flattened group, by kind."""


class Part(NamedTuple):
    """Where a rank has a part of a parameter in its stretch of the flattened group."""

    rank: int
    start: int
    numel: int


class ModelStates(NamedTuple):
    """What the files of model states say.

    Attributes:
        where: the first of them, for messages.
        trees: by rank; one where ranks hold the same.
        shapes: of trained parameters, by optimizer (sub-)group.
        aliases: other names of tied weights -> first names.
    """

    where: str
    trees: tuple[Mapping[Any, Any], ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    aliases: Mapping[str, str]

    @property
    def first(self) -> Mapping[Any, Any]:
        """Of rank 0."""
        return self.trees[0]

    @property
    def config(self) -> Mapping[Any, Any]:
        """DeepSpeed's config, where it was saved as values."""
        found = self.first.get("ds_config")
        return found if isinstance(found, dict) else {}

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """What the model computed with, by name; at stage 3 there are none but placeholders."""
        return {
            plain_name(name): value
            for name, value in mapping(self.first.get("module"), "module", self.where).items()
            if isinstance(name, str) and isinstance(value, StoredTensor)
        }

    @property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all trained parameters."""
        return {name: shape for group in self.shapes for name, shape in group.items()}


class Fragments(NamedTuple):
    """Trained parameters by name and kind (FP32, "exp_avg", ...), and what goes with them."""

    tensors: Mapping[str, Mapping[str, ForeignTensor]]
    scalars: Mapping[str, Mapping[str, float]]
    groups: tuple[Mapping[str, Any], ...]


# ---- stages 1 and 2 ----


def flat_fragments(optims: list[Mapping[Any, Any]], states: ModelStates, where: str) -> Fragments:
    """Of stages 1 and 2.

    Args:
        optims: the optimizer's state of each rank.
        states: what the model's files say.
        where: the first rank's file, for messages.

    Raises:
        CheckpointError: the ranks' files do not fit each other, or the model's.
    """
    tensors: dict[str, dict[str, ForeignTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    base = optims[0].get("base_optimizer_state")
    for index, shapes in enumerate(states.shapes):
        flats: list[Flat] = [
            _flat_group(optim, optim.get("base_optimizer_state"), index, where) for optim in optims
        ]
        parts = _fitting_parts(optims, flats, index, states, where)
        counters = _counters(base, index, optims[0].get("base_optimizer_state_step"))
        for name, shape in shapes.items():
            tensors[name] = {
                kind: _join(shape, parts[name], flats, kind, f"{name} ({where})")
                for kind in flats[0]
            }
            scalars[name] = counters
    groups = tuple(hyperparameters(group) for group in _groups_of(base))
    return Fragments(tensors, scalars, groups)


def _join(
    shape: tuple[int, ...], parts: list[Part], flats: list[Flat], kind: str, what: str
) -> Strips:
    found = []
    for part in parts:
        source = flats[part.rank].get(kind)
        if source is None:
            raise CheckpointError(f"{what}: rank {part.rank} has no {kind}, rank 0 has.")
        found.append(Strip(source, part.start, part.numel))
    return Strips.join(shape, found, what=f"{kind} of {what}")


def _fitting_parts(
    optims: list[Mapping[Any, Any]],
    flats: list[Flat],
    index: int,
    states: ModelStates,
    where: str,
) -> dict[str, list[Part]]:
    """Where the parameters of a group lie: by the first account that agrees with the weights."""
    shapes, weights = states.shapes[index], states.weights
    for name, shape in shapes.items():
        if name in weights and weights[name].shape != shape:
            raise CheckpointError(
                f"{states.where}: {name} has shape {shape} in param_shapes, but its weight has "
                f"{weights[name].shape}."
            )
    problems = []
    for account in (_by_order, _by_mappings):
        try:
            parts = account(optims, flats, index, shapes, where)
            for name, shape in shapes.items():
                master = _join(shape, parts.get(name, []), flats, FP32, f"{name} ({where})")
                check_weight(name, master, states)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return parts
    raise CheckpointError(
        f"{where}: the masters of optimizer group {index} cannot be told apart. By the order of "
        f"param_shapes: {problems[0]} By param_slice_mappings: {problems[1]}"
    )


def _by_order(
    optims: list[Mapping[Any, Any]],
    flats: list[Flat],
    index: int,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, list[Part]]:
    """Parameters follow each other, each with its padding, over the stretches of all ranks."""
    stored = optims[0].get("param_alignment_paddings")
    paddings = [0] * len(shapes)
    if stored is not None:
        lists = sequence(stored, "param_alignment_paddings", where)
        given = sequence(lists[index] if index < len(lists) else [], "the paddings", where)
        if len(given) != len(shapes) or any(integer(padding) is None for padding in given):
            raise CheckpointError(f"{where}: param_alignment_paddings are not of its parameters.")
        paddings = given
    borders = [0]
    for flat in flats:
        borders.append(borders[-1] + flat[FP32].numel)
    found: dict[str, list[Part]] = {}
    begin = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        end = begin + prod(shape)
        found[name] = [
            Part(rank, max(begin, first) - first, min(end, last) - max(begin, first))
            for rank, (first, last) in enumerate(pairwise(borders))
            if max(begin, first) < min(end, last)
        ]
        begin = end + padding
    return found


def _by_mappings(
    optims: list[Mapping[Any, Any]],
    _flats: list[Flat],
    index: int,
    _shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, list[Part]]:
    """As DeepSpeed writes it down, which is not right where it deals parameters round robin."""
    found: dict[str, list[Part]] = {}
    for rank, optim in enumerate(optims):
        groups = sequence(optim.get("param_slice_mappings"), "param_slice_mappings", where)
        group = groups[index] if index < len(groups) else {}
        for name, address in mapping(group, "param_slice_mappings", where).items():
            start, numel = _address(address, where)
            plain = plain_name(text(name, "a parameter", where))
            found.setdefault(plain, []).append(Part(rank, start, numel))
    return found


def check_weight(name: str, master: Strips, states: ModelStates) -> None:
    """Compare the first elements of a master with those of the weight that computed.

    Raises:
        CheckpointError: they differ.
    """
    weight = states.weights.get(name)
    if weight is None or weight.shape != master.shape:
        return
    here = weight.read_flat(0, min(weight.numel, _COMPARED))
    if not torch.equal(master.head(here.numel()).to(here.dtype), here):
        raise CheckpointError(
            f"The master of {name} is not its weight in {states.where}: one of them is under "
            f"another's name, as after a conversion of a run with round_robin_gradients."
        )


def _flat_group(
    optim: Mapping[Any, Any], base: object, index: int, where: str
) -> dict[str, StoredTensor]:
    """A rank's stretch of one group: masters and moments."""
    masters = sequence(
        optim.get("single_partition_of_fp32_groups"), "single_partition_of_fp32_groups", where
    )
    if index >= len(masters) or not isinstance(masters[index], StoredTensor):
        raise CheckpointError(f"{where} has no masters of optimizer group {index}.")
    master = masters[index]
    found = {FP32: master}
    for kind, value in _state_of(base, index).items():
        if isinstance(value, StoredTensor) and value.shape:
            found[text(kind, "a moment", where)] = value
    return found


def _state_of(base: object, index: int) -> Mapping[Any, Any]:
    """What the optimizer keeps of group `index`, which it sees as one parameter."""
    if isinstance(base, (list, tuple)):  # An elastic checkpoint.
        found = base[index] if index < len(base) else {}
    elif isinstance(base, dict):
        groups, states = base.get("param_groups"), base.get("state")
        numbers = groups[index].get("params") if groups and index < len(groups) else None
        key = numbers[0] if numbers else index
        found = states.get(key, {}) if isinstance(states, dict) else {}
    else:
        found = {}
    return found if isinstance(found, dict) else {}


def _groups_of(base: object) -> list[Mapping[str, Any]]:
    found = base.get("param_groups") if isinstance(base, dict) else None
    return [group for group in found or () if isinstance(group, dict)]


def _counters(base: object, index: int, step: object) -> dict[str, float]:
    """Counters of a group; some optimizers keep the step in the group's settings."""
    found = {
        kind: float(value)
        for kind, stored in _state_of(base, index).items()
        if isinstance(kind, str) and (value := number(_scalar(stored))) is not None
    }
    groups = _groups_of(base)
    if "step" not in found:
        in_group = groups[index].get("step") if index < len(groups) else None
        taken = number(in_group if in_group is not None else step)
        if taken is not None:
            found["step"] = taken
    return found


def _scalar(value: object) -> object:
    """Moments are no counters, even those of one element."""
    return None if isinstance(value, StoredTensor) and value.shape else value


def _address(address: object, where: str) -> tuple[int, int]:
    fields = address.fields if isinstance(address, Record) else {}
    start, numel = integer(fields.get("start")), integer(fields.get("numel"))
    if start is None or numel is None:
        raise CheckpointError(f"{where}: an entry of param_slice_mappings has no place.")
    return start, numel


# ---- stage 3 ----


def stage_3_fragments(
    optims: list[Mapping[Any, Any]], states: ModelStates, where: str
) -> Fragments:
    """Of stage 3; arguments and errors as for `flat_fragments`."""
    if optims[0].get("ds_zero_partition_groups") is not None:
        raise CheckpointError(
            f"{where} divides experts over ranks of their own, which is not read here. Convert it "
            f"with DeepSpeed's ds_to_universal, and import that."
        )
    tensors: dict[str, dict[str, ForeignTensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    bases = [mapping(optim.get("optimizer_state_dict"), "the state", where) for optim in optims]
    masters = [
        sequence(optim.get("fp32_flat_groups"), "fp32_flat_groups", where) for optim in optims
    ]
    for index, shapes in enumerate(states.shapes):
        flats = [
            _sub_group(mine, base, index, where) for mine, base in zip(masters, bases, strict=True)
        ]
        counters = _counters_of_sub_group(bases[0], index)
        begin = 0
        for name, shape in shapes.items():
            share = -(-prod(shape) // len(optims))
            tensors[name] = {
                kind: Strips.join(
                    shape,
                    [
                        Strip(flat[kind], begin, min(share, max(0, prod(shape) - rank * share)))
                        for rank, flat in enumerate(flats)
                        if kind in flat
                    ],
                    what=f"{kind} of {name} ({where})",
                )
                for kind in flats[0]
            }
            scalars[name] = counters
            begin += share
    groups = tuple(hyperparameters(group) for group in _groups_of(bases[0]))
    return Fragments(tensors, scalars, groups)


def _sub_group(
    masters: list[Any], base: Mapping[Any, Any], index: int, where: str
) -> dict[str, StoredTensor]:
    """A rank's shares of one sub-group: masters and moments."""
    if index >= len(masters) or not isinstance(masters[index], StoredTensor):
        raise CheckpointError(f"{where} has no masters of sub-group {index}.")
    state = mapping(base.get("state"), "the state", where).get(index, {})
    moments = {
        text(kind, "a moment", where): value
        for kind, value in mapping(state, "the state of a sub-group", where).items()
        if isinstance(value, StoredTensor) and value.shape
    }
    return {FP32: masters[index], **moments}


def _counters_of_sub_group(base: Mapping[Any, Any], index: int) -> dict[str, float]:
    state = (base.get("state") or {}).get(index, {})
    found = {
        kind: value
        for kind, stored in state.items()
        if isinstance(kind, str) and (value := number(_scalar(stored))) is not None
    }
    if "step" not in found:
        for group in _groups_of(base):
            taken = number(group.get("step"))
            if taken is not None and index in (group.get("params") or ()):
                found["step"] = taken
    return found
