"""The one place where a sliced model gets hooks.

model           before: do logits stay slices? after: random numbers back, stand-in for logits
first block     before: hidden states are divided by rows        } with sequence parallelism
each region     before: all rows for an attention or an MLP      }
last block      after: hidden states are whole again             }
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_speed.errors import EngineError
from hf_speed.nn.sliced.exchange import Peers
from hf_speed.nn.sliced.layers import LogitsSwitch
from hf_speed.nn.sliced.loss import SlicedLogits, Words
from hf_speed.nn.sliced.regions import Rows, SlicedRegion, dropout_rates, generator_of

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class ModelHooks:
    """Installs them, and takes them off again.

    Args:
        model: the sliced model.
        switch: set while the model computes a loss from slices of logits.
        regions: told when a pass begins and ends.
        rows: divides hidden states; None without sequence parallelism.
        words: of this rank; None where logits are always gathered.
        peers: the ranks, which must be given the same batches.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: LogitsSwitch,
        regions: Sequence[SlicedRegion],
        rows: Rows | None,
        words: Words | None,
        peers: Peers,
    ) -> None:
        self._peers = peers
        self._switch = switch
        self._regions = list(regions)
        self._rows = rows
        self._words = words
        self._rates = list(dropout_rates(model.modules()))
        self._names = list(inspect.signature(model.forward).parameters)
        self._span: list[RemovableHandle] = []
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]

    def enter_rows(self, entries: Sequence[tuple[nn.Module, SlicedRegion]]) -> None:
        """Give each region all rows."""
        for module, region in entries:
            self._handles.append(
                module.register_forward_pre_hook(_EnterRows(region), with_kwargs=True)
            )

    def divide_between(self, *ends: tuple[nn.Module, nn.Module]) -> None:
        """Divide hidden states before each first block and put them together after its last."""
        self._take_off(self._span)
        if self._rows is None:
            return
        for first, last in ends:
            split, join = _SplitRows(self._rows), _JoinRows(self._rows)
            self._span.append(first.register_forward_pre_hook(split, with_kwargs=True))
            self._span.append(last.register_forward_hook(join))

    def remove(self) -> None:
        """Take every hook off."""
        self._take_off(self._span)
        self._take_off(self._handles)

    def _take_off(self, handles: list[RemovableHandle]) -> None:
        while handles:
            handles.pop().remove()

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for region in self._regions:
            region.forget()
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        self._expect_the_same(module, inputs)
        labels = inputs.get("labels")
        self._switch.local = self._words is not None and module.training and labels is not None
        if self._rows is not None:
            self._rows.random.forget()
            _refuse_hidden_states(module, kwargs)

    def _expect_the_same(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        """In debug mode: one batch, and one random state where dropout is repeated."""
        journal = self._peers.journal
        if not journal.enabled:
            return
        draws = module.training and any(getattr(each, name) for each, name in self._rates)
        device = next((each.device for each in module.parameters()), torch.device("cpu"))
        state = {"random_numbers": generator_of(device).get_state()} if draws else {}
        journal.expect_same_batch({**inputs, **state}, group=self._peers.tp)

    def _after_model(self, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG002
        for region in self._regions:
            region.random.end()
        if self._rows is not None:
            self._rows.random.end()
        local, self._switch.local = self._switch.local, False
        return self._without_slices(output, self._words) if local and self._words else output

    def _without_slices(self, output: Any, words: Words) -> Any:
        """The model's output with a stand-in for logits that are slices."""

        def is_slice(value: Any) -> bool:
            return isinstance(value, Tensor) and value.dim() > 1 and value.size(-1) == words.count

        if isinstance(output, dict) and is_slice(output.get("logits")):
            output["logits"] = SlicedLogits.of(output["logits"], words.total)
        elif isinstance(output, tuple) and len(output) > 1 and is_slice(output[1]):
            # (loss, logits, ...), as transformers returns with return_dict=False.
            output = (output[0], SlicedLogits.of(output[1], words.total), *output[2:])
        return output


class _EnterRows:
    def __init__(self, region: SlicedRegion) -> None:
        self._region = region

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Inputs:
        return _with_hidden_states(module, args, kwargs, self._region.enter_rows)


class _SplitRows:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Inputs:
        def split(x: Tensor) -> Tensor:
            return self._rows.split(x, training=module.training)

        return _with_hidden_states(module, args, kwargs, split)


class _JoinRows:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG002
        if isinstance(output, tuple):
            return (self._rows.join(output[0]), *output[1:])
        return self._rows.join(output)


def _with_hidden_states(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[Tensor], Tensor],
) -> _Inputs:
    """A module's inputs with its hidden states changed: given first, or by that name."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    for name in ("hidden_states", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return args, {**kwargs, name: change(kwargs[name])}
    raise EngineError(
        f"{type(module).__name__} was called without hidden states, which "
        f"tensor.sequence_parallel divides. Set tensor.sequence_parallel: false."
    )


def _refuse_hidden_states(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if asked:
        raise EngineError(
            "output_hidden_states=True would return this rank's rows of hidden states. Set "
            "tensor.sequence_parallel: false to get whole ones."
        )
