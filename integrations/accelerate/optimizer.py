"""accelerate's wrapper around an optimizer, which here asks the engine about skipped steps."""

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from hf_speed.engine import Engine


class SpeedOptimizer(AcceleratedOptimizer):
    """accelerate's wrapper around the user's optimizer, which an engine steps on shards.

    The optimizer object stays the user's: the engine works through its step hooks. `engine` is None
    until the model that the optimizer trains has been prepared.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Wrap `optimizer`.

        Not placed on the device, which would copy its state through load_state_dict: the engine's
        shards are there. No GradScaler: the engine scales the loss.
        """
        super().__init__(optimizer, device_placement=False, scaler=None)
        self.engine: Engine | None = None

    @property
    def step_was_skipped(self) -> bool:
        """Whether every rank skipped the last step, because a gradient overflowed in fp16."""
        return self.engine is not None and self.engine.step_was_skipped

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, whose process groups belong to this process."""
        return {**super().__getstate__(), "engine": None}
