"""What a model looks like on the Hub, planned before any value is at hand.

transformers keeps some models in another form than the Hub has them (Mixtral's experts are fused
in memory, one by one on the Hub) and can revert that. Here the whole reverse runs once
on meta tensors, while a tracer notes which parameters each Hub tensor comes from; the result is a
plan by which the ranks write the files in parallel, each converting only what it writes.

    named parameters -> drop tied names -> revert on meta, traced -> groups -> split in files
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from hf_speed.checkpoint import (
    ModelPlan,
    PlannedFile,
    TensorGroup,
    TensorSpec,
    write_model,
)
from hf_speed.checkpoint.saver import Save
from hf_speed.checkpoint.snapshot import copy_parameters
from hf_speed.checkpoint.written import FullWeights
from hf_speed.engine.buffers import persistent_buffers
from hf_speed.engine.delivery import Delivery
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger

GIB = 1 << 30

Tensors = dict[str, Tensor]

_log = get_logger(__name__)


class Stored(NamedTuple):
    """A tensor that belongs in a saved model.

    Attributes:
        names: all of them: a tied weight has several.
        shape: of the whole.
        dtype: that it has in memory.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors(NamedTuple):
    """What a saved model is made of, in the model's order."""

    parameters: tuple[Stored, ...]
    buffers: tuple[Stored, ...]


def tensors_of(model: nn.Module) -> StoredTensors:
    """Of a model that is whole on this rank."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return StoredTensors(
        tuple(
            Stored(tuple(own), tuple(parameters[key].shape), parameters[key].dtype)
            for key, own in names.items()
        ),
        tuple(
            Stored((name,), tuple(buffer.shape), buffer.dtype)
            for name, buffer in persistent_buffers(model)
        ),
    )


def save_hub_model(
    model: nn.Module,
    directory: str | Path,
    parameters: Iterable[tuple[str, Tensor]] | Delivery,
    *,
    save: Save,
    buffers: Iterable[tuple[str, Tensor]] | None = None,
    max_shard_bytes: int = 5 * GIB,
    dtype: torch.dtype | None = None,
    tensors: StoredTensors | None = None,
) -> None:
    """Save `model` as a Hub model from all ranks at once: weights, index and configs.

    Collective: every rank calls it. A save that runs behind gets copies of what this rank writes,
    and of the configs.

    Args:
        model: a PreTrainedModel, or any module (then weights alone are written).
        directory: made if absent; on storage that all ranks share.
        parameters: (name, full tensor) of every parameter, as `Engine.full_parameters()` yields
            them; each valid until the next. Or gives them for the ranks that write each, to be read
            when the jobs of `save` run, as `deliver_parameters` does.
        save: that this is a part of.
        buffers: likewise of every persistent buffer; None: those of `model`.
        max_shard_bytes: largest file, except that a tensor is never cut.
        dtype: of floating-point weights in the files, if that is the one that the optimizer
            updates them in and `parameters` yields them in; None: as in the model.
        tensors: of the whole model, where a rank has only some; None: those of `model`.

    Raises:
        CheckpointError: on every rank; see `write_model` and `plan_hub_model`.
    """
    plan = plan_hub_model(model, max_shard_bytes=max_shard_bytes, dtype=dtype, tensors=tensors)
    others = persistent_buffers(model) if buffers is None else buffers
    copied = partial(copy_parameters, plan=plan, world=save.group) if save.is_behind else iter
    if callable(parameters):
        values = chain(parameters(plan.writers(save.group.size)), copied(others))
    else:
        values = copied(chain(parameters, others))
    extras = HubConfigs(model, plan).write
    if dtype is not None:
        save.full_weights[Path(directory)] = FullWeights(dtype, _names_in_files(plan))
    save.submit(
        partial(
            write_model,
            directory,
            plan,
            values,
            world=save.group,
            extras=extras,
            written=save.written,
            at_once=callable(parameters),
        )
    )


def _names_in_files(plan: ModelPlan) -> frozenset[str]:
    """Every name of every parameter that the files hold; some that transformers ignores are not."""
    kept = {source for group in plan.groups if group.targets for source in group.sources}
    return frozenset(kept | {alias for alias, name in plan.aliases.items() if name in kept})


def plan_hub_model(
    model: nn.Module,
    *,
    max_shard_bytes: int = 5 * GIB,
    dtype: torch.dtype | None = None,
    tensors: StoredTensors | None = None,
) -> ModelPlan:
    """Plan the files of `model` on the Hub. Reads shapes and dtypes only, never a value.

    Args:
        model: says by which names and in which layout its tensors are stored.
        max_shard_bytes: largest file, except that a tensor is never cut.
        dtype: of floating-point weights in the files; None: as in the model.
        tensors: of the whole model, where this rank has only some; None: those of `model`.

    Raises:
        CheckpointError: adapters or quantized weights, which have a layout of their own.
    """
    _refuse_other_layouts(model)
    tensors = tensors_of(model) if tensors is None else tensors
    sources, aliases = _sources(model, [*tensors.parameters, *tensors.buffers], dtype)
    convert = _converter(model)
    ignored = [name for name in sources if name in _ignored(model)]
    unsaved = tuple(TensorGroup((name,), (), is_rename=False) for name in ignored)
    saved = {name: value for name, value in sources.items() if name not in ignored}
    groups, targets = _groups(saved, convert)
    split = split_torch_state_dict_into_shards(
        targets, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    files = tuple(
        PlannedFile(
            file,
            tuple(
                TensorSpec(name, tuple(targets[name].shape), targets[name].dtype) for name in names
            ),
        )
        for file, names in split.filename_to_tensors.items()
    )
    num_parameters = sum(torch.Size(each.shape).numel() for each in tensors.parameters)
    return ModelPlan(files, groups + unsaved, convert, aliases, num_parameters)


class HubConfigs:
    """The configs of a model as they are now: config.json, and generation_config.json if it has.

    The config says the dtype of the files. The model's own is left as it is.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan) -> None:
        self._configs: list[Any] = []
        self._remote: PreTrainedModel | None = None
        if not isinstance(model, PreTrainedModel):
            return
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = _main_dtype(plan)
        # A leftover of sharded loading would make from_pretrained look for a process group.
        if getattr(config, "distributed_config", None) is not None:
            config.distributed_config = None
        self._configs.append(config)
        if model.is_remote_code():
            self._remote = model
        if model.can_generate() and model.generation_config is not None:
            self._configs.append(copy.deepcopy(model.generation_config))

    def write(self, directory: Path) -> None:
        """Write them into `directory`; call it on one rank."""
        if self._remote is not None:
            custom_object_save(self._remote, directory, config=self._configs[0])
        for config in self._configs:
            config.save_pretrained(directory)


def _sources(
    model: nn.Module, tensors: Iterable[Stored], dtype: torch.dtype | None
) -> tuple[Tensors, dict[str, str]]:
    """Meta tensors of all weights, tied ones once; other names of a parameter -> its own."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sources: Tensors = {}
    aliases: dict[str, str] = {}
    for stored in tensors:
        # from_pretrained restores the names in `tied` from the others, never the reverse.
        kept = next((name for name in stored.names if name not in tied), stored.names[0])
        aliases |= {name: kept for name in stored.names if name != kept}
        converted = dtype is not None and stored.dtype.is_floating_point
        sources[kept] = torch.empty(
            stored.shape, dtype=dtype if converted else stored.dtype, device="meta"
        )
    return sources, aliases


def _converter(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Tensors]:
    """From tensors as the model has them to tensors as the Hub has them."""
    if not isinstance(model, PreTrainedModel):
        return dict

    def convert(tensors: Mapping[str, Tensor]) -> Tensors:
        with torch.no_grad():
            return revert_weight_conversion(model, dict(tensors))

    return convert


class _Lineage(TorchFunctionMode):
    """Notes, for every tensor made inside, the named tensors that it was made from."""

    def __init__(self, named: Tensors) -> None:
        super().__init__()
        self._origins = {id(tensor): frozenset({name}) for name, tensor in named.items()}
        # Kept alive, so that no id is used twice.
        self._alive: list[Any] = [named]

    def origins(self, tensor: Tensor) -> frozenset[str]:
        return self._origins.get(id(tensor), frozenset())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        found = frozenset[str]().union(*(self.origins(tensor) for tensor in inputs))
        for tensor in outputs:
            self._origins[id(tensor)] = found | self.origins(tensor)
        self._alive.extend(outputs)
        return result


def _groups(
    sources: Tensors, convert: Callable[[Mapping[str, Tensor]], Tensors]
) -> tuple[tuple[TensorGroup, ...], Tensors]:
    """Which sources make which targets, and the targets on meta in the order in which they come."""
    with _Lineage(sources) as lineage:
        targets = convert(sources)
    made_from = {name: lineage.origins(tensor) for name, tensor in targets.items()}
    groups = _join(list(sources), made_from, sources, targets)
    problem = _problem(groups, sources, targets, convert)
    if problem is not None:
        # Files in the model's own names load with transformers as well; a lossy reverse would not.
        _log.log_once(
            logging.WARNING,
            "transformers cannot revert this model to its Hub layout tensor by tensor (%s); its "
            "weights are saved under the names that they have in memory.",
            problem,
        )
        targets = dict(sources)
        groups = tuple(TensorGroup((name,), (name,), is_rename=True) for name in sources)
    ordered = [target for group in groups for target in group.targets]
    return groups, {name: torch.empty_like(targets[name]) for name in ordered}


def _join(
    order: list[str], made_from: dict[str, frozenset[str]], sources: Tensors, targets: Tensors
) -> tuple[TensorGroup, ...]:
    """The connected parts of "is made from", in the order in which their sources complete them."""
    leader = {name: name for name in order}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for origins in made_from.values():
        for name in origins:
            leader[find(name)] = find(next(iter(origins)))
    members: dict[str, list[str]] = {}
    for name in order:
        members.setdefault(find(name), []).append(name)
    made: dict[str, list[str]] = {}
    for target, origins in made_from.items():
        if origins:
            made.setdefault(find(next(iter(origins))), []).append(target)
    place = {name: index for index, name in enumerate(order)}
    groups = []
    for key, group in sorted(members.items(), key=lambda item: place[item[1][-1]]):
        results = made.get(key, [])
        is_rename = len(group) == len(results) == 1 and targets[results[0]] is sources[group[0]]
        groups.append(TensorGroup(tuple(group), tuple(results), is_rename))
    return tuple(groups)


def _problem(
    groups: tuple[TensorGroup, ...],
    sources: Tensors,
    targets: Tensors,
    convert: Callable[[Mapping[str, Tensor]], Tensors],
) -> str | None:
    """Why the groups cannot be converted one at a time without loss; None where they can."""
    if sum(len(group.targets) for group in groups) != len(targets):
        return "a tensor on the Hub is made from none of the model"
    for group in groups:
        before = sum(sources[name].numel() for name in group.sources)
        if before != sum(targets[name].numel() for name in group.targets):
            return f"{', '.join(group.sources)} would lose elements"
        if group.is_rename:
            continue
        alone = convert({name: sources[name] for name in group.sources})
        if {name: value.shape for name, value in alone.items()} != {
            name: targets[name].shape for name in group.targets
        }:
            return f"{', '.join(group.sources)} cannot be converted apart from the rest"
    return None


def _refuse_other_layouts(model: nn.Module) -> None:
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{type(model).__name__} carries PEFT adapters, which have a layout of their own: save "
            f"them with its save_pretrained inside hf_speed.gathered(model)."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(
            f"{type(model).__name__} is quantized; hf_speed cannot save quantized weights. "
            f"Dequantize it first."
        )


def _ignored(model: nn.Module) -> frozenset[str]:
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def _main_dtype(plan: ModelPlan) -> torch.dtype:
    """The floating-point dtype of most bytes in the files."""
    weight: dict[torch.dtype, int] = {}
    for file in plan.files:
        for spec in file.tensors:
            if spec.dtype.is_floating_point:
                weight[spec.dtype] = weight.get(spec.dtype, 0) + spec.nbytes
    return max(weight, key=lambda dtype: weight[dtype], default=torch.float32)
