"""Rules for one attention or MLP of a model: which features of which linear go to which rank."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_speed.errors import ConfigError
from hf_speed.nn.sliced import Column, Heads, Region, Row, Rule, can_deal, deal_heads, features
from hf_speed.nn.sliced.heads import GROUPS, HEADS, KV_HEADS
from hf_speed.nn.sliced.layers import is_linear, linear_sizes
from hf_speed.nn.sliced.model import common_path
from hf_speed.shard.slicing import Slicing

QUERIES = ("q_proj", "query", "q_lin", "query_proj", "q", "wq", "q_b_proj", "to_q")
KEYS = ("k_proj", "key", "k_lin", "key_proj", "k", "wk", "to_k")
VALUES = ("v_proj", "value", "v_lin", "value_proj", "v", "wv", "to_v")
FUSED_PARTS = ("c_attn", "qkv_proj", "qkv", "Wqkv", "W_pack", "in_proj_qkv")
"""Queries, then keys, then values."""
FUSED_HEADS = ("query_key_value",)
"""Head by head: its query, key and value; with fewer key-value heads, group by group."""
FUSED_HALVES = ("gate_up_proj", "Wi", "fc1_glu")
"""Gates, then ups."""


class UnworkableError(ConfigError):
    """Something does not go into so many ranks; it may into others."""


class Group(NamedTuple):
    """Linears of one attention or MLP.

    Attributes:
        columns: paths of the first linears.
        row: of the last; None where each column gathers for itself.
        gathers: column -> its outputs are gathered.
        splits: the row takes a whole input.
    """

    columns: tuple[str, ...]
    row: str | None
    gathers: Mapping[str, bool]
    splits: bool = False


class GroupRules(NamedTuple):
    """What becomes of a group."""

    rules: dict[str, Rule]
    region: Region


def block_of(path: str) -> str:
    """The path up to its last number: the member of a list that holds it; "" if there is none."""
    found = re.match(r"(.*\.\d+)(?:\.|$)", path)
    return found.group(1) if found else ""


def role(path: str) -> str:
    """The name of a linear, without a wrapper's `linear` behind it."""
    names = [name for name in path.split(".") if name not in ("linear", "base_layer")]
    return names[-1]


def is_attention(columns: Sequence[str]) -> bool:
    """Whether linears of these paths make queries, keys and values."""
    return any(role(path) in (*QUERIES, *FUSED_PARTS, *FUSED_HEADS) for path in columns)


def attention_or_mlp(model: nn.Module, group: Group, num_ranks: int) -> GroupRules:
    """Rules and region of a group.

    Raises:
        UnworkableError: heads or features do not go into `num_ranks`.
        ConfigError: sizes that do not fit each other.
    """
    group = _without_gathers(group)
    entry = entry_of(model, group.columns)
    if any(group.gathers.values()):
        return _gathered(model, group, entry, num_ranks)
    if group.row is None:
        raise ConfigError(f"{group.columns} are columns without a row behind them.")
    if is_attention(group.columns):
        return _attention(model, group, entry, num_ranks)
    return _mlp(model, group, entry, num_ranks)


def _without_gathers(group: Group) -> Group:
    """Fused linears that plans gather, since they cannot cut their parts, are cut part by part."""
    fused = all(role(path) in (*FUSED_PARTS, *FUSED_HALVES) for path in group.columns)
    if group.row is None or not fused:
        return group
    return group._replace(gathers=dict.fromkeys(group.columns, False), splits=False)


def entry_of(model: nn.Module, columns: Sequence[str]) -> str:
    """The module whose input all columns take: the innermost that holds them, within the block."""
    if len(columns) > 1:
        return common_path(columns)
    holder = columns[0].rpartition(".")[0]
    inside = sum(is_linear(module) for module in model.get_submodule(holder).modules())
    # A block with all its linears is not one column's own module.
    return columns[0] if holder == block_of(columns[0]) or inside > 2 else holder


def _gathered(model: nn.Module, group: Group, entry: str, num_ranks: int) -> GroupRules:
    """What is between columns and row is computed whole by every rank."""
    rules: dict[str, Rule] = {}
    for path in group.columns:
        size = linear_sizes(model.get_submodule(path))[1]
        rules[path] = Column(_features(path, size, num_ranks), gather=group.gathers[path])
    if group.row is not None:
        size = linear_sizes(model.get_submodule(group.row))[0]
        rules[group.row] = Row(_features(group.row, size, num_ranks), split=group.splits)
    return GroupRules(rules, Region(entry, group.columns, group.row))


def _mlp(model: nn.Module, group: Group, entry: str, num_ranks: int) -> GroupRules:
    row = str(group.row)
    inner = linear_sizes(model.get_submodule(row))[0]
    slicing = _features(row, inner, num_ranks)
    rules: dict[str, Rule] = {}
    for path in group.columns:
        size = linear_sizes(model.get_submodule(path))[1]
        if size == inner:
            rules[path] = Column(slicing)
        elif size == 2 * inner:
            rules[path] = Column(Slicing.fused([slicing, slicing]))
        else:
            raise ConfigError(
                f"{path} has {size} output features and {row} behind it {inner} inputs: how one "
                f"follows from the other is not known, so they cannot be divided. Set mesh.tp: 1."
            )
    rules[row] = Row(slicing)
    return GroupRules(rules, Region(entry, group.columns, row))


def _attention(model: nn.Module, group: Group, entry: str, num_ranks: int) -> GroupRules:
    row = str(group.row)
    inner = linear_sizes(model.get_submodule(row))[0]
    num_heads, num_kv_heads = head_counts(model, entry, group.columns, inner)
    if not can_deal(num_heads, num_kv_heads, num_ranks):
        raise UnworkableError(
            f"{entry} has {num_heads} heads, {num_kv_heads} of keys and values; every rank needs "
            f"a whole head, and fewer key-value heads than ranks must divide the ranks"
        )
    heads = deal_heads(num_heads, num_kv_heads, num_ranks)
    rules: dict[str, Rule] = {
        path: Column(_column_of_heads(model, path, heads, inner)) for path in group.columns
    }
    rules[row] = Row(heads.queries(inner // num_heads))
    return GroupRules(rules, Region(entry, group.columns, row, heads))


def _column_of_heads(model: nn.Module, path: str, heads: Heads, inner: int) -> Slicing:
    size = linear_sizes(model.get_submodule(path))[1]
    name = role(path)
    if name in (*KEYS, *VALUES):
        return heads.keys(_width(path, size, heads.num_kv_heads, "key-value heads"))
    if name not in (*FUSED_PARTS, *FUSED_HEADS):
        return heads.queries(_width(path, size, heads.num_heads, "heads"))
    width = inner // heads.num_heads
    per_group = heads.num_heads // heads.num_kv_heads + 2
    if size != per_group * heads.num_kv_heads * width:
        raise ConfigError(
            f"{path} has {size} output features, which are not the queries of {heads.num_heads} "
            f"heads and the keys and values of {heads.num_kv_heads}, {width} each. Set mesh.tp: 1."
        )
    if heads.copies > 1:
        raise UnworkableError(
            f"{path} holds the keys and values of {heads.num_kv_heads} heads in one weight with "
            f"the queries, so no two ranks can share them"
        )
    if name in FUSED_HEADS:
        return heads.keys(per_group * width)
    return Slicing.fused([heads.queries(width), heads.keys(width), heads.keys(width)])


def head_counts(
    model: nn.Module, entry: str, columns: Sequence[str], inner: int
) -> tuple[int, int]:
    """(heads, key-value heads) of an attention.

    As it keeps them itself; else heads as its config has them, key-value heads as the sizes of its
    linears say.

    Args:
        model: the model.
        entry: path of the attention.
        columns: paths of its column linears.
        inner: features of all its heads' outputs.

    Raises:
        ConfigError: it does not say how many heads it has, or they do not divide its features.
    """
    module = model.get_submodule(entry)
    config: Any = vars(module).get("config") or getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = _own(module, HEADS) or getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        raise ConfigError(
            f"{entry} does not say how many heads it has ({', '.join(HEADS)}, or "
            f"num_attention_heads in the config), so it cannot be divided. Set mesh.tp: 1."
        )
    width = _width(entry, inner, num_heads, "heads")
    num_kv_heads = _own(module, KV_HEADS)
    if num_kv_heads is None and (groups := _own(module, GROUPS)):
        num_kv_heads = num_heads // groups
    for path in columns:
        size = linear_sizes(model.get_submodule(path))[1]
        if num_kv_heads is None and role(path) in KEYS:
            num_kv_heads = _width(path, size, width, "features of a head")
        elif num_kv_heads is None and role(path) in (*FUSED_PARTS, *FUSED_HEADS):
            num_kv_heads = (_width(path, size, width, "features of a head") - num_heads) // 2
    return num_heads, num_kv_heads or num_heads


def _own(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (vars(module).get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _width(path: str, size: int, count: int, what: str) -> int:
    width, rest = divmod(size, count)
    if rest:
        raise ConfigError(
            f"{path} has {size} features, which are not a multiple of its {count} {what}, so "
            f"whole heads cannot be dealt out. Set mesh.tp: 1."
        )
    return width


def _features(path: str, size: int, num_ranks: int) -> Slicing:
    if size < num_ranks:
        raise UnworkableError(f"{path} has {size} features to divide, fewer than ranks")
    return features(size, num_ranks)
