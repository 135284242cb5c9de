"""accelerate's wrapper around a learning-rate scheduler, which here counts batches."""

from math import inf
from typing import Any

from accelerate.scheduler import AcceleratedScheduler


class SpeedScheduler(AcceleratedScheduler):
    """accelerate's wrapper, where several processes see one batch.

    accelerate steps a scheduler once for every process, since each took a batch. Here a step takes
    as many batches as there are data-parallel ranks.

    Args:
        scheduler: the user's.
        optimizers: those whose steps it follows.
        num_batches: batches that a step takes.
        kwargs: as for AcceleratedScheduler.
    """

    def __init__(self, scheduler: Any, optimizers: Any, *, num_batches: int, **kwargs: Any) -> None:
        super().__init__(scheduler, optimizers, **kwargs)
        self._num_batches = num_batches

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As accelerate's: with the optimizer, and once for every batch."""
        waits = not self.gradient_state.sync_gradients or any(
            each.step_was_skipped for each in self.optimizers
        )
        if not self.step_with_optimizer or self.split_batches or waits:
            super().step(*args, **kwargs)
            return
        # Where the last batches are incomplete there are a few steps more than were planned for.
        last = getattr(self.scheduler, "total_steps", inf)
        for _ in range(self._num_batches):
            if self.scheduler._step_count <= last:
                self.scheduler.step(*args, **kwargs)
