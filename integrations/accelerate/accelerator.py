"""accelerate.Accelerator with hf_speed's engine where DistributedDataParallel would be.

    accelerator = Accelerator(hf_speed={"zero": {"stage": 3}})
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

prepare_model attaches an engine to the model in place and leaves autocast to accelerate;
prepare_optimizer binds the user's optimizer to it. Data loaders, schedulers, gather and trackers
are accelerate's own; where several ranks see one batch (mesh.pp, mesh.tp) the first two are told
so. Without a config (hf_speed=None and no HF_SPEED_CONFIG) every method is accelerate's.

The accelerator holds no engine: it finds them on the models that it prepared, so free_memory()
loses none.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, Self

import accelerate
import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn

from hf_speed.checkpoint.stores import Store
from hf_speed.config import env
from hf_speed.config.tree import SpeedConfig
from hf_speed.engine import Engine, engine_of
from hf_speed.engine.rng import share_rng
from hf_speed.errors import ConfigError
from hf_speed.integrations.accelerate.agreement import watch_batches
from hf_speed.integrations.accelerate.batches import BatchMesh, gather_samples
from hf_speed.integrations.accelerate.clipping import engine_to_clip, ids_of, parameters_of
from hf_speed.integrations.accelerate.loaders import (
    LoaderOptions,
    num_last_rows,
    prepare_shared_loader,
)
from hf_speed.integrations.accelerate.optimizer import SpeedOptimizer
from hf_speed.integrations.accelerate.refusals import (
    PLUGINS,
    refuse_backends,
    refuse_what_has_no_effect,
)
from hf_speed.integrations.accelerate.scheduler import SpeedScheduler
from hf_speed.integrations.accelerate.state import StatefulAccelerator
from hf_speed.integrations.carrier import SpeedConfigLike, carried_config
from hf_speed.integrations.transformers.loading import attach
from hf_speed.integrations.transformers.saving import wrap_save
from hf_speed.integrations.weights import full_state_dict, write_model

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What working parameters are cast to; "no": each keeps its own dtype."""


class Accelerator(StatefulAccelerator):
    """accelerate.Accelerator that shards models, gradients and optimizers as `hf_speed` says.

    Args:
        args: as for accelerate.Accelerator.
        hf_speed: a path, JSON text, a dict or a SpeedConfig; None: HF_SPEED_CONFIG, or else plain
            accelerate.
        kwargs: as for accelerate.Accelerator.

    Raises:
        ConfigError: the config is wrong, or another backend is asked for beside it.
    """

    def __init__(self, *args: Any, hf_speed: SpeedConfigLike | None = None, **kwargs: Any) -> None:
        config = carried_config(hf_speed)
        super().__init__(*args, **kwargs)
        if config is not None:
            # On a CPU accelerate forgets a plugin that it was given, without a word.
            refuse_backends({name: kwargs.get(name) for name in PLUGINS})
        self._take_config(config)

    @classmethod
    def adopt(cls, accelerator: accelerate.Accelerator, config: SpeedConfig | None) -> Self:
        """Make an existing accelerator one of ours.

        The class of this one instance changes, nothing else.

        Raises:
            ConfigError: another backend is asked for beside it.
        """
        kind = type(accelerator)
        if not issubclass(kind, cls):
            accelerator.__class__ = (
                cls if kind is accelerate.Accelerator else type(kind.__name__, (cls, kind), {})
            )
        accelerator._take_config(config)  # pyrefly: ignore[missing-attribute]
        return accelerator  # pyrefly: ignore[bad-return]

    def _take_config(self, config: SpeedConfig | None) -> None:
        self.hf_speed_config = config
        # Not read from the shared state later: every TrainingArguments() resets that.
        self.compute_dtype = (
            _COMPUTE_DTYPES.get(self.mixed_precision) if config is not None else None
        )
        self.state_weights = None
        self._batches: BatchMesh | None = None
        if config is None:
            return
        env.check_promised_world()
        refuse_what_has_no_effect(self)
        if config.checkpoint.mirror is not None:
            # A missing backend should not cost the steps until the first save.
            Store(config.checkpoint.mirror)
        self._batches = BatchMesh(config, self.device)
        # The engine scales the loss, and agrees on overflow over the ranks that share a shard.
        self.scaler = None
        if self.mixed_precision == "fp16":
            # accelerate computes fp16 on a CPU without autocast; with it, CPU and GPU run the same
            # casts.
            self.native_amp = True

    # ---- prepare ----

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As accelerate's; models first, so that an optimizer named before its model finds it."""
        if self.hf_speed_config is not None:
            for each in args:
                if isinstance(each, nn.Module):
                    self.prepare_model(each)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,  # noqa: FBT001 - accelerate's signature
        evaluation_mode: bool = False,  # noqa: FBT001, FBT002 - accelerate's signature
    ) -> nn.Module:
        """Attach an engine to `model`, in place; returns the same object.

        Collective. In evaluation mode too: at stage 3 a model that is only evaluated is sharded as
        well, and an optimizer may be bound to it later.

        Raises:
            ConfigError: the model is spread over devices by `device_map`.
        """
        if self.hf_speed_config is None:
            return super().prepare_model(
                model, device_placement=device_placement, evaluation_mode=evaluation_mode
            )
        if self.verify_device_map(model):
            raise ConfigError(
                f"{type(model).__name__} was loaded with device_map over several devices, which "
                "hf_speed cannot shard. "
                f"Load it without device_map, or with hf_speed.from_pretrained."
            )
        engine = engine_of(model)
        if engine is not None:
            _check_whole(engine, model)
        elif next(model.parameters(), None) is not None:
            engine = attach(
                model, self.hf_speed_config, compute_dtype=self.compute_dtype, device=self.device
            )
            watch_batches(engine)
            share_rng(engine.mesh)
            wrap_save(model)
        else:
            model.to(self.device)
        # Evaluation mode leaves out DistributedDataParallel and keeps autocast.
        prepared = super().prepare_model(model, device_placement=False, evaluation_mode=True)
        for optimizer in self._optimizers:
            self._bind(optimizer)
        return prepared

    def prepare_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        device_placement: bool | None = None,  # noqa: FBT001 - accelerate's signature
    ) -> torch.optim.Optimizer:
        """Bind `optimizer` to the engine of its model, or wait until that is prepared.

        Raises:
            ConfigError: it cannot work on shards, or trains parameters of two models.
        """
        if self.hf_speed_config is None:
            return super().prepare_optimizer(optimizer, device_placement=device_placement)
        if not isinstance(optimizer, SpeedOptimizer):
            optimizer = SpeedOptimizer(optimizer)
            optimizer._is_accelerate_prepared = True  # pyrefly: ignore[missing-attribute]
        if not any(each is optimizer for each in self._optimizers):
            self._optimizers.append(optimizer)
        self._bind(optimizer)
        return optimizer

    def _bind(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, SpeedOptimizer) or optimizer.engine in self.engines:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owners = [engine for engine in self.engines if held & ids_of(parameters_of(engine))]
        if len(owners) > 1:
            names = ", ".join(type(engine.model).__name__ for engine in owners)
            raise ConfigError(
                f"One {type(optimizer.optimizer).__name__} trains parameters of {len(owners)} "
                f"prepared models ({names}). "
                f"Give each model its own optimizer, or prepare one nn.Module that holds them all."
            )
        if owners:
            owners[0].bind_optimizer(optimizer.optimizer)
            optimizer.engine = owners[0]

    # ---- batches ----

    @property
    def num_batches(self) -> int:
        """Different batches that the processes see at a time: data-parallel ranks.

        `num_processes` counts all. A step of `batch_size` rows a batch has `num_batches *
        batch_size`, and a prepared scheduler goes on by `num_batches`.
        """
        return self.num_processes if self._batches is None else self._batches.num_batches

    @property
    def num_sharing(self) -> int:
        """Processes that see one batch: mesh.pp x mesh.tp."""
        return 1 if self._batches is None else self._batches.num_sharing

    def prepare_data_loader(
        self,
        data_loader: torch.utils.data.DataLoader,
        device_placement: bool | None = None,  # noqa: FBT001 - accelerate's signature
        slice_fn_for_dispatch: Any = None,
    ) -> Any:
        """As accelerate's; the ranks of one pipeline and its slices get the same rows."""
        batches = self._batches
        prepared = getattr(data_loader, "_is_accelerate_prepared", False)
        if batches is None or not batches.is_shared or prepared:
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        placed = self.device_placement if device_placement is None else device_placement
        options = LoaderOptions(
            device=self.device,
            put_on_device=placed,
            split_batches=self.split_batches,
            dispatch_batches=self.dispatch_batches,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
            rng_types=tuple(self.rng_types or ()),
        )
        loader = prepare_shared_loader(data_loader, options, batches)
        self._dataloaders.append(loader)
        return loader

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As accelerate's; a step counts the batches that it took, not the processes."""
        prepared: Any = super().prepare_scheduler(scheduler)
        if self.num_sharing == 1 or isinstance(prepared, SpeedScheduler):
            return prepared
        mine = SpeedScheduler(
            prepared.scheduler,
            prepared.optimizers,
            num_batches=self.num_batches,
            step_with_optimizer=prepared.step_with_optimizer,
            split_batches=prepared.split_batches,
        )
        self._schedulers[-1] = mine
        return mine

    def gather_for_metrics(
        self,
        input_data: Any,
        use_gather_object: bool = False,  # noqa: FBT001, FBT002 - accelerate's signature
    ) -> Any:
        """As accelerate's: each sample once, also where several processes saw it."""
        batches = self._batches
        if batches is None or not batches.is_shared:
            return super().gather_for_metrics(input_data, use_gather_object)
        state = self.gradient_state
        num_rows = (
            num_last_rows(state.active_dataloader, state.remainder)
            if state.end_of_dataloader
            else None
        )
        return gather_samples(batches, input_data, num_rows=num_rows, objects=use_gather_object)

    # ---- a step ----

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """As accelerate's, with the engine's loss scale (fp16).

        Raises:
            ConfigError: two prepared models with different loss scales share one backward.
        """
        engines = [engine for engine in self.engines if engine.optimizer is not None]
        if not engines:
            super().backward(loss, **kwargs)
            return
        scales = {engine.loss_scale for engine in engines}
        if len(scales) > 1:
            raise ConfigError(
                f"{len(engines)} models are trained in fp16 with different loss scales "
                f"({sorted(scales)}), and a loss "
                "can be multiplied by one only. Train them in bf16, or prepare one nn.Module that "
                "holds them all."
            )
        engines[0].backward(loss / self.gradient_accumulation_steps, **kwargs)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Keep gradients on this rank, where they add up, until the first backward outside."""
        engine = engine_of(model) if self.hf_speed_config is not None else None
        if engine is None:
            with super().no_sync(model):
                yield
            return
        before = engine.sync_gradients
        engine.sync_gradients = False
        try:
            yield
        finally:
            engine.sync_gradients = before

    @contextlib.contextmanager
    def join_uneven_inputs(
        self,
        joinables: list[Any],
        even_batches: bool | None = None,  # noqa: FBT001 - accelerate's signature
    ) -> Iterator[None]:
        """As accelerate's, for loaders that give every rank equally many batches.

        Raises:
            ConfigError: ranks may run out of batches at different steps.
        """
        modules = (each for each in joinables if isinstance(each, nn.Module))
        if all(engine_of(module) is None for module in modules):
            with super().join_uneven_inputs(joinables, even_batches=even_batches):
                yield
            return
        even = self.even_batches if even_batches is None else even_batches
        if not even and self.num_processes > 1:
            raise ConfigError(
                "join_uneven_inputs(even_batches=False) lets ranks run out of batches at different "
                "steps, but under hf_speed every rank takes part in every step, and updates a part "
                "that the others need. Leave even_batches=True, or give a rank without rows a loss "
                "of zero."
            )
        loaders = [each for each in self._dataloaders if hasattr(each, "batch_sampler")]
        samplers = {id(each.batch_sampler): each.batch_sampler for each in loaders}
        before = [
            (each, each.even_batches)
            for each in samplers.values()
            if even_batches is not None and hasattr(each, "even_batches")
        ]
        try:
            for sampler, _ in before:
                sampler.even_batches = even
            yield
        finally:
            for sampler, value in before:
                sampler.even_batches = value

    def unscale_gradients(
        self, optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None = None
    ) -> None:
        """Nothing under hf_speed: clipping and the step see unscaled gradients."""
        if self.hf_speed_config is None:
            super().unscale_gradients(optimizer)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
    ) -> Tensor | None:
        """Clip a prepared model's gradient by its norm over all ranks; one scalar all-reduce.

        Returns:
            The norm before clipping, 0-d.

        Raises:
            ConfigError: `parameters` are some of a prepared model's trainable parameters, but not
                all.
        """
        parameters = _listed(parameters)
        engine = engine_to_clip(self.engines, parameters)
        if engine is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        return engine.clip_grad_norm_(max_norm, norm_type)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """Clamp every element of a whole prepared model's gradient to +-`clip_value`.

        Raises:
            ConfigError: `parameters` are some of a prepared model's trainable parameters, but not
                all.
        """
        parameters = _listed(parameters)
        engine = engine_to_clip(self.engines, parameters)
        if engine is None:
            super().clip_grad_value_(parameters, clip_value)
        else:
            engine.clip_grad_value_(clip_value)

    # ---- reading and writing ----

    def get_state_dict(
        self,
        model: nn.Module,
        unwrap: bool = True,  # noqa: FBT001, FBT002 - accelerate's signature
    ) -> dict[str, Any]:
        """The full state dict; collective. At stage 3 rank 0 has it on the host, others get {}."""
        engine = engine_of(model) if self.hf_speed_config is not None else None
        if engine is None:
            return super().get_state_dict(model, unwrap=unwrap)
        if self.state_weights is None:
            return full_state_dict(engine)
        # save_state asks for every model's weights; at stage 3 the engine writes them without
        # gathering them all.
        weights = {} if engine.is_sharded else full_state_dict(engine)
        self.state_weights.append((engine, weights))
        return weights

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,  # noqa: FBT001, FBT002 - accelerate's signature
    ) -> None:
        """Write the full weights as accelerate does; collective.

        At stage 3 every rank writes the files that it owns, and only one file's worth is in memory
        at a time.
        """
        engine = engine_of(model) if self.hf_speed_config is not None else None
        if engine is None or not safe_serialization:
            super().save_model(model, save_directory, max_shard_size, safe_serialization)
        else:
            max_shard_bytes = convert_file_size_to_int(max_shard_size)
            write_model(engine, os.fspath(save_directory), max_shard_bytes=max_shard_bytes)
        self.wait_for_everyone()


def _check_whole(engine: Engine, model: nn.Module) -> None:
    """Refuse a model wrapped after it was prepared: its engine lacks the new parameters."""
    extra = ids_of(model.parameters()) - ids_of(engine.model.parameters())
    if extra:
        raise ConfigError(
            f"{type(model).__name__} has {len(extra)} parameters more than the "
            f"{type(engine.model).__name__} inside it, "
            "which was prepared before. Add adapters and heads first, then prepare the outermost "
            "model once."
        )


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
