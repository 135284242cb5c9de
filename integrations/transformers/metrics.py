"""What hf_speed adds to the Trainer's own log lines, so that TensorBoard, W&B and the rest show it.

A step's numbers are taken from the engine right after the step, on every rank, and the ranks' token
counts are added up only where a line will be written: one scalar all-reduce a line, entered by all
ranks because all count the same steps.
"""

import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hf_speed.engine import Engine


class Metered(Protocol):
    """What is asked of a Trainer."""

    accelerator: Any
    model: Any

    @property
    def speed_engine(self) -> "Engine | None":
        """The engine of the model that is trained."""
        ...

    @property
    def reports_stats(self) -> bool:
        """Whether log lines carry hf_speed's numbers."""
        ...


class StepMeter(TrainerCallback):
    """Counts tokens, and turns the engine's statistics into log entries.

    Entries: `tokens_per_second` of all ranks together since the last line; `bytes_sent_per_step` by
    one rank, evaluation between the steps included; `peak_<tier>_bytes` of memory on one rank;
    `loss_scale` in fp16 only. The gradient norm is the Trainer's own entry.
    """

    def __init__(self, trainer: Metered) -> None:
        self._trainer = trainer
        self._line: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        self._tokens = 0
        self._steps = 0
        self._since = time.perf_counter()
        self._bytes_before = self._bytes_sent()

    def _bytes_sent(self) -> int:
        engine = self._trainer.speed_engine
        return 0 if engine is None else engine.stats().bytes_sent

    def count(self, inputs: dict[str, Any]) -> None:
        """Add the tokens of one micro-batch of this rank."""
        name = getattr(self._trainer.model, "main_input_name", "input_ids")
        value = inputs.get(name)
        if isinstance(value, torch.Tensor):
            self._tokens += value.numel()

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the callback's signature, and below
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Start the clock."""
        self._restart()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the callback's signature, and below
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Take the step's numbers if a line is due; runs after the callback that decides."""
        self._steps += 1
        engine = self._trainer.speed_engine
        if not control.should_log or engine is None or not self._trainer.reports_stats:
            return
        tokens = torch.tensor(
            [self._tokens], dtype=torch.int64, device=self._trainer.accelerator.device
        )
        accelerator = self._trainer.accelerator
        # Ranks of one pipeline and its slices have counted the same batch.
        total = int(accelerator.gather(tokens).sum()) // accelerator.num_sharing
        elapsed_s = time.perf_counter() - self._since
        stats = engine.stats()
        sent = (stats.bytes_sent - self._bytes_before) / self._steps
        self._line = {"tokens_per_second": total / elapsed_s, "bytes_sent_per_step": sent}
        self._line |= {f"peak_{tier}_bytes": peak for tier, peak in stats.peak_bytes.items()}
        if engine.config.loss_scale is not None:
            self._line["loss_scale"] = stats.loss_scale
        self._restart()

    def take_line(self) -> dict[str, float]:
        """The entries of the line that is being written; each is written once."""
        line, self._line = self._line, {}
        return line
