"""Attentions and MLPs of a model without a plan, found by names and shapes of its linears.

In a block (a member of a list of modules) linears come in the order in which they were defined:

    queries, keys, values, or one fused linear     then the projection of the heads' outputs
    hidden -> inner, once or twice                 then inner -> hidden

Linears that fit neither stay whole on every rank, which is always right.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from hf_speed.integrations.transformers.slice_groups import (
    FUSED_HEADS,
    FUSED_PARTS,
    KEYS,
    QUERIES,
    VALUES,
    Group,
    block_of,
    role,
)
from hf_speed.nn.sliced.layers import is_linear, linear_sizes
from hf_speed.nn.sliced.plan import Region


class _Linear(NamedTuple):
    path: str
    inputs: int
    outputs: int


def groups_from_structure(model: nn.Module) -> list[Group]:
    """The attentions and MLPs of all blocks, in definition order; empty if there are none."""
    blocks: dict[str, list[_Linear]] = {}
    for path, module in model.named_modules():
        block = block_of(path)
        if block and is_linear(module):
            blocks.setdefault(block, []).append(_Linear(path, *linear_sizes(module)))
    found: list[Group] = []
    for linears in blocks.values():
        found += _groups_of_block(linears)
    return found


def _groups_of_block(linears: Sequence[_Linear]) -> list[Group]:
    found: list[Group] = []
    rest = list(linears)
    while rest:
        columns, row = _attention(rest) or _mlp(rest) or ([], None)
        if row is None:
            rest.pop(0)
            continue
        paths = tuple(each.path for each in columns)
        found.append(Group(paths, row.path, dict.fromkeys(paths, False)))
        rest = rest[rest.index(row) + 1 :]
    return found


def _attention(rest: Sequence[_Linear]) -> tuple[list[_Linear], _Linear] | None:
    """An attention that begins with the first linear."""
    if role(rest[0].path) in (*FUSED_PARTS, *FUSED_HEADS):
        columns = [rest[0]]
    else:
        columns = list(rest[:3])
        roles: Mapping[str, int] = {_kind(each): 1 for each in columns}
        if set(roles) != {"query", "key", "value"}:
            return None
    row = next(iter(rest[len(columns) :]), None)
    fits = row is not None and row.outputs == columns[0].inputs
    return (columns, row) if row is not None and fits else None


def _kind(linear: _Linear) -> str:
    name = role(linear.path)
    kinds = {"query": QUERIES, "key": KEYS, "value": VALUES}
    return next((kind for kind, names in kinds.items() if name in names), name)


def _mlp(rest: Sequence[_Linear]) -> tuple[list[_Linear], _Linear] | None:
    """An MLP that begins with the first linear."""
    hidden, inner = rest[0].inputs, rest[0].outputs
    columns = [each for each in rest[:2] if (each.inputs, each.outputs) == (hidden, inner)]
    if len(columns) == 2 and columns[1] is not rest[1]:
        columns = columns[:1]
    row = next(iter(rest[len(columns) :]), None)
    if row is None or row.outputs != hidden or row.inputs not in (inner, inner // 2):
        return None
    # Square linears say nothing of what they are.
    return None if inner == hidden else (columns, row)


def norms_of_heads(model: nn.Module, regions: Sequence[Region]) -> list[str]:
    """Modules inside of an attention with a value for each feature of a head: they see its heads.

    For example norms of queries and keys.
    """
    found: list[str] = []
    for region in regions:
        if region.heads is None or region.row is None:
            continue
        width = linear_sizes(model.get_submodule(region.row))[0] // region.heads.num_heads
        for path, module in model.get_submodule(region.entry).named_modules():
            shapes = {tuple(each.shape) for each in module.parameters(recurse=False)}
            if shapes == {(width,)} and not is_linear(module):
                found.append(f"{region.entry}.{path}")
    return found
