"""Where a run stands in its data, in samples.

The Trainer finds its place by counting update steps, which is right as long as an update has as
many samples as before. Samples are the measure that meshes and batch sizes share: a checkpoint says
how many passes over the data were completed, and how many samples of the one after were seen.

    same global batch    the next batch is the one that would have come, on any mesh
    another one          the next update begins at the sample that would have come; where that falls
                         within an update of the new size, at the update's start: some samples are
                         seen again, none is left out
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.reader import parse_manifest
from hf_speed.engine import engine_of
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger

NOTE = "position"
"""Under this name of an engine's notes."""

_log = get_logger(__name__)


class DataPosition(NamedTuple):
    """A place in the data.

    Attributes:
        passes: completed.
        samples: of the pass after, by all ranks together.
        batch: samples that an update had.
        step: update steps of the run so far.
    """

    passes: int
    samples: int
    batch: int
    step: int

    @classmethod
    def of_notes(cls, notes: object, where: str) -> "DataPosition | None":
        """What a checkpoint says; None where it says nothing.

        Raises:
            CheckpointError: it says something else than positions.
        """
        value = notes.get(NOTE) if isinstance(notes, Mapping) else None
        if value is None:
            return None
        found = value if isinstance(value, Mapping) else {}
        counts = [each for each in map(found.get, cls._fields) if _is_count(each)]
        if len(counts) < len(cls._fields) or counts[2] == 0:
            raise CheckpointError(
                f"{where}: notes.{NOTE} is {value!r}, not counts of {', '.join(cls._fields)}."
            )
        return cls(*counts)


class Start(NamedTuple):
    """Where a run begins, in updates of its own size.

    Attributes:
        passes: completed.
        updates: of the pass after.
        samples: of it, the updates' all together.
        repeated: samples that are seen again.
    """

    passes: int
    updates: int
    samples: int
    repeated: int


def start_after(position: DataPosition, *, batch: int, updates_per_pass: int | None) -> Start:
    """Where to go on with `batch` samples an update.

    Args:
        position: where the checkpoint stands.
        batch: of this run.
        updates_per_pass: of this run; None: not known, of a stream.
    """
    updates, repeated = divmod(position.samples, batch)
    if updates_per_pass is not None and updates >= updates_per_pass:
        return Start(position.passes + 1, 0, 0, 0)
    return Start(position.passes, updates, updates * batch, repeated)


class _Lengths(NamedTuple):
    """What the Trainer derives from a data loader, in its order."""

    num_train_epochs: int
    num_update_steps_per_epoch: int
    num_examples: int
    num_train_samples: int
    total_train_batch_size: int
    steps_in_epoch: int | None
    max_steps: int


def lengths_from(
    lengths: _Lengths, start: Start, *, step: int, by_passes: bool, is_stream: bool
) -> _Lengths:
    """What is left to do, counted from `start` and not from the step.

    Args:
        lengths: of a run from the beginning.
        start: where this one goes on.
        step: update steps so far, of whatever size.
        by_passes: the run ends after passes over the data (num_train_epochs), not after max_steps.
        is_stream: the data has no length.
    """
    if is_stream:
        return lengths
    per_pass = lengths.num_update_steps_per_epoch
    done = start.passes * per_pass + start.updates
    if by_passes:
        return lengths._replace(max_steps=step + max(lengths.max_steps - done, 0))
    passes = -(-(done + max(lengths.max_steps - step, 0)) // per_pass)
    return lengths._replace(num_train_epochs=max(passes, start.passes + 1))


class _PassCounter(TrainerCallback):
    """Counts passes over the data, and the updates of the current one.

    Attributes:
        start: of the pass.
        step: of the run, when the pass began here.
        has_ended: whether the data has.
    """

    def __init__(self) -> None:
        self.begin_at(Start(0, 0, 0, 0))

    def begin_at(self, start: Start) -> None:
        """The next pass is this one."""
        self.start = start._replace(passes=start.passes - 1)
        self._next: Start | None = start
        self.step = 0
        self.has_ended = False

    def on_epoch_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """A pass begins."""
        self.start = self._next or Start(self.start.passes + 1, 0, 0, 0)
        self._next, self.step, self.has_ended = None, state.global_step, False

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """It ends: with the data, or because the run does."""
        self.has_ended = not (control.should_training_stop or control.should_epoch_stop)

    def position(self, step: int, *, batch: int, updates_per_pass: int | None) -> DataPosition:
        """Where the run stands after `step` updates."""
        updates = self.start.updates + step - self.step
        if self.has_ended or (updates_per_pass is not None and updates >= updates_per_pass):
            return DataPosition(self.start.passes + 1, 0, batch, step)
        samples = self.start.samples + (step - self.step) * batch
        return DataPosition(self.start.passes, samples, batch, step)


class PositionedTrainer(transformers.Trainer):
    """The part of a Trainer on an engine that finds its place in the data."""

    _passes: _PassCounter | None = None
    _resumed: str | None = None
    _data_start: Start | None = None
    _updates_per_pass: int | None = None

    @property
    def is_hf_speed_enabled(self) -> bool:
        """Whether this Trainer runs on an engine; without one nothing here does anything."""
        return False

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - the Trainer's signature
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the base class does."""
        self._resumed = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the base class does; what is left to do is counted from the data's position.

        Raises:
            CheckpointError: the checkpoint's position is none.
        """
        values = super().set_initial_training_values(args, dataloader)
        if not self.is_hf_speed_enabled:
            return values
        lengths = _Lengths(*values)
        is_stream = _is_stream(dataloader)
        self._updates_per_pass = None if is_stream else lengths.num_update_steps_per_epoch
        position = None if self._resumed is None else _position_in(self._resumed)
        self._data_start = None
        if position is None:
            return tuple(lengths)
        batch = lengths.total_train_batch_size
        start = start_after(position, batch=batch, updates_per_pass=self._updates_per_pass)
        by_passes = args.max_steps <= 0
        left = lengths_from(
            lengths, start, step=position.step, by_passes=by_passes, is_stream=is_stream
        )
        if args.ignore_data_skip:
            start = Start(start.passes, 0, 0, 0)
        self._data_start = start
        _tell(position, start, batch, left.max_steps, args)
        return tuple(left)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the base class does; the place in the data is that of the checkpoint, in samples."""
        passes, batches = super()._init_training_state(*args, **kwargs)
        if not self.is_hf_speed_enabled:
            return passes, batches
        if self.state.logging_steps is None:
            # An imported checkpoint of no Trainer's says no intervals: they are this run's.
            self.state.compute_steps(self.args, self.state.max_steps)
        per_update = self.args.gradient_accumulation_steps
        start = self._data_start
        if start is None:
            batch = self.get_total_train_batch_size(self.args)
            updates = batches // per_update
            start = Start(passes, updates, updates * batch, 0)
        if self._passes is None:
            self._passes = _PassCounter()
            self.add_callback(self._passes)
        self._passes.begin_at(start)
        return start.passes, start.updates * per_update

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the base class does; says where the run stands in its data."""
        engine = None if self.model is None else engine_of(self.model)
        if engine is not None and self._passes is not None:
            batch = self.get_total_train_batch_size(self.args)
            position = self._passes.position(
                self.state.global_step, batch=batch, updates_per_pass=self._updates_per_pass
            )
            engine.notes[NOTE] = position._asdict()
        super()._save_checkpoint(model, trial)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 62


def _is_stream(dataloader: Any) -> bool:
    try:
        return len(dataloader) == 0
    except TypeError:
        return True


def _position_in(checkpoint: str) -> DataPosition | None:
    path = Path(checkpoint) / MANIFEST_PATH
    if not path.is_file():
        return None
    return DataPosition.of_notes(parse_manifest(Path(checkpoint)).meta.get("notes"), str(path))


def _tell(
    position: DataPosition, start: Start, batch: int, max_steps: int, args: TrainingArguments
) -> None:
    """One line: information where nothing has changed, else a warning."""
    place = (
        f"Going on after step {position.step} at sample {start.samples} of pass {start.passes + 1} "
        f"over the data"
    )
    if batch == position.batch:
        _log.info("%s.", place)
        return
    text = (
        f"{place}: an update has {batch} samples now and had {position.batch}. The run ends at "
        f"step {max_steps}, by which its learning rate is scheduled"
    )
    if start.repeated:
        text += (
            f"; {start.repeated} samples are seen again, since {position.samples} is no multiple "
            f"of {batch}"
        )
    if getattr(args, "train_sampling_strategy", None) == "group_by_length":
        text += (
            "; 'group_by_length' orders the data by the size of a batch, so that other samples "
            "come in this pass than would have"
        )
    _log.warning("%s.", text)
