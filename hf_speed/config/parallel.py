"""The axes of the mesh and the pipeline: checked, and what is left open is filled in.

A field that could not take effect (a schedule where there is no pipeline) is refused.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Literal, NamedTuple

from hf_speed.config.tree import (
    MeshConfig,
    PipeConfig,
    Schedule,
    SpeedConfig,
    TensorConfig,
    ZeroConfig,
)
from hf_speed.errors import ConfigError

DEFAULT_CHUNKS = 2
"""Stages a pipeline rank has, for schedules that can have any number."""

CHUNKS_OF: dict[Schedule, int | None] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": None,
    "looped_bfs": None,
    "zb_h1": 1,
    "zb_h2": 1,
    "zb_v": 2,
    "v_half": 2,
    "v_min": 2,
    "dualpipe_v": 2,
}
"""Stages that a schedule puts on a rank; None: any number. As in `pipe.schedules`, which is above
this room."""


class MeshSizes(NamedTuple):
    """The size of every axis, outermost first; the product is the world."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def data(self) -> int:
        """Ranks that see different batches."""
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedPipe:
    """The pipeline with nothing left open but the number of microbatches, which a batch decides."""

    schedule: Schedule
    """Order of forwards and backwards."""
    microbatches: int | None
    """Pieces of a rank's batch; None: four a pipeline rank, or one a row."""
    chunks: int
    """Stages a pipeline rank has."""
    balance: Literal["parameters", "time"] | tuple[int, ...]
    """How layers are dealt out to stages."""
    gather: Literal["step", "microbatch"]
    """Stage 3: how long parameters stay gathered."""

    def rows(self) -> list[tuple[str, str, str]]:
        """(config path, value, why) of every choice."""
        cut = "auto" if self.microbatches is None else str(self.microbatches)
        balance = self.balance if isinstance(self.balance, str) else list(self.balance)
        return [
            ("pipe.schedule", self.schedule, "order of forwards and backwards"),
            ("pipe.microbatches", cut, "pieces of a rank's batch"),
            ("pipe.chunks", str(self.chunks), "stages a pipeline rank"),
            ("pipe.balance", str(balance), "layers are dealt out by"),
        ]


def check_world(config: SpeedConfig, world_size: int) -> MeshSizes:
    """The sizes of the axes, whose product is the world.

    Raises:
        ConfigError: the config asks for another number of processes.
    """
    mesh = config.mesh
    given = {axis: getattr(mesh, axis) for axis in ("pp", "dp_replicate", "tp")}
    rest = prod(given.values())
    shape = " x ".join(
        f"mesh.{axis}={size}" for axis, size in given.items() if size > 1 or axis == "dp_replicate"
    )
    if mesh.dp_shard is None:
        if world_size % rest:
            below = max(world_size // rest * rest, rest)
            raise ConfigError(
                f"{shape} does not divide the world of {world_size} processes. Launch a multiple "
                f"of {rest} processes, for example {below}, or set the axes so that their product "
                f"is a divisor of {world_size}."
            )
        return MeshSizes(mesh.pp, mesh.dp_replicate, world_size // rest, mesh.tp)
    if rest * mesh.dp_shard != world_size:
        raise ConfigError(
            f"{shape} x mesh.dp_shard={mesh.dp_shard} asks for {rest * mesh.dp_shard} "
            f"processes, but the world has {world_size}. Start it with `hf-speed launch -n "
            f"{rest * mesh.dp_shard}`, or leave mesh.dp_shard out."
        )
    return MeshSizes(mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.tp)


def resolve_pipe(config: SpeedConfig) -> ResolvedPipe:
    """Fill in what is left open of the pipeline.

    Raises:
        ConfigError: a value cannot take effect at this schedule, beside a pipeline, or without one.
    """
    pipe, mesh = config.pipe, config.mesh
    if mesh.pp == 1:
        _refuse_set(pipe, "pipe", "mesh.pp", mesh)
    else:
        _refuse_beside_pipeline(config)
    schedule: Schedule = pipe.schedule or "zb_h1"
    fixed = CHUNKS_OF[schedule]
    if pipe.chunks is not None and fixed is not None and pipe.chunks != fixed:
        raise ConfigError(
            f"pipe.chunks={pipe.chunks} takes no effect with pipe.schedule={schedule!r}, which has "
            f"{fixed} a rank. Remove pipe.chunks, or use 'interleaved' or 'looped_bfs'."
        )
    chunks = fixed or pipe.chunks or DEFAULT_CHUNKS
    if not isinstance(pipe.balance, str) and len(pipe.balance) != mesh.pp * chunks:
        raise ConfigError(
            f"pipe.balance={list(pipe.balance)} lists {len(pipe.balance)} stages, but mesh.pp="
            f"{mesh.pp} x {chunks} a rank makes {mesh.pp * chunks}. List one count for each stage."
        )
    if pipe.gather != "step" and config.zero.stage not in (None, 3):
        raise ConfigError(
            f"pipe.gather={pipe.gather!r} takes effect at stage 3 only, but zero.stage="
            f"{config.zero.stage}. Remove pipe.gather, or set zero.stage=3."
        )
    return ResolvedPipe(
        schedule=schedule,
        microbatches=pipe.microbatches,
        chunks=chunks,
        balance=pipe.balance,
        gather=pipe.gather,
    )


def _refuse_beside_pipeline(config: SpeedConfig) -> None:
    """Refuse what a pipeline does not read."""
    default = ZeroConfig()
    for name in ("prefetch_units", "regather"):
        value = getattr(config.zero, name)
        if config.pipe.gather == "step" and value != getattr(default, name):
            raise ConfigError(
                f"zero.{name}={value!r} takes no effect with pipe.gather='step' (mesh.pp="
                f"{config.mesh.pp}): the parameters of a pipeline stage are gathered once a step, "
                f"all of them. Remove zero.{name}, or set pipe.gather='microbatch'."
            )
    if config.offload.step == "speculative":
        raise ConfigError(
            f"offload.step='speculative' takes no effect with mesh.pp={config.mesh.pp}: a pipeline "
            f"reduces gradients once, after all its backwards, so no backward is left to update "
            f"in. Remove offload.step, or set mesh.pp=1."
        )


def check_tensor(config: SpeedConfig) -> None:
    """Refuse what only sliced layers read where there are none.

    Raises:
        ConfigError: a field of `tensor` is set and mesh.tp is 1.
    """
    if config.mesh.tp == 1:
        _refuse_set(config.tensor, "tensor", "mesh.tp", config.mesh)


def _refuse_set(
    given: PipeConfig | TensorConfig, section: str, axis: str, mesh: MeshConfig
) -> None:
    default = type(given)()
    for entry in fields(given):
        value = getattr(given, entry.name)
        if value != getattr(default, entry.name):
            raise ConfigError(
                f"{section}.{entry.name}={value!r} takes effect only where {axis} is above 1, but "
                f"{axis}={getattr(mesh, axis.rpartition('.')[2])}. Remove it, or set {axis}."
            )
