"""The Trainer on an engine: transformers' own loop, with eight of its methods extended.

    Trainer = integrate_trainer(transformers.Trainer)      # or trl.SFTTrainer, or a class of your own

The Trainer drives its Accelerator; that Accelerator becomes ours (create_accelerator_and_postprocess), and from there
on training, evaluation, accumulation and clipping need nothing here. What is left is what the Trainer reads or writes
behind the Accelerator's back: weights and optimizer state in checkpoints, one loss factor, and its log lines. Every
method calls super(), and without a config does nothing else.
"""

import functools
import inspect
import os
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from hf_speed.engine import Engine, engine_of
from hf_speed.errors import ConfigError
from hf_speed.integrations.accelerate import Accelerator
from hf_speed.integrations import weights
from hf_speed.integrations.transformers.arguments import config_of
from hf_speed.integrations.transformers.loading import sliced_loading, slices_wanted
from hf_speed.integrations.transformers.metrics import StepMeter


class HfSpeedTrainerMixin(transformers.Trainer):
    """What hf_speed adds to a Trainer class; see `integrate_trainer`."""

    _meter: StepMeter | None = None

    # ---- set-up ----

    def create_accelerator_and_postprocess(self) -> None:
        """As the base class does; its Accelerator then becomes ours."""
        super().create_accelerator_and_postprocess()
        config = config_of(self.args)
        if config is None:
            return
        Accelerator.adopt(self.accelerator, config)
        # The base class bound this to the method of the class that the Accelerator had before.
        self.gather_function = self.accelerator.gather_for_metrics
        if "use_gather_object" in inspect.signature(self.gather_function).parameters:
            self.gather_function = functools.partial(
                self.gather_function, use_gather_object=self.args.eval_use_gather_object
            )

    @property
    def is_hf_speed_enabled(self) -> bool:
        """Whether this Trainer runs on an engine."""
        return isinstance(self.accelerator, Accelerator) and self.accelerator.hf_speed_config is not None

    @property
    def reports_stats(self) -> bool:
        """Whether log lines carry hf_speed's numbers (`debug.stats`)."""
        config = self.accelerator.hf_speed_config if isinstance(self.accelerator, Accelerator) else None
        return config is not None and config.debug.stats

    @property
    def _engine(self) -> Engine | None:
        return engine_of(self.model) if self.is_hf_speed_enabled else None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does, with our callback last: it reads what the others decided."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_hf_speed_enabled and self._meter is None:
            self._meter = StepMeter(self)
            self.add_callback(self._meter)
        return prepared

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the base class does; from_pretrained inside it reads slices at stage 3.

        The process groups of the model that this one replaces are given back.
        """
        previous = self._engine if isinstance(self.model, nn.Module) else None
        if previous is not None:
            previous.mesh.close()
        config = self.accelerator.hf_speed_config if isinstance(self.accelerator, Accelerator) else None
        with sliced_loading(slices_wanted(config)):
            return super().call_model_init(trial)

    # ---- a step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the base class does; counts the batch's tokens."""
        if self._meter is not None:
            self._meter.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the base class does, with hf_speed's numbers on the lines of the training loss."""
        if self._meter is not None and "loss" in logs:
            logs |= self._meter.take_line()
        super().log(logs, start_time)

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Write a Hub model, every rank its own files. Collective."""
        engine = self._engine
        if engine is None:
            super().save_model(output_dir, _internal_call)
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if weights.is_peft(engine.model) or not isinstance(self.model, PreTrainedModel):
            gather = weights.adapter_state if weights.is_peft(engine.model) else weights.full_state_dict
            # The base class knows the layouts of PEFT and of bare modules; ranks that do not write return at once.
            self._save(output_dir, state_dict=gather(engine))
        else:
            weights.write_model(engine, output_dir)
            if self.args.should_save:
                self._save_companions(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_companions(self, output_dir: str) -> None:
        """What a Trainer puts beside the weights: the tokenizer and the arguments."""
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the engine's shards from every rank, and the scheduler from the main one. Collective."""
        engine = self._engine
        if engine is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine.save(output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing before prepare: the engine reads weights in slices, after it."""
        if not self.is_hf_speed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read weights, the engine's shards (whatever the world that wrote them) and the scheduler. Collective.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
            ConfigError: it holds the optimizer state of plain transformers.
        """
        engine = self._engine
        if engine is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)) and not weights.has_engine_state(checkpoint):
            raise ConfigError(
                f"{checkpoint} was written without hf_speed: its {OPTIMIZER_NAME} holds whole tensors by number. Start "
                f"from its weights alone (from_pretrained({checkpoint!r})), or resume it with hf_speed=None."
            )
        weights.load_model(engine, checkpoint)
        if weights.has_engine_state(checkpoint):
            engine.load(checkpoint)
        scheduler = os.path.join(checkpoint, SCHEDULER_NAME)
        if os.path.isfile(scheduler):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights into the engine. Collective."""
        engine = self._engine
        if engine is None:
            super()._load_best_model()
        else:
            weights.load_model(engine, self.state.best_model_checkpoint)


class Trainer(HfSpeedTrainerMixin, transformers.Trainer):
    """transformers.Trainer on an engine, where its arguments carry `hf_speed`."""


def integrate_trainer(base: type) -> type:
    """A Trainer class like `base` that obeys `hf_speed`; `base` itself if it has been integrated already.

    Args:
        base: transformers.Trainer or a subclass, such as trl.SFTTrainer.

    Raises:
        ConfigError: `base` is not a Trainer class.
    """
    if not (isinstance(base, type) and issubclass(base, transformers.Trainer)):
        raise ConfigError(f"integrate_trainer needs transformers.Trainer or a subclass of it, not {base!r}.")
    if issubclass(base, HfSpeedTrainerMixin):
        return base
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (HfSpeedTrainerMixin, base), namespace)
