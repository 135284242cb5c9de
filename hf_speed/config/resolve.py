"""SpeedConfig -> ResolvedConfig: every choice left open is made here, once, printed once.

`resolve` is pure: what it depends on (world, dtypes, bytes) comes in as arguments, so a plan can be
made for a machine that is not at hand.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hf_speed.config.offload import ResolvedOffload, check_offload, resolve_offload
from hf_speed.config.parallel import ResolvedPipe, check_tensor, check_world, resolve_pipe
from hf_speed.config.planner import Memory, Needed, choose
from hf_speed.config.tree import LossScaleConfig, SpeedConfig, ZeroConfig
from hf_speed.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig:
    """A config with nothing left open. `None` for a dtype means: the parameter's own."""

    world_size: int
    """Number of processes; the product of the axes."""
    pp: int
    """Pipeline ranks."""
    tp: int
    """Ranks that divide each layer."""
    pipe: ResolvedPipe
    """How a batch goes through the pipeline ranks."""
    sequence_parallel: bool
    """Divide the sequence between sliced layers too."""
    stage: int
    """0 to 3."""
    dp_replicate: int
    """Groups that each hold a whole copy of the sharded state."""
    dp_shard: int
    """Ranks that share one copy."""
    units: Literal["auto"] | tuple[str, ...]
    """Module classes gathered as one; 'auto': the model's own blocks, found by the engine."""
    prefetch_units: int
    """Units gathered ahead (stage 3)."""
    regather: bool
    """Stage 3: gather again in the backward."""
    generate: Literal["gathered", "streamed"]
    """Stage 3: how `generate()` holds the parameters."""
    param_dtype: torch.dtype
    """Dtype in which the model came (of most of its elements)."""
    compute_dtype: torch.dtype | None
    """Dtype that parameters are cast to; None: each keeps its own."""
    master_dtype: torch.dtype | None
    """Dtype of the copy that the optimizer updates; None: no copy."""
    reduce_dtype: torch.dtype | None
    """Dtype in which gradients travel; None: the gradient's own."""
    accumulate_dtype: torch.dtype | None
    """Dtype in which gradients add up; None: the gradient's own."""
    loss_scale: LossScaleConfig | None
    """Dynamic loss scaling; None unless fp16 computes."""
    offload: ResolvedOffload
    """Which tier holds what."""
    max_shard_bytes: int
    """Largest file of the model, in bytes."""
    asynchronous: bool
    """Write checkpoints behind the training."""
    mirror: str | None
    """Where finished checkpoints are copied to."""
    journal: bool
    """Record and compare collectives."""
    timeout_s: float
    """Seconds that a collective waits."""
    stats: bool
    """Add measurements to the logs."""
    stage_reason: str
    """Why this stage: 'set', or how it was chosen."""

    def rows(self) -> list[tuple[str, str, str]]:
        """(config path, value, why) of everything that was resolved, in the order of the tree."""
        own = "each parameter's own"
        scale = self.loss_scale
        working = self.compute_dtype or self.param_dtype
        rows = [
            *self._layout_rows(),
            ("mesh.dp_replicate", str(self.dp_replicate), "copies of the sharded state"),
            ("mesh.dp_shard", str(self.dp_shard), f"ranks to a copy, of {self.world_size}"),
            ("zero.stage", str(self.stage), self.stage_reason),
            (
                "zero.units",
                self.units if isinstance(self.units, str) else ", ".join(self.units),
                "gathered as one",
            ),
            ("model parameters", _name(self.param_dtype), "as they came"),
            (
                "working parameters",
                _name(self.compute_dtype) if self.compute_dtype else own,
                "forward and backward",
            ),
            (
                "precision.master_dtype",
                _name(self.master_dtype) if self.master_dtype else "none",
                self._master_why(),
            ),
            ("precision.reduce_dtype", _name(self.reduce_dtype or working), "gradients travel"),
            (
                "precision.accumulate_dtype",
                _name(self.accumulate_dtype or working),
                "gradients add up",
            ),
            (
                "precision.loss_scale",
                f"{scale.initial:g}, dynamic" if scale else "none",
                "fp16 only",
            ),
            *self.offload.rows(),
        ]
        after = next(i for i, row in enumerate(rows) if row[0] == "zero.units") + 1
        rows[after:after] = self._gather_rows()
        return rows

    def _gather_rows(self) -> list[tuple[str, str, str]]:
        """Of how stage 3 gathers."""
        if self.stage != 3:
            return []
        rows = []
        if self.pp > 1:
            rows.append(("pipe.gather", self.pipe.gather, "how long parameters stay gathered"))
        if self.pp == 1 or self.pipe.gather == "microbatch":
            rows += [
                ("zero.prefetch_units", str(self.prefetch_units), "units gathered ahead"),
                ("zero.regather", str(self.regather).lower(), "gather again in the backward"),
            ]
        return [*rows, ("zero.generate", self.generate, "parameters during generate()")]

    def _layout_rows(self) -> list[tuple[str, str, str]]:
        """Of the axes beyond data parallelism, where there are any."""
        rows = []
        if self.pp > 1:
            rows += [("mesh.pp", str(self.pp), "pipeline ranks"), *self.pipe.rows()]
        if self.tp > 1:
            divided = "true" if self.sequence_parallel else "false"
            rows += [
                ("mesh.tp", str(self.tp), "ranks that divide each layer"),
                ("tensor.sequence_parallel", divided, "the sequence is divided between layers"),
            ]
        return rows

    def table(self) -> str:
        """The resolved config as aligned text, one line a row."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(
            f"{path:<{widths[0]}}  {value:<{widths[1]}}  {why}" for path, value, why in rows
        )

    def _master_why(self) -> str:
        return (
            "the optimizer updates these, where a parameter is 16-bit"
            if self.master_dtype
            else "updated in place"
        )


def resolve(
    config: SpeedConfig,
    *,
    world_size: int,
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    needed: Needed | None = None,
    memory: Memory | None = None,
    device_type: str = "cpu",
) -> ResolvedConfig:
    """Make every choice that `config` leaves open.

    Args:
        config: what the user set.
        world_size: number of processes.
        param_dtype: dtype of the model's parameters (of most of its elements).
        compute_dtype: of mixed precision; None: what the parameters have.
        needed: bytes per rank of a stage and tiers (`engine.estimate`); with `memory`, what the
            stage and the tiers that are left open are chosen by.
        memory: what there is for one rank.
        device_type: where the model computes, "cpu" or "cuda".

    Raises:
        ConfigError: the axes do not multiply to the world; a value cannot take effect at this
            stage, dtype, tier or device; nothing that the config allows fits.
    """
    sizes, pipe = check_world(config, world_size), resolve_pipe(config)
    computes = compute_dtype or param_dtype
    _check_effective(config, computes=computes, device_type=device_type)
    choice = choose(config, needed=needed, memory=memory)
    precision = config.precision
    compute_dtype = None if precision.working_dtype == "own" else compute_dtype
    return ResolvedConfig(
        world_size=world_size,
        pp=sizes.pp,
        tp=sizes.tp,
        pipe=pipe,
        sequence_parallel=config.tensor.sequence_parallel,
        stage=choice.stage,
        dp_replicate=sizes.dp_replicate,
        dp_shard=sizes.dp_shard,
        units=config.zero.units,
        prefetch_units=config.zero.prefetch_units,
        regather=config.zero.regather,
        generate=config.zero.generate,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        master_dtype=torch.float32 if precision.master_dtype == "float32" else None,
        reduce_dtype=_dtype(precision.reduce_dtype) if precision.reduce_dtype else compute_dtype,
        accumulate_dtype=torch.float32 if precision.accumulate_dtype == "float32" else None,
        loss_scale=precision.loss_scale if computes is torch.float16 else None,
        offload=resolve_offload(config.offload, tiers=choice.tiers, reason=choice.tiers_reason),
        max_shard_bytes=config.checkpoint.max_shard_bytes,
        asynchronous=config.checkpoint.asynchronous,
        mirror=config.checkpoint.mirror,
        journal=config.debug.journal,
        timeout_s=config.debug.timeout_s,
        stats=config.debug.stats,
        stage_reason=choice.stage_reason,
    )


def _check_effective(config: SpeedConfig, *, computes: torch.dtype, device_type: str) -> None:
    """Refuse what could not take effect, section by section."""
    check_tensor(config)
    check_offload(config.offload, device_type=device_type)
    _check_zero(config.zero)
    _check_loss_scale(config.precision.loss_scale, computes)


def _check_zero(zero: ZeroConfig) -> None:
    """Refuse what only stage 3 reads where the user set another stage."""
    default = ZeroConfig()
    for name in ("prefetch_units", "regather", "generate"):
        value = getattr(zero, name)
        if zero.stage not in (None, 3) and value != getattr(default, name):
            raise ConfigError(
                f"zero.{name}={value!r} takes effect at stage 3 only, but zero.stage={zero.stage}. "
                f"Remove zero.{name}, or set zero.stage=3."
            )


def _check_loss_scale(loss_scale: LossScaleConfig, working: torch.dtype) -> None:
    if loss_scale != LossScaleConfig() and working is not torch.float16:
        raise ConfigError(
            f"precision.loss_scale is set, but the model computes in {_name(working)}, which needs "
            "none. Remove it, or compute in fp16 with TrainingArguments(fp16=True) or "
            "Accelerator(mixed_precision='fp16')."
        )


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
