"""The Trainer on an engine: transformers' own loop, with some of its methods extended.

    Trainer = integrate_trainer(transformers.Trainer)      # or trl.SFTTrainer, or a class of your
    own

The Trainer drives its Accelerator; that Accelerator becomes ours
(create_accelerator_and_postprocess), and from there on training, evaluation, accumulation and
clipping need nothing here. What is left is what the Trainer reads or writes behind the
Accelerator's back: weights and optimizer state in checkpoints, one loss factor, its log lines, and
how many processes see one batch. Every method calls super(), and without a config does nothing
else.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_speed.checkpoint import agreed
from hf_speed.checkpoint.stores import is_url
from hf_speed.engine import Engine, engine_of
from hf_speed.errors import ConfigError
from hf_speed.integrations import weights
from hf_speed.integrations.accelerate import Accelerator
from hf_speed.integrations.accelerate.scheduler import OwnRates
from hf_speed.integrations.hub.notes import notes_of
from hf_speed.integrations.remote import fetch_checkpoint, has_checkpoint
from hf_speed.integrations.transformers.arguments import config_of
from hf_speed.integrations.transformers.checkpoints import (
    RunningCheckpoint,
    correct_latest,
    finish,
    running_checkpoint,
    whole_arguments,
)
from hf_speed.integrations.transformers.loading import sliced_loading, slices_wanted
from hf_speed.integrations.transformers.metrics import StepMeter
from hf_speed.integrations.transformers.position import PositionedTrainer
from hf_speed.integrations.transformers.pushes import without_run_files
from hf_speed.integrations.transformers.resume import last_whole_checkpoint, require_resumable


class HfSpeedTrainerMixin(PositionedTrainer):
    """What hf_speed adds to a Trainer class; see `integrate_trainer`."""

    _meter: StepMeter | None = None
    _running: RunningCheckpoint | None = None

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
        return (
            isinstance(self.accelerator, Accelerator)
            and self.accelerator.hf_speed_config is not None
        )

    @property
    def reports_stats(self) -> bool:
        """Whether log lines carry hf_speed's numbers (`debug.stats`)."""
        config = (
            self.accelerator.hf_speed_config if isinstance(self.accelerator, Accelerator) else None
        )
        return config is not None and config.debug.stats

    @property
    def speed_engine(self) -> Engine | None:
        """The engine of the model that is trained; None before it is prepared."""
        if not self.is_hf_speed_enabled or self.model is None:
            return None
        return engine_of(self.model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does, with our callback last: it reads what the others decided."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_hf_speed_enabled and self._meter is None:
            self._meter = StepMeter(self)
            self.add_callback(self._meter)
        if self.speed_engine is not None:
            self.speed_engine.notes |= notes_of(self)
        return prepared

    @property
    def _num_stages(self) -> int:
        """Pipeline ranks; 1 without an engine."""
        config = (
            self.accelerator.hf_speed_config if isinstance(self.accelerator, Accelerator) else None
        )
        return 1 if config is None else config.mesh.pp

    def _check_loss(self) -> None:
        """Refuse losses that a pipeline's logits or whole weights would be needed for."""
        if self.args.use_liger_kernel and self._num_sharing > 1:
            raise ConfigError(
                "use_liger_kernel=True computes the loss from the whole weight of the head, which "
                "is on the last stage or in slices (mesh.pp, mesh.tp). Leave it out: with mesh.tp "
                "the loss is computed from slices of the logits."
            )
        asked = {
            f"label_smoothing_factor={self.args.label_smoothing_factor}": self.label_smoother,
            "compute_loss_func": self.compute_loss_func,
        }
        for name, value in asked.items():
            if value is not None and self._num_stages > 1:
                raise ConfigError(
                    f"{name} computes the loss from logits, but in a pipeline (mesh.pp="
                    f"{self._num_stages}) the model computes it, on its last stage, and returns "
                    f"nothing else in training. Leave it out, or set mesh.pp=1."
                )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the base class does; from_pretrained inside it reads slices at stage 3.

        The process groups of the model that this one replaces are given back.
        """
        previous = self.speed_engine if isinstance(self.model, nn.Module) else None
        if previous is not None:
            previous.saves.wait()
            previous.mesh.close()
        config = (
            self.accelerator.hf_speed_config if isinstance(self.accelerator, Accelerator) else None
        )
        with sliced_loading(wanted=slices_wanted(config)):
            return super().call_model_init(trial)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - the Trainer's signature
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the base class does; `True` resumes what `latest` names, or the newest whole one.

        An address, as in "s3://bucket/run", is downloaded first; so is the newest checkpoint of
        `checkpoint.mirror` where `True` finds none in output_dir.

        Raises:
            CheckpointError: the save of the checkpoint was cut short, or it is damaged.
            ConfigError: it holds the optimizer state of plain transformers; or the loss is to be
                computed where the model's parts are not.
        """
        self._check_loss()
        config = config_of(self.args)
        if config is not None:
            resume_from_checkpoint = self._local_checkpoint(
                asked=resume_from_checkpoint, mirror=config.checkpoint.mirror
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _local_checkpoint(
        self, *, asked: str | bool | None, mirror: str | None
    ) -> str | bool | None:
        """The directory to resume from; what was asked for where there is none. Collective."""
        root = Path(str(self.args.output_dir))
        if asked is True:
            found = last_whole_checkpoint(str(root))
            if found is None and mirror is not None and has_checkpoint(mirror):
                found = mirror
            # None: the base class says that there is none.
            asked = True if found is None else found
        if isinstance(asked, str):
            asked = fetch_checkpoint(asked, root) if is_url(asked) else asked
            require_resumable(asked)
        return asked

    # ---- ranks of one batch ----

    def get_tp_size(self) -> int:
        """Processes that see one batch: mesh.pp x mesh.tp; what the base class divides by."""
        return self._num_sharing if self.is_hf_speed_enabled else super().get_tp_size()

    @property
    def _num_sharing(self) -> int:
        """Processes that see one batch; 1 without an engine."""
        return self.accelerator.num_sharing if isinstance(self.accelerator, Accelerator) else 1

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As the base class does; it divides by the ranks of a batch also what it has not summed.

        Without average_tokens_across_devices a rank counts its own batch only.
        """
        count = super()._get_num_items_in_batch(batch_samples, device)
        summed = self.args.average_tokens_across_devices
        kept = summed or not isinstance(count, Tensor) or not _base_divides_tokens()
        return count if kept else count * self._num_sharing

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """As the base class does, counting each batch once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self._num_sharing

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does.

        Raises:
            ConfigError: a sampler that deals rows out to processes.
        """
        strategy = getattr(self.args, "train_sampling_strategy", None)
        if strategy == "batch_rebalance" and self._num_sharing > 1:
            raise ConfigError(
                f"train_sampling_strategy='batch_rebalance' deals rows out to all "
                f"{self.args.world_size} processes, but {self._num_sharing} of them share a batch "
                f"(mesh.pp x mesh.tp). Use 'random' or 'group_by_length'."
            )
        return super()._get_train_sampler(*args, **kwargs)

    # ---- a step ----

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As the base class does; counts the batch's tokens.

        Raises:
            ConfigError: a subclass's compute_loss reads what a pipeline does not return.
        """
        if self._meter is not None:
            self._meter.count(inputs)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except (AttributeError, KeyError, TypeError) as error:
            theirs = self._own_loss_class()
            if theirs is None or self._num_stages == 1:
                raise
            raise ConfigError(
                f"{theirs}.compute_loss failed with {type(error).__name__}: {error}. In a pipeline "
                f"(mesh.pp={self._num_stages}) a training forward returns the loss alone, computed "
                f"by the model on its last stage; logits are None. Read nothing else of the "
                f"outputs in training, or set mesh.pp=1."
            ) from error

    def _own_loss_class(self) -> str | None:
        """The class between this one and transformers' that has a compute_loss of its own."""
        known = (HfSpeedTrainerMixin, transformers.Trainer)
        kinds = (kind for kind in type(self).__mro__ if kind not in known)
        return next((kind.__name__ for kind in kinds if "compute_loss" in vars(kind)), None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the Trainer's signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As the base class does; a router's auxiliary loss counts once, whatever ranks and steps.

        The base class multiplies the whole loss by the number of ranks, since the part over tokens
        was divided by all ranks' tokens, and sums it over micro-steps for the same reason. The
        auxiliary part was divided by neither.
        """
        scaled = num_items_in_batch is not None and self._base_inflates_auxiliary
        if not self.is_hf_speed_enabled or not scaled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        auxiliary = self._weighted_auxiliary(outputs)
        if auxiliary is not None:
            averaged = self.args.average_tokens_across_devices
            counted = self.accelerator.num_processes if averaged else 1
            loss = loss - auxiliary * (counted - 1 / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    @functools.cached_property
    def _base_inflates_auxiliary(self) -> bool:
        """Whether the loss is transformers' own and treats all parts alike (5.23 does)."""
        base: Any = super().compute_loss
        own = base.__func__ is transformers.Trainer.compute_loss
        return own and "aux_loss" not in inspect.getsource(transformers.Trainer.compute_loss)

    def _weighted_auxiliary(self, outputs: Any) -> Tensor | None:
        """The auxiliary loss as the model added it to its own loss; None if it did not."""
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        if auxiliary is None or own_loss or not self.model_accepts_loss_kwargs:
            return None
        model: Any = self.model
        weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
        return None if not weight else weight * auxiliary.to(outputs["loss"].device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the base class does, with hf_speed's numbers on the lines of the training loss."""
        if self._meter is not None and "loss" in logs:
            logs |= self._meter.take_line()
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the base class does; older ones go when the new one is whole. Collective."""
        engine = self.speed_engine
        if engine is None:
            super()._save_checkpoint(model, trial)
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        directory = Path(self._get_output_dir(trial=trial)) / name
        with running_checkpoint(self.args, engine, directory) as running:
            self._running = running
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._running = None
        finish(running, directory, best=self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the base class does, when the files are there."""
        if self.speed_engine is not None:
            self.speed_engine.saves.wait()
        with whole_arguments(self.args, self._running), without_run_files():
            super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does, without the file that names the newest checkpoint."""
        with without_run_files():
            return super().push_to_hub(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does, after the last save.

        Raises:
            CheckpointError: on every rank; that save has failed.
        """
        if self.speed_engine is not None:
            self.speed_engine.saves.wait()
        output = super()._finalize_training(*args, **kwargs)
        if self.speed_engine is not None and self.is_world_process_zero():
            # At the end the base class may leave the best checkpoint alone.
            correct_latest(Path(str(self.args.output_dir)), self.state.best_model_checkpoint)
        return output

    def save_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,  # noqa: FBT001, FBT002 - the Trainer's signature
    ) -> None:
        """Write a Hub model, every rank its own files. Collective.

        As a part of a checkpoint it may be written behind the training; otherwise it is there on
        return.
        """
        engine = self.speed_engine
        if engine is None:
            super().save_model(output_dir, _internal_call)
            return
        home = str(output_dir if output_dir is not None else self.args.output_dir)
        with whole_arguments(self.args, self._running):
            self._write_model(engine, home)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, engine: Engine, home: str) -> None:
        """The weights and what belongs to them."""
        if weights.is_peft(engine.model) or not isinstance(self.model, PreTrainedModel):
            gather = (
                weights.adapter_state if weights.is_peft(engine.model) else weights.full_state_dict
            )
            # The base class knows the layouts of PEFT and of bare modules.
            state = gather(engine)
            engine.saves.wait()
            with agreed(engine.mesh.world, f"Saving the model to {home}"):
                # transformers 5.17 writes on whichever rank calls it: {} over the values of rank 0.
                if self.args.should_save:
                    self._save(home, state_dict=state)
        else:
            save = None if self._running is None else self._running.save
            weights.write_model(engine, home, save=save)
            with agreed(engine.mesh.world, f"Saving what belongs to the model to {home}"):
                if self.args.should_save:
                    self._save_companions(home)

    def _save_companions(self, output_dir: str) -> None:
        """What a Trainer puts beside the weights: the tokenizer and the arguments."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(output_dir)
        torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the engine's shards from every rank, and the scheduler. Collective."""
        engine = self.speed_engine
        if engine is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine.save(output_dir, save=None if self._running is None else self._running.save)
        with agreed(engine.mesh.world, f"Saving the scheduler to {output_dir}"):
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing before prepare: the engine reads weights in slices, after it."""
        if not self.is_hf_speed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read weights, the engine's shards (of any world) and the scheduler. Collective.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
        """
        engine = self.speed_engine
        if engine is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        weights.load_model(engine, checkpoint)
        change = engine.load(checkpoint) if weights.has_engine_state(checkpoint) else None
        scheduler = Path(checkpoint) / SCHEDULER_NAME
        if scheduler.is_file() and self.lr_scheduler is not None:
            own = OwnRates([self.lr_scheduler])
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
            if change is not None and change.has_own_rates:
                own.restore([engine.optimizer])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the base class does; on another mesh the ranks of one batch go on alike.

        The base class goes by processes, of which other ones share a batch there.
        """
        super()._load_rng_state(checkpoint)
        engine = self.speed_engine
        if engine is not None and checkpoint is not None:
            weights.restore_rng(engine, checkpoint)

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights into the engine. Collective."""
        engine, best = self.speed_engine, self.state.best_model_checkpoint
        if engine is None or best is None:
            super()._load_best_model()
        else:
            weights.load_model(engine, best)


@functools.cache
def _base_divides_tokens() -> bool:
    """Whether transformers' count of tokens goes by get_tp_size (5.23 does, 5.17 does not)."""
    return "get_tp_size" in inspect.getsource(transformers.Trainer._get_num_items_in_batch)


class Trainer(HfSpeedTrainerMixin, transformers.Trainer):
    """transformers.Trainer on an engine, where its arguments carry `hf_speed`."""


def integrate_trainer(base: type) -> type:
    """A Trainer class like `base` that obeys `hf_speed`; `base` itself if it does.

    Args:
        base: transformers.Trainer or a subclass, such as trl.SFTTrainer.

    Raises:
        ConfigError: `base` is not a Trainer class.
    """
    if not (isinstance(base, type) and issubclass(base, transformers.Trainer)):
        raise ConfigError(
            f"integrate_trainer needs transformers.Trainer or a subclass of it, not {base!r}."
        )
    if issubclass(base, HfSpeedTrainerMixin):
        return base
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (HfSpeedTrainerMixin, base), namespace)
