"""accelerate's wrapper around a learning-rate scheduler, which here counts batches."""

from collections.abc import Iterable
from math import inf
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor


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


class OwnRates:
    """The learning rates that schedulers begin from in this run.

    A scheduler's state brings those of the run that was saved; of another kind of optimizer they
    mean nothing here.

    Args:
        schedulers: plain or wrapped; those without `base_lrs` are left alone.
    """

    def __init__(self, schedulers: Iterable[Any]) -> None:
        inner = (getattr(each, "scheduler", each) for each in schedulers)
        self._found = [(each, list(each.base_lrs)) for each in inner if hasattr(each, "base_lrs")]

    def restore(self, optimizers: Iterable[Any]) -> None:
        """Put them back, at the step at which the loaded states are, for these optimizers."""
        groups = {id(group) for each in optimizers for group in each.param_groups}
        for scheduler, own in self._found:
            here = scheduler.optimizer.param_groups
            if not any(id(group) in groups for group in here):
                continue
            pairs = zip(own, scheduler.base_lrs, strict=True)
            factors = [mine / stored if stored else 1.0 for mine, stored in pairs]
            rates = zip(scheduler._last_lr, factors, strict=True)
            scheduler._last_lr = [float(rate) * factor for rate, factor in rates]
            scheduler.base_lrs = own
            for group, rate in zip(here, scheduler._last_lr, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
