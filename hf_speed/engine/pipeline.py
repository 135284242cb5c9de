"""`model(**batch)` of a model that is spread over pipeline stages.

In training, with labels, the call runs the whole schedule, forwards and backwards, and returns the
loss on every rank; gradients wait, unreduced, until `loss.backward()` says by which factor they
count. Without gradients the call runs the forwards alone and returns logits and loss on every rank,
so that evaluation, prediction and generation are those of a whole model.

    model(**batch)     cut in microbatches -> plan -> run -> loss to all ranks
    loss.backward()    factor as expected? -> one reduction
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_speed.config import ResolvedPipe
from hf_speed.engine.division import Division
from hf_speed.errors import ConfigError, EngineError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import all_reduce_small, broadcast_flat
from hf_speed.pipe import batch as batches
from hf_speed.pipe.action import Kind
from hf_speed.pipe.lower import lower
from hf_speed.pipe.p2p import Links
from hf_speed.pipe.plan import Plan
from hf_speed.pipe.runtime import Runtime
from hf_speed.pipe.schedules import make_plan
from hf_speed.pipe.stage import Stage
from hf_speed.pipe.validate import validate
from hf_speed.pipe.weights import (
    Switch,
    generator_state,
    set_generator_state,
    unwrap_linears,
    wrap_linears,
)

_UNSUPPORTED = ("output_hidden_states", "output_attentions", "output_router_logits")


class Gradients(Protocol):
    """What is asked of the sharding engine."""

    def unshard(self, stage: Stage) -> None:
        """Gather a stage's parameters and keep them."""
        ...

    def reshard(self, stage: Stage) -> None:
        """Let them go."""
        ...

    def reduce(self, stage: Stage) -> None:
        """A stage's gradients are complete."""
        ...

    def check(self) -> None:
        """Raise if the model cannot run as it is."""
        ...

    def begin(self) -> None:
        """Many backwards begin that count as one."""
        ...

    def end(self) -> None:
        """They are done."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16, else 1."""
        ...

    def drop(self) -> None:
        """The gradients of the last run do not count."""
        ...

    def commit(self, factor: float) -> None:
        """They count, times `factor`: as a backward that is done."""
        ...


class PipelineForward:
    """Stands in front of a model's forward.

    Args:
        model: of which this rank keeps some stages.
        division: how it was taken apart.
        config: of the pipeline.
        mesh: of the run.
        gradients: of the sharding engine.
        gathers: whether parameters are gathered for a step (stage 3).

    Raises:
        EngineError: the model was not dealt out to stages.
    """

    def __init__(
        self,
        model: nn.Module,
        division: Division,
        *,
        config: ResolvedPipe,
        mesh: ParallelMesh,
        gradients: Gradients,
        gathers: bool,
    ) -> None:
        split = division.split
        if split is None:
            raise EngineError(f"This {type(model).__name__} was not dealt out to pipeline stages.")
        self._model = model
        # Whoever wraps this forward, as accelerate does for autocast, keeps it after the engine.
        self._own, self._had_own = model.forward, "forward" in model.__dict__
        self._is_over = False
        self._split = split
        self._config = config
        self._mesh = mesh
        self._of_one_batch = mesh.axis("pp", "tp")
        self._placement = division.placement
        self._gradients = gradients
        self._shard = config.gather if gathers else None
        self._draws = division.draws
        self._switch = Switch(division.defer_to)
        modules = [module for stage in split.stages.values() for module in stage.modules]
        self._linears = wrap_linears(modules, self._switch) if _waits(config) else []
        self._runtime = Runtime(
            rank=mesh.coordinates["pp"],
            stages=split.stages,
            runner=split.runner,
            links=Links(mesh, division.placement, split.kind),
            switch=self._switch,
            shards=gradients,
            device=mesh.device,
        )
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._factor = 1.0
        self._open: _Loss | None = None
        self.__signature__ = inspect.signature(type(model).forward).replace(
            parameters=list(inspect.signature(type(model).forward).parameters.values())[1:]
        )
        self._heeds_count = batches.uses_loss_function(model)
        self._shifts_labels = batches.shifts_labels(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch through the pipeline. Collective over its ranks.

        Raises:
            DivergenceError: in debug mode, where ranks of one pipeline have different batches.
        """
        if self._is_over:
            return self._own(*args, **kwargs)
        self._runtime.links.begin()
        inputs = self._bind(args, kwargs)
        self._mesh.journal.expect_same_batch(inputs, group=self._of_one_batch)
        self._gradients.check()
        self._split.runner.train(self._model.training)
        if torch.is_grad_enabled() and self._model.training:
            return self._train(inputs)
        with torch.no_grad():
            return self._evaluate(inputs)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(self).bind(*args, **kwargs)
        inputs = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                inputs |= inputs.pop(name, {})
        asked = [name for name in _UNSUPPORTED if inputs.get(name)]
        if asked or inputs.get("return_dict") is False:
            raise ConfigError(
                f"{asked[0] if asked else 'return_dict=False'} cannot be served under a pipeline "
                f"(mesh.pp > 1): each rank has some of the layers only. Leave it out, or set "
                f"mesh.pp=1."
            )
        return {name: value for name, value in inputs.items() if value is not None}

    def _train(self, inputs: dict[str, Any]) -> Any:
        takes_labels = "labels" in self.__signature__.parameters
        if takes_labels and not any("label" in name for name in inputs):
            raise ConfigError(
                f"{type(self._model).__name__} was called in training without labels. Under a "
                f"pipeline (mesh.pp > 1) the model computes the loss, on its last stage: give it "
                f"labels, and leave out label smoothing and compute_loss_func. To read logits, "
                f"call it inside torch.no_grad()."
            )
        if "use_cache" in self.__signature__.parameters:
            # Nobody sees it: only the loss is returned.
            inputs["use_cache"] = False
        microbatches = self._cut(inputs, self._config.microbatches)
        plan = self._plan(len(microbatches), trains=True)
        seeds, after = self._seeds(len(microbatches))
        # Of a loss before that has had no backward nothing is left, as in plain PyTorch.
        self._open = opened = _Loss(self._factor * self._gradients.loss_scale)
        self._gradients.begin()
        try:
            result = self._runtime.run(plan, microbatches, scale=opened.factor, seeds=seeds)
        except BaseException:
            self._open = None
            raise
        finally:
            self._gradients.end()
            if self._open is None:
                self._gradients.drop()
            if after is not None:
                set_generator_state(after, self._mesh.device)
        anchor = torch.zeros((), device=self._mesh.device, requires_grad=True)
        loss = _Committed.apply(result.loss.view(()), self, opened, anchor)
        kind = self._split.runner.output_kind
        return loss if kind in (None, Tensor) else kind(loss=loss)

    def commit(self, loss: "_Loss", factor: float) -> None:
        """`loss.backward()` multiplies gradients by `factor`: those that wait are made to fit.

        Raises:
            EngineError: the loss has had its backward, or another batch has come since.
        """
        if loss is not self._open:
            if loss.is_done:
                raise EngineError(
                    "This loss has had its backward() already: a pipeline keeps nothing for a "
                    "second one."
                )
            raise EngineError(
                "Another batch has gone through the pipeline since this loss was computed. Its "
                "gradients, which a pipeline computes in the forward, were dropped then. Call "
                "loss.backward() (or accelerator.backward(loss)) for each batch before the next."
            )
        self._open, loss.is_done = None, True
        self._gradients.commit(factor / loss.factor)
        if factor and math.isfinite(factor):
            # The next loss will have the same one: then nothing has to be multiplied.
            self._factor = factor / self._gradients.loss_scale

    def _evaluate(self, inputs: dict[str, Any]) -> Any:
        caches = "past_key_values" in inputs or inputs.get("use_cache")
        if not caches and "use_cache" in self.__signature__.parameters:
            # Else a model may keep keys and values of all microbatches, by its config.
            inputs["use_cache"] = False
        self._check_cache(inputs)
        microbatches = self._cut(inputs, 1 if caches else self._agreed_count(inputs))
        plan = self._plan(len(microbatches), trains=False)
        outputs = self._runtime.run(plan, microbatches).outputs
        kind = self._split.runner.output_kind
        if kind is None or kind is Tensor:
            value = torch.cat(outputs) if outputs and outputs[0].dim() else _total(outputs)
            return self._share(value)
        values: dict[str, Any] = self._share_fields(kind, outputs)
        if any("label" in name for name in inputs):
            losses = [
                batches.loss_of(each, weight=part.weight)
                for each, part in zip(outputs, microbatches, strict=False)
            ]
            values["loss"] = self._share(_total(losses))
        if caches:
            made = self._split.runner.take_cache()
            values["past_key_values"] = inputs.get("past_key_values", made)
        return kind(**values)

    def _share_fields(self, kind: type, outputs: Sequence[Any]) -> dict[str, Tensor | None]:
        """The tensors of rows in what the last stage returned, by name, on every rank."""
        fields = getattr(kind, "__dataclass_fields__", ("logits",))
        names = [name for name in fields if name not in _APART]
        pieces: dict[str, list[Any]] = {
            name: [getattr(each, name, None) for each in outputs] for name in names
        }
        there = [
            bool(found) and all(_has_rows(each) for each in found) for found in pieces.values()
        ]
        flags = torch.tensor(there, dtype=torch.uint8, device=self._mesh.device)
        shared = [name for name, flag in zip(names, self._from_last(flags), strict=True) if flag]
        return {name: self._share(torch.cat(pieces[name]) if outputs else None) for name in shared}

    def _agreed_count(self, inputs: Mapping[str, Any]) -> int | None:
        """How many microbatches all data-parallel ranks can have, where they gather for each."""
        if self._shard != "microbatch":
            return None
        rows = torch.tensor([batches.num_rows(inputs)], device=self._mesh.device)
        data = self._mesh.axis("dp_replicate", "dp_shard")
        all_reduce_small(rows, group=data, journal=self._mesh.journal, op=dist.ReduceOp.MIN)
        return batches.choose_count(None, rows=int(rows), num_ranks=self._mesh.sizes["pp"])

    def _check_cache(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a key-value cache that the stages of this rank cannot each follow."""
        stages = list(self._split.stages.values())
        cache = inputs.get("past_key_values")
        if len(stages) == 1 or (cache is None and not inputs.get("use_cache")):
            return
        lengths = {} if cache is None else {s.cache_for(cache).get_seq_length() for s in stages[1:]}
        if cache is None or lengths != {cache.get_seq_length()}:
            raise ConfigError(
                f"pipe.schedule={self._config.schedule!r} has {len(stages)} stages a rank, which "
                f"need a key-value cache that they have seen from its first token on, and that "
                f"only this model's calls have changed. Give past_key_values= an empty cache, or "
                f"use a schedule with one stage a rank ('1f1b', 'zb_h1') or use_cache=False."
            )

    def _cut(self, inputs: dict[str, Any], wanted: int | None) -> list[batches.Microbatch]:
        """The batch in microbatches, weighed by their tokens."""
        if "num_items_in_batch" in inputs and not self._heeds_count:
            del inputs["num_items_in_batch"]
        if self._config.gather == "microbatch" and self._shard and wanted is None:
            raise ConfigError(
                "pipe.gather='microbatch' gathers once for each microbatch on all data-parallel "
                "ranks, which must have equally many. Set pipe.microbatches."
            )
        rows = batches.num_rows(inputs)
        count = batches.choose_count(wanted, rows=rows, num_ranks=self._mesh.sizes["pp"])
        last_only = frozenset(name for name in inputs if "label" in name or "num_items" in name)
        microbatches = batches.cut(inputs, count, last_only=last_only)
        if "num_items_in_batch" in inputs:
            return microbatches
        return batches.weigh(microbatches, is_shifted=self._shifts_labels)

    def _plan(self, count: int, *, trains: bool) -> Plan:
        """The lowered plan for so many microbatches; made and validated once."""
        key = (count, trains)
        if key not in self._plans:
            config, num_ranks = self._config, self._mesh.sizes["pp"]
            plan = make_plan(
                config.schedule, num_ranks=num_ranks, num_microbatches=count, chunks=config.chunks
            )
            if not trains:
                plan = plan.keep(Kind.FORWARD)
            else:
                validate(plan)
            self._plans[key] = lower(plan, shard=self._shard)
        return self._plans[key]

    def _seeds(self, count: int) -> tuple[list[Tensor] | None, Tensor | None]:
        """A generator state for each microbatch, and the one to go on with after the run."""
        if not self._draws:
            return None, None
        device = self._mesh.device
        numbers = torch.randint(2**62, (count,), dtype=torch.int64).to(device)
        # Ranks of one batch agree, whatever each has drawn before.
        broadcast_flat(numbers, group=self._of_one_batch, journal=self._mesh.journal)
        states = [
            torch.Generator(device).manual_seed(number).get_state() for number in numbers.tolist()
        ]
        return states, generator_state(device)

    def _from_last(self, value: Tensor) -> Tensor:
        """Give every pipeline rank what the last stage has. One broadcast."""
        return broadcast_flat(
            value,
            group=self._mesh.axis("pp"),
            journal=self._mesh.journal,
            source=self._placement[-1],
        )

    def _share(self, value: Tensor | None) -> Tensor | None:
        """The last stage's tensor, of a shape that the others do not know; None if it has none."""
        header = torch.zeros(10, dtype=torch.int64, device=self._mesh.device)
        if value is not None:
            code = _DTYPES.index(value.dtype)
            numbers = [1, code, value.dim(), *value.shape]
            header[: len(numbers)] = torch.tensor(numbers)
        there, code, dims, *sizes = self._from_last(header).tolist()
        if not there:
            return None
        if value is None:
            value = torch.empty(sizes[:dims], dtype=_DTYPES[code], device=self._mesh.device)
        return self._from_last(value.contiguous())

    def undo(self) -> None:
        """Leave the model's linears and its forward alone again."""
        unwrap_linears(self._linears)
        self._is_over = True
        if self._model.__dict__.get("forward") is self:
            del self._model.__dict__["forward"]
            if self._had_own:
                self._model.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CopyOfStages":
        """A copy of the model has some of the layers only."""
        return _CopyOfStages(type(self._model).__name__, self._mesh.sizes["pp"])


class _CopyOfStages(NamedTuple):
    """The forward of a copy of a model of which this rank has some stages."""

    model: str
    num_ranks: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - whatever it is given
        """Raise EngineError."""
        raise EngineError(
            f"This is a copy of what one of {self.num_ranks} pipeline ranks has of {self.model} "
            f"(mesh.pp={self.num_ranks}): it has some of the layers only. Copy the model before it "
            f"is prepared, or after engine.detach(), and prepare the copy too."
        )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


_APART = ("loss", "past_key_values")
"""Fields of a model's output that are not its rows' and come in another way."""


class _Loss:
    """A loss and what has become of it.

    Attributes:
        factor: that its gradients were multiplied by.
        is_done: whether its backward() has been called.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.is_done = False


class _Committed(torch.autograd.Function):
    """The loss, whose gradients are there already; its backward tells the pipeline the factor."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        pipeline: PipelineForward,
        loss: _Loss,
        anchor: Tensor,  # noqa: ARG004 - what makes the loss take a gradient
    ) -> Tensor:
        ctx.pipeline, ctx.loss = pipeline, loss
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:  # pyrefly: ignore
        ctx.pipeline.commit(ctx.loss, float(grad))
        return None, None, None, None


def _total(losses: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([each.float() for each in losses]).sum() if losses else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _waits(config: ResolvedPipe) -> bool:
    """Whether weight gradients wait in this schedule, on some number of ranks."""
    plan = make_plan(config.schedule, num_ranks=2, num_microbatches=4, chunks=config.chunks)
    return any(action.kind is Kind.WEIGHT for _, action in plan.actions())


def check_schedule(config: ResolvedPipe, *, stage: int) -> None:
    """Refuse what cannot be combined.

    Raises:
        ConfigError: weight gradients that wait for parameters that are gone.
    """
    if stage == 3 and config.gather == "microbatch" and _waits(config):
        raise ConfigError(
            f"pipe.gather='microbatch' lets go of parameters after each backward, but "
            f"pipe.schedule={config.schedule!r} computes their gradients later. Set "
            f"pipe.gather='step', or a schedule that does not split the backward: 'gpipe', '1f1b', "
            f"'interleaved', 'looped_bfs'."
        )
