"""How a Transformers model is divided over tensor-parallel ranks.

From its config, or from its structure:

    styles      config.base_model_tp_plan says which linears are columns and which rows
    structure   where there is none (GPT-2, BERT): names and shapes of the linears of a block
    groups      columns and the row behind them: an attention or an MLP
    rules       whole heads to each rank, with the sizes checked; embedding and head by vocabulary

A plan found from the structure is a good guess: `verify` (slice_verify.py) tries it.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from hf_speed.errors import ConfigError
from hf_speed.integrations.transformers.slice_groups import (
    Group,
    GroupRules,
    UnworkableError,
    attention_or_mlp,
    block_of,
)
from hf_speed.integrations.transformers.slice_structure import groups_from_structure, norms_of_heads
from hf_speed.nn.sliced import (
    Region,
    Rule,
    SlicePlan,
    Span,
    VocabEmbedding,
    VocabHead,
    features,
    nearest,
)
from hf_speed.nn.sliced.layers import embedding_reason, is_linear, linear_sizes
from hf_speed.nn.sliced.plan import Loss

COLUMNS = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}
"""Style -> the outputs are gathered. Those named _rep are of earlier versions."""
ROWS = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}
"""Style -> the input arrives whole."""
WHOLE = ("replicate",)
PARTIAL = ("replicated_with_grad_allreduce",)


def plan_for(model: nn.Module, num_ranks: int, *, sliced_loss: bool = True) -> SlicePlan:
    """The plan by which `model` is divided over `num_ranks` tensor-parallel ranks.

    Args:
        model: a Transformers model, whole; on `meta`, or with its values, which are not read.
        num_ranks: mesh.tp.
        sliced_loss: compute the training loss from slices of the logits where the model's loss is
            transformers' own for causal or masked language models; False gathers logits always.

    Raises:
        ConfigError: the model has no plan and none is found, or one with a style that is not
            handled (experts, latent attention), or the heads or features do not go into
            `num_ranks`: then with the nearest number that works.
    """
    finder = _Finder(model, sliced_loss=sliced_loss)
    try:
        return finder.plan(num_ranks)
    except UnworkableError as error:
        best = nearest(num_ranks, finder.works)
        raise ConfigError(
            f"mesh.tp={num_ranks} does not fit {type(model).__name__}: {error}. The nearest "
            f"mesh.tp that does is {best}."
        ) from None


class _Styles(NamedTuple):
    """What a plan of styles says of a model's modules."""

    groups: list[Group]
    partial: list[str]
    whole: set[str]


class _Finder:
    """Finds groups once, makes plans for any number of ranks."""

    def __init__(self, model: nn.Module, *, sliced_loss: bool) -> None:
        self._model: Any = model
        self._name = type(model).__name__
        styles = dict(getattr(model, "tp_plan", None) or {})
        self._from_config = any(style in ROWS for style in styles.values())
        if self._from_config:
            self._styles = _read_styles(model, styles)
        else:
            self._styles = _Styles(groups_from_structure(model), [], set())
        if self._from_config and not self._styles.groups:
            raise ConfigError(
                f"{self._name} has none of the modules that its base_model_tp_plan names "
                f"({', '.join(list(styles)[:3])}, ...): it was changed or wrapped after it was "
                f"made. Divide the model itself, without adapters, or set mesh.tp: 1."
            )
        if not self._styles.groups:
            raise ConfigError(
                f"{self._name} cannot be divided for mesh.tp > 1: its config has no "
                f"base_model_tp_plan, and no attention or MLP was found among its modules (linears "
                f"named query, key and value, or fused ones, with an output projection behind "
                f"them). Set mesh.tp: 1."
            )
        self._loss = _loss_kind(model) if sliced_loss else None

    def works(self, num_ranks: int) -> bool:
        """Whether there is a plan for so many ranks."""
        try:
            self.plan(num_ranks)
        except UnworkableError:
            return False
        return True

    def plan(self, num_ranks: int) -> SlicePlan:
        """The plan; UnworkableError where something does not divide."""
        rules: dict[str, Rule] = {}
        regions: list[Region] = []
        for group in self._styles.groups:
            made: GroupRules = attention_or_mlp(self._model, group, num_ranks)
            rules.update(made.rules)
            regions.append(made.region)
        rules = {**self._words(num_ranks), **rules}
        # Not every plan that needs it says so.
        norms = norms_of_heads(self._model, regions)
        partial = dict.fromkeys([*self._styles.partial, *norms])
        return SlicePlan(
            model=self._name,
            source="base_model_tp_plan" if self._from_config else "structure",
            num_ranks=num_ranks,
            rules=rules,
            regions=tuple(regions),
            partial=tuple(partial),
            span=_span(self._model, regions),
        )

    def _words(self, num_ranks: int) -> dict[str, Rule]:
        """Rules of the embedding and the head: both if they are tied, none if others share them."""
        paths = {id(module): path for path, module in self._model.named_modules()}
        embedding, head = _embeddings(self._model)
        found: dict[str, Rule] = {}
        if embedding is not None and embedding_reason(embedding) is None:
            slicing = features(embedding.weight.shape[0], num_ranks)
            found[paths[id(embedding)]] = VocabEmbedding(slicing)
        if head is not None and is_linear(head) and id(head) in paths:
            slicing = features(linear_sizes(head)[1], num_ranks)
            found[paths[id(head)]] = VocabHead(slicing, self._loss)
        found = {path: rule for path, rule in found.items() if path not in self._styles.whole}
        shared = _held_elsewhere(self._model, found)
        found = {path: rule for path, rule in found.items() if path not in shared}
        for path, rule in found.items():
            if rule.slicing.size < num_ranks:
                raise UnworkableError(f"{path} has {rule.slicing.size} words, fewer than ranks")
        return found


def _read_styles(model: nn.Module, styles: Mapping[str, str]) -> _Styles:
    """Sort the modules that a plan of styles names.

    Raises:
        ConfigError: a style, or what it is put on, is not handled.
    """
    columns: dict[str, bool] = {}
    rows: dict[str, bool] = {}
    partial: list[str] = []
    whole: set[str] = set()
    embedding = _embeddings(model)
    for path, module in _named_places(model):
        style = styles.get(_generic(path))
        if style is None or any(module is each for each in embedding if each is not None):
            if style in WHOLE:
                whole.add(path)
            continue
        if style in PARTIAL and isinstance(module, nn.Module):
            partial.append(path)
        elif style in COLUMNS and isinstance(module, nn.Module) and is_linear(module):
            columns[path] = COLUMNS[style]
        elif style in ROWS and isinstance(module, nn.Module) and is_linear(module):
            rows[path] = ROWS[style]
        elif style not in WHOLE:
            raise ConfigError(
                f"{type(model).__name__} cannot be divided for mesh.tp > 1: its plan puts the "
                f"style {style!r} on {path}, a {type(module).__qualname__} of "
                f"{type(module).__module__}, and only plain linears and norms of heads are handled "
                f"({', '.join((*COLUMNS, *ROWS, *PARTIAL))}). Set mesh.tp: 1."
            )
    return _Styles(_groups(model, columns, rows), partial, whole)


def _named_places(model: nn.Module) -> Iterable[tuple[str, nn.Module | nn.Parameter]]:
    """Every module and every parameter by its path: plans name both."""
    yield from model.named_modules()
    yield from model.named_parameters()


def _generic(path: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`, as plans name it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _groups(model: nn.Module, columns: Mapping[str, bool], rows: Mapping[str, bool]) -> list[Group]:
    """Put each row together with the columns before it: those under the same module.

    Where no module has both, the one around it is asked, up to the block.
    """
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    holders = {path: path.rpartition(".")[0] for path in (*columns, *rows)}
    found: list[Group] = []
    while holders:
        by_holder: dict[str, list[str]] = {}
        for path, holder in holders.items():
            by_holder.setdefault(holder, []).append(path)
        moved = False
        for holder, paths in by_holder.items():
            mine = [path for path in paths if path in columns]
            ends = [path for path in paths if path in rows]
            if (mine and ends) or holder in ("", block_of(holder)):
                found += _pair(mine, ends, columns, rows, type(model).__name__)
                for path in paths:
                    del holders[path]
            else:
                holders.update((path, holder.rpartition(".")[0]) for path in paths)
                moved = True
        if not moved:
            break
    return sorted(found, key=lambda group: order[group.columns[0]])


def _pair(
    mine: Sequence[str],
    ends: Sequence[str],
    columns: Mapping[str, bool],
    rows: Mapping[str, bool],
    model: str,
) -> list[Group]:
    """Groups of the columns and rows under one module."""
    if len(ends) == 1 and mine:
        gathers = {path: columns[path] for path in mine}
        return [Group(tuple(mine), ends[0], gathers, splits=rows[ends[0]])]
    if not ends and all(columns[path] for path in mine):
        # Each gathers for itself: what follows is whole.
        return [Group((path,), None, {path: True}, splits=False) for path in mine]
    raise ConfigError(
        f"{model} cannot be divided for mesh.tp > 1: its plan has the columns {list(mine)} and "
        f"the rows {list(ends)} in one module, and which belong together is not clear. Set "
        f"mesh.tp: 1."
    )


def _embeddings(model: Any) -> tuple[Any, nn.Module | None]:
    """The input embedding and the output head, each None where the model has none."""
    found: list[nn.Module | None] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]


def _held_elsewhere(model: nn.Module, rules: Mapping[str, Rule]) -> set[str]:
    """Of `rules`, the modules whose weight another module reads too, and what is tied to those."""
    weights = {path: model.get_submodule(path)._parameters["weight"] for path in rules}
    outside = {
        id(parameter)
        for path, module in model.named_modules()
        if path not in rules
        for key, parameter in module._parameters.items()
        if parameter is not None and key != "bias"
    }
    return {path for path, weight in weights.items() if id(weight) in outside}


def _span(model: nn.Module, regions: Sequence[Region]) -> Span | None:
    """The blocks that hold all regions, if they are the members of one list."""
    stacks = {block_of(region.entry).rpartition(".")[0] for region in regions}
    if len(stacks) != 1:
        return None
    stack = stacks.pop()
    names = [name for name, _ in model.get_submodule(stack).named_children()]
    if not stack or not names or not all(name.isdigit() for name in names):
        return None
    return Span(f"{stack}.{names[0]}", f"{stack}.{names[-1]}")


def _loss_kind(model: Any) -> Loss | None:
    """How the model makes a loss of logits, if by `loss_function` and if that is a usual one."""
    code: Any = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return None
    if model.loss_function is ForCausalLMLoss:
        return "causal"
    return "masked" if model.loss_function is ForMaskedLMLoss else None


def meta_plan(model_class: type[nn.Module], config: Any, num_ranks: int) -> SlicePlan:
    """The plan of a model that was never made, for planning."""
    with torch.device("meta"):
        return plan_for(model_class(config), num_ranks)
