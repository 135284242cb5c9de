"""Which dtype each parameter computes in and is updated in, and the loss scale of fp16.

Source: Mixed Precision Training, arXiv:1710.03740, sections 3.1 and 3.2.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn

from hf_speed.config import LossScaleConfig
from hf_speed.zero.spec import Dtypes


class PrecisionPlan(NamedTuple):
    """The precision of a run.

    Attributes:
        compute: dtype of working parameters; None keeps each parameter's own.
        master: dtype that the optimizer updates 16-bit trainable parameters in; None keeps theirs.
        wire: dtype in which gradients travel; None is the compute dtype.
        accumulate: dtype in which gradients are summed over micro-steps; None is the compute dtype.
        keep_fp32: parts of module names whose parameters stay in fp32.
    """

    compute: torch.dtype | None
    master: torch.dtype | None
    wire: torch.dtype | None
    accumulate: torch.dtype | None
    keep_fp32: frozenset[str] = frozenset()

    def dtypes_of(self, name: str, parameter: nn.Parameter) -> Dtypes:
        """The dtypes of one parameter."""
        return self.dtypes_for(name, parameter.dtype, trainable=parameter.requires_grad)

    def dtypes_for(self, name: str, dtype: torch.dtype, *, trainable: bool) -> Dtypes:
        """The dtypes of a parameter that need not be at hand."""
        compute = dtype
        if self.compute is not None and compute.is_floating_point:
            kept = bool(self.keep_fp32.intersection(name.split(".")))
            compute = torch.float32 if kept else self.compute
        if not (trainable and compute.is_floating_point):
            return Dtypes(compute, compute, compute, compute)
        narrow = compute.itemsize < torch.float32.itemsize
        master = self.master if narrow and self.master is not None else compute
        wire = self.wire if self.wire is not None else compute
        accumulate = self.accumulate if narrow and self.accumulate is not None else compute
        if master == compute:
            # The optimizer reads gradients in the parameter's own dtype.
            accumulate = compute
        return Dtypes(compute, master, wire, accumulate)


def fp32_module_names(model: nn.Module) -> frozenset[str]:
    """Names that Transformers models list in `_keep_in_fp32_modules` and its strict variant."""
    names: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            listed: Collection[str] | None = getattr(module, attribute, None)
            names.update(listed or ())
    return frozenset(names)


def precision_table(rows: Iterable[tuple[str, int, Dtypes, bool]]) -> str:
    """One line for each combination of dtypes: what the run computes, keeps and sends in.

    Args:
        rows: (unit name, number of elements, dtypes, trainable) for each group.
    """
    totals: dict[tuple[Dtypes, bool], int] = {}
    for _, numel, dtypes, trainable in rows:
        totals[dtypes, trainable] = totals.get((dtypes, trainable), 0) + numel
    lines = ["parameters       compute   master    gradients  accumulated  trainable"]
    for (dtypes, trainable), numel in sorted(totals.items(), key=lambda item: -item[1]):
        compute, master, wire, accumulate = (str(each).removeprefix("torch.") for each in dtypes)
        if not trainable:
            master = wire = accumulate = "-"
        answer = "yes" if trainable else "no"
        lines.append(f"{numel:<16,} {compute:<9} {master:<9} {wire:<10} {accumulate:<12} {answer}")
    return "\n".join(lines)


class LossScaler:
    """The factor that keeps fp16 gradients above underflow.

    It halves once `hysteresis` steps have overflowed, doubles after `window` steps in a row that
    did not, and never falls below `floor`.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self._config = config
        self.scale = config.initial
        self._good_steps = 0
        self._tolerance = config.hysteresis

    def update(self, *, overflowed: bool) -> None:
        """Adapt to a step that was taken, or skipped because some rank's gradients overflowed."""
        if overflowed:
            self._good_steps = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self.scale = max(self.scale / 2.0, self._config.floor)
                self._tolerance = 1
            return
        self._good_steps += 1
        if self._good_steps % self._config.window == 0:
            self.scale *= 2.0
            self._tolerance = self._config.hysteresis

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "scale": self.scale,
            "good_steps": float(self._good_steps),
            "tolerance": float(self._tolerance),
        }

    def load(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.scale = state["scale"]
        self._good_steps = int(state["good_steps"])
        self._tolerance = int(state["tolerance"])
