"""Slicing a model in place, and putting it together again.

    slice_model    each rule: cut the parameters' values, put the sliced forward before the module's
                   own; each attention: this rank's head counts; then hooks and the loss
    undo           everything back, with whole values from the caller

Modules and parameters stay the same objects under the same names. A parameter's `.data` becomes
what this rank holds of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from hf_speed.errors import ConfigError
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.journal import Journal
from hf_speed.nn.deferred import Queue
from hf_speed.nn.sliced import layers
from hf_speed.nn.sliced.checks import check_plan
from hf_speed.nn.sliced.exchange import Peers
from hf_speed.nn.sliced.heads import localise
from hf_speed.nn.sliced.hooks import ModelHooks
from hf_speed.nn.sliced.layers import HeadState, LinearState, LogitsSwitch, WordsState
from hf_speed.nn.sliced.loss import SlicedLoss, Words
from hf_speed.nn.sliced.plan import (
    Column,
    Region,
    Row,
    Rule,
    SlicePlan,
    Span,
    VocabEmbedding,
    VocabHead,
)
from hf_speed.nn.sliced.regions import Rows, SlicedRegion
from hf_speed.shard.slicing import Slicing


def slice_model(
    model: nn.Module,
    plan: SlicePlan,
    *,
    tp: AxisGroup,
    journal: Journal,
    sequence_parallel: bool = False,
) -> "SlicedModel":
    """Divide `model` over the ranks of `tp`, in place. Sends nothing.

    Args:
        model: whole, the same on every rank; on `meta`, or with its values.
        plan: made for this model and this number of ranks.
        tp: the ranks.
        journal: of the run.
        sequence_parallel: divide hidden states between regions by rows (arXiv:2205.05198).

    Raises:
        ConfigError: the plan does not fit the model or the ranks.
    """
    check_plan(model, plan, tp.size)
    if sequence_parallel and plan.span is None:
        raise ConfigError(
            f"tensor.sequence_parallel needs one row of blocks, between which hidden states are "
            f"divided; {plan.model} has none, or several. Set tensor.sequence_parallel: false."
        )
    return SlicedModel(model, plan, Peers(tp, journal), sequence_parallel=sequence_parallel)


class SlicedModel:
    """What `slice_model` has done to a model.

    Attributes:
        slicings: parameter name -> how it is divided; names of `model.named_parameters()`.
        partial: parameter name -> the ranks of `tp` over which its gradient is to be summed:
            key-value heads that several ranks hold, norms that see only this rank's heads, and what
            works on this rank's rows only. Nothing here sums them.
    """

    def __init__(
        self, model: nn.Module, plan: SlicePlan, peers: Peers, *, sequence_parallel: bool
    ) -> None:
        self.plan = plan
        self.slicings: dict[str, Slicing] = {}
        self.partial: dict[str, tuple[int, ...]] = {}
        self._model = model
        self._peers = peers
        self._switch = LogitsSwitch()
        self._undo: list[Callable[[], None]] = []
        self._names = {id(each): name for name, each in model.named_parameters()}
        blocks = span_blocks(model, plan.span) if plan.span is not None else []
        scope = (module for block in blocks for module in block.modules())
        self._rows = Rows(peers, scope) if sequence_parallel else None
        self._regions: list[SlicedRegion] = []
        entries: list[tuple[nn.Module, SlicedRegion]] = []
        for region in plan.regions:
            entries.append((model.get_submodule(region.entry), self._slice_region(region)))
            self._set_heads(region)
        words = self._slice_words()
        self._note_partial(blocks if sequence_parallel else ())
        self._hooks = ModelHooks(model, self._switch, self._regions, self._rows, words, peers)
        if self._rows is not None and plan.span is not None:
            self._hooks.enter_rows(entries)
            first, last = plan.span
            self.divide_between((model.get_submodule(first), model.get_submodule(last)))

    def divide_between(self, *ends: tuple[nn.Module, nn.Module]) -> None:
        """With sequence parallelism: where hidden states are divided, instead of the whole span.

        Args:
            *ends: first and last block of each stretch of blocks. What goes into the first and what
                comes out of the last is whole: a pipeline rank gives those of each of its stages.
        """
        self._hooks.divide_between(*ends)

    def defer_to(self, queue: Queue | None) -> None:
        """Put the weight gradients of all sliced linears in `queue`; None computes them as before.

        For schedules that compute them later (arXiv:2401.10241): then only input gradients travel
        in the backward, with nothing else to do meanwhile.
        """
        for region in self._regions:
            region.sink = queue

    def undo(self, whole: Callable[[str], Tensor]) -> None:
        """Make the model whole again: classes, attributes, hooks, loss and values.

        Args:
            whole: gives the whole values of a parameter by its name, in the shape it had; the
                parameter takes the tensor itself.
        """
        self._hooks.remove()
        while self._undo:
            self._undo.pop()()
        parameters = dict(self._model.named_parameters())
        for name in self.slicings:
            parameter = parameters[name]
            parameter.data = whole(name)
            parameter.grad = None
        self.slicings.clear()
        self.partial.clear()

    def _slice_region(self, region: Region) -> SlicedRegion:
        rules = {path: self.plan.rules[path] for path in region.columns}
        leaves: list[tuple[nn.Module, tuple[str, ...]]] = [
            (self._model.get_submodule(path), ("weight", "bias")) for path in rules
        ]
        inside = region.entry
        if region.row is not None:
            leaves.append((self._model.get_submodule(region.row), ("weight",)))
            inside = common_path([region.entry, region.row])
        gathers = all(isinstance(rule, Column) and rule.gather for rule in rules.values())
        # Elsewhere the random numbers of all ranks, or those of the rows, go on.
        differs = self._rows is None and not gathers
        scope = self._model.get_submodule(inside).modules() if differs else ()
        entry = self._model.get_submodule(region.entry)
        made = SlicedRegion(self._peers, entry, leaves, scope=scope, rows=self._rows)
        self._regions.append(made)
        for path in (*rules, *([region.row] if region.row is not None else [])):
            module, rule = self._model.get_submodule(path), self.plan.rules[path]
            if not isinstance(rule, (Column, Row)):
                raise ConfigError(f"{path} is in a region, but its rule is {rule}.")
            state = LinearState(
                made,
                lengths_of(rule.slicing),
                layers.is_transposed(module),
                exchanges=rule.gather if isinstance(rule, Column) else rule.split,
                ends_region=region.row is None,
            )
            ahead = layers.ColumnLinear if isinstance(rule, Column) else layers.RowLinear
            self._replace(path, module, ahead, state)
        return made

    def _slice_words(self) -> Words | None:
        """Embeddings and the head; returns this rank's words where the loss works on slices."""
        found = None
        for path, rule in self.plan.rules.items():
            if not isinstance(rule, (VocabEmbedding, VocabHead)):
                continue
            module = self._model.get_submodule(path)
            lengths, rank = lengths_of(rule.slicing), self._peers.rank
            start, count = sum(lengths[:rank]), lengths[rank]
            if isinstance(rule, VocabEmbedding):
                state = WordsState(self._peers, start, count)
                self._replace(path, module, layers.VocabEmbedding, state)
                self._set_padding(module, start, count)
                continue
            leaves: list[tuple[nn.Module, tuple[str, ...]]] = [(module, ("weight", "bias"))]
            region = SlicedRegion(self._peers, module, leaves)
            self._regions.append(region)
            head = HeadState(region, lengths, layers.is_transposed(module), self._switch)
            self._replace(path, module, layers.VocabHead, head)
            if rule.loss is not None:
                found = Words(self._peers, start, count, rule.slicing.size)
                self._set_loss(SlicedLoss(rule.loss, found, self._switch, _loss_of(self._model)))
        return found

    def _replace(self, path: str, module: nn.Module, ahead: type[nn.Module], state: object) -> None:
        """Cut the parameters of a module and put the forward of `ahead` before its own."""
        rule, own = self.plan.rules[path], type(module)
        for key, slicing in parameter_slicings(module, rule).items():
            self._cut(path, key, module, slicing)
        before = layers.set_linear_sizes(module)
        module.__class__ = layers.sliced_class(ahead, module)
        setattr(module, "sliced", state)  # noqa: B010  its type is the model's

        def undo() -> None:
            module.__class__ = own
            del module.sliced
            for name, value in before.items():
                setattr(module, name, value)

        self._undo.append(undo)

    def _cut(self, path: str, key: str, module: nn.Module, slicing: Slicing) -> None:
        parameter: Any = module._parameters[key]
        name = self._names[id(parameter)]
        known = self.slicings.get(name)
        if known == slicing:
            return
        if known is not None:
            raise ConfigError(
                f"{path}.{key} is tied to {name}, which is divided in another way. Slice both "
                f"alike, or neither."
            )
        parameter.data = slicing.cut(parameter.data, self._peers.rank)
        self.slicings[name] = slicing

    def _set_heads(self, region: Region) -> None:
        heads = region.heads
        if heads is None or region.row is None:
            return
        # The row linear takes what the heads of all queries give.
        width = self.plan.rules[region.row].slicing.size // heads.num_heads
        module = self._model.get_submodule(region.entry)
        before = localise(module, heads, rank=self._peers.rank, width=width)

        def undo() -> None:
            for name, value in before.items():
                setattr(module, name, value)

        self._undo.append(undo)

    def _set_padding(self, module: nn.Module, start: int, count: int) -> None:
        padding: Any = vars(module).get("padding_idx")
        if padding is not None:
            own = padding - start if start <= padding < start + count else None
            setattr(module, "padding_idx", own)  # noqa: B010  its type says int
            self._undo.append(lambda: setattr(module, "padding_idx", padding))

    def _set_loss(self, loss: SlicedLoss) -> None:
        model: Any = self._model
        had = vars(model).get("_loss_function")
        model.loss_function = loss

        def undo() -> None:
            if had is None:
                del model._loss_function
            else:
                model.loss_function = had

        self._undo.append(undo)

    def _note_partial(self, blocks: Iterable[nn.Module]) -> None:
        """Fill `partial`; `blocks` work on this rank's rows only."""
        size, rank = self._peers.size, self._peers.rank
        heads = [self._model.get_submodule(path) for path in self.plan.partial]
        seen = _parameters(heads) | (_parameters(blocks) - self._seen_whole())
        for name, parameter in self._model.named_parameters():
            slicing = self.slicings.get(name)
            if slicing is not None:
                sharers = slicing.sharers(rank)
            else:
                sharers = tuple(range(size)) if id(parameter) in seen else (rank,)
            if len(sharers) > 1:
                self.partial[name] = sharers

    def _seen_whole(self) -> set[int]:
        """Parameters between columns that gather and their row: they see all rows and heads."""
        found: set[int] = set()
        for region in self.plan.regions:
            rules = [self.plan.rules[path] for path in region.columns]
            if all(isinstance(rule, Column) and rule.gather for rule in rules):
                row = [] if region.row is None else [self._model.get_submodule(region.row)]
                found |= _parameters([self._model.get_submodule(region.entry)]) - _parameters(row)
        return found


def _parameters(modules: Iterable[nn.Module]) -> set[int]:
    return {id(each) for module in modules for each in module.parameters()}


def span_blocks(model: nn.Module, span: Span) -> list[nn.Module]:
    """The blocks of a span, in order."""
    parent, _, first = span.first.rpartition(".")
    last = span.last.rpartition(".")[2]
    siblings = dict(model.get_submodule(parent).named_children())
    names = list(siblings)
    return [siblings[name] for name in names[names.index(first) : names.index(last) + 1]]


def common_path(paths: Sequence[str]) -> str:
    """The path of the innermost module that holds all of `paths`, or is one and holds the rest."""
    parts = [path.split(".") for path in paths]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in same)


def parameter_slicings(module: nn.Module, rule: Rule) -> dict[str, Slicing]:
    """How each parameter of a module is divided under a rule; left out: those that stay whole."""
    transposed = layers.is_transposed(module)
    if isinstance(rule, Row):
        return {"weight": replace(rule.slicing, dim=0 if transposed else 1)}
    found = {"weight": replace(rule.slicing, dim=1 if transposed else 0)}
    if module._parameters.get("bias") is not None:
        found["bias"] = replace(rule.slicing, dim=0)
    return found


def lengths_of(slicing: Slicing) -> tuple[int, ...]:
    """Sizes along the sliced dim by rank."""
    return tuple(slicing.local_size(rank) for rank in range(slicing.num_ranks))


def _loss_of(model: Any) -> Callable[..., Tensor]:
    return model.loss_function
