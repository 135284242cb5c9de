"""The config tree: what a user may set, with unit and legal range under each field.

Nothing here repeats what TrainingArguments or Accelerator already say. What is left out (AUTO) is
planned from the model, the mesh and the memory at hand by `resolve`. Every class checks itself,
however it was made.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from hf_speed.config import check

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

AUTO = "auto"
"""In a file, what leaves the choice to hf_speed; the same as leaving the key out."""

Tier = Literal["device", "host", "disk"]
"""Where bytes live: where the model computes, in the memory of the CPU, in files."""

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
"""Fastest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """How the processes are laid out; the product of the axes is the world.

    Ranks that differ in `tp` alone are neighbours, those that differ in `pp` are farthest apart.
    """

    pp: int = 1
    """Pipeline ranks, each with some of the layers, 1 to 65536. More: less memory a rank, more
    waiting."""
    tp: int = 1
    """Ranks that divide each layer's matrices, 1 to 65536. More: less memory a rank, four sums of
    activations a layer and step."""
    dp_replicate: int = 1
    """Groups that each hold a whole copy of the sharded state, 1 to 65536. More: less traffic
    between groups, more memory."""
    dp_shard: int | None = None
    """Ranks that share one copy of the state, 1 to 65536. AUTO: the world size divided by the
    other axes."""

    def __post_init__(self) -> None:
        """Check every value."""
        for axis in ("pp", "tp", "dp_replicate"):
            check.integer(f"mesh.{axis}", getattr(self, axis), 1, 65536)
        if self.dp_shard is not None:
            check.integer("mesh.dp_shard", self.dp_shard, 1, 65536)


Schedule = Literal[
    "gpipe",
    "1f1b",
    "interleaved",
    "looped_bfs",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "v_half",
    "v_min",
    "dualpipe_v",
]

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipeConfig:
    """How a batch goes through the pipeline ranks (mesh.pp > 1)."""

    schedule: Schedule | None = None
    """Order of forwards and backwards. AUTO: 'zb_h1', which waits a third as long as '1f1b' and
    holds no more activations."""
    microbatches: int | None = None
    """Pieces that each rank's batch is cut in, by rows, 1 to 65536. More: less waiting, smaller
    matrices. AUTO: four a pipeline rank, or one a row where there are fewer rows."""
    chunks: int | None = None
    """Stages a pipeline rank has, 1 to 64: 'interleaved' and 'looped_bfs' only. More: less waiting,
    more messages. AUTO: 2."""
    balance: Literal["parameters", "time"] | tuple[int, ...] = "parameters"
    """How layers are dealt out to stages: by their parameters; by their time, measured once on a
    toy batch; or a list, layers a stage."""
    gather: Literal["step", "microbatch"] = "step"
    """Stage 3: gather a pipeline stage's parameters once a step, or for every microbatch: less
    memory, more traffic."""

    def __post_init__(self) -> None:
        """Check every value."""
        if self.schedule is not None:
            check.one_of("pipe.schedule", self.schedule, SCHEDULES)
        if self.microbatches is not None:
            check.integer("pipe.microbatches", self.microbatches, 1, 65536)
        if self.chunks is not None:
            check.integer("pipe.chunks", self.chunks, 1, 64)
        if not isinstance(self.balance, str):
            counts = check.counts("pipe.balance", self.balance)
            object.__setattr__(self, "balance", counts)
        else:
            check.one_of("pipe.balance", self.balance, ("parameters", "time"))
        check.one_of("pipe.gather", self.gather, ("step", "microbatch"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorConfig:
    """How each layer is divided over ranks (mesh.tp > 1; Megatron-LM, arXiv:1909.08053)."""

    sequence_parallel: bool = False
    """Divide the sequence between the layers too (arXiv:2205.05198): norms and dropout keep 1/tp of
    their activations, for the same traffic."""

    def __post_init__(self) -> None:
        """Check every value."""
        check.boolean("tensor.sequence_parallel", self.sequence_parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """What is sharded, and how far ahead it is gathered (ZeRO, arXiv:1910.02054)."""

    stage: int | None = None
    """0 to 3: shards nothing; the optimizer state; gradients too; parameters too. AUTO: the
    smallest whose state fits."""
    units: Literal["auto"] | tuple[str, ...] = AUTO
    """Module classes gathered as one, a list of names. AUTO: the model's own blocks (its
    `_no_split_modules`)."""
    prefetch_units: int = 1
    """Units gathered ahead of the one that computes, 0 to 8 (stage 3). Each holds one more unit in
    memory."""
    regather: bool = True
    """Stage 3: release a unit after the forward and gather it again in the backward. False: more
    memory, less traffic."""
    generate: Literal["gathered", "streamed"] = "gathered"
    """Stage 3, `generate()`: hold the whole model for its length, or gather every unit at every
    token."""

    def __post_init__(self) -> None:
        """Check every value."""
        if self.stage is not None:
            check.integer("zero.stage", self.stage, 0, 3)
        if self.units != AUTO:
            object.__setattr__(self, "units", check.names("zero.units", self.units))
        check.integer("zero.prefetch_units", self.prefetch_units, 0, 8)
        check.boolean("zero.regather", self.regather)
        check.one_of("zero.generate", self.generate, ("gathered", "streamed"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleConfig:
    """Dynamic loss scaling (arXiv:1710.03740, section 3.2); fp16 only, else an error."""

    initial: float = 65536.0
    """The first factor, 1 to 2**32. A smaller one loses small gradients, a larger one skips the
    first steps."""
    window: int = 1000
    """Good steps in a row before the scale doubles, 1 to 1000000."""
    hysteresis: int = 2
    """Overflows before the scale halves, 1 to 1000. The step is skipped at each."""
    floor: float = 1.0
    """The scale never goes below it, 2**-24 to `initial`."""

    def __post_init__(self) -> None:
        """Check every value."""
        check.number("precision.loss_scale.initial", self.initial, 1.0, 2.0**32)
        check.integer("precision.loss_scale.window", self.window, 1, 1_000_000)
        check.integer("precision.loss_scale.hysteresis", self.hysteresis, 1, 1000)
        check.number("precision.loss_scale.floor", self.floor, 2.0**-24, self.initial)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """The dtypes beside the one that computes, which TrainingArguments (`bf16`, `fp16`) owns."""

    working_dtype: Literal["compute", "own"] = "compute"
    """Dtype of the parameters under bf16 or fp16. 'compute': 16-bit, beside masters. 'own': each
    its own, cast by autocast at every use, as accelerate does; they are gathered and their
    gradients travel in it, and 16-bit copies of all live from forward to backward."""
    master_dtype: Literal["float32", "same"] = "float32"
    """Dtype of the copy that the optimizer updates where the parameter is 16-bit. 'same': no copy,
    4 bytes less a parameter."""
    reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype in which gradients travel; they are summed in float32 on arrival. AUTO: the dtype that
    computes."""
    accumulate_dtype: Literal["float32", "same"] = "float32"
    """Dtype in which gradients add up over micro-steps. 'same': the gradient's own."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """Dynamic loss scaling, in fp16 only."""

    def __post_init__(self) -> None:
        """Check every value."""
        check.one_of("precision.working_dtype", self.working_dtype, ("compute", "own"))
        check.one_of("precision.master_dtype", self.master_dtype, ("float32", "same"))
        if self.reduce_dtype is not None:
            check.one_of(
                "precision.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16", "float16")
            )
        check.one_of("precision.accumulate_dtype", self.accumulate_dtype, ("float32", "same"))
        check.section("precision.loss_scale", self.loss_scale, LossScaleConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """Which tier holds what, at every stage (arXiv:2101.06840, arXiv:2104.07857)."""

    optimizer: Tier | None = None
    """Tier of the optimizer's moments and of the masters: device, host or disk. AUTO: the device
    while everything fits there."""
    gradients: Tier | None = None
    """Tier of the gradients that wait for the step. AUTO: the device while everything fits."""
    parameters: Tier | None = None
    """Tier of the parameters while they do not compute. AUTO: the device while everything fits."""
    activations: Tier | None = None
    """Tier of what the forward saves for the backward. AUTO: the device."""
    paths: tuple[str, ...] = ()
    """Directories for the disk tier, a list; bytes are striped over them. Each process makes and
    removes a directory of its own in each."""
    staging_bytes: int = 256 * MIB
    """Host memory in bytes through which a rank moves chunks, 16 MiB to 16 GiB. It never grows."""
    host_bytes: int | None = None
    """Host memory per rank in bytes that the plan may fill, 1 MiB to 64 TiB. AUTO: this rank's
    share of what is free."""
    update: Literal["torch", "fused"] | None = None
    """What updates: your optimizer chunk by chunk, or one pass of hf_speed's kernel. AUTO: 'fused'
    where the optimizer's state is not on the device and a kernel for it exists."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype in which the kernel keeps the moments ('fused' only): 8, 4 or about 2 bytes a parameter
    with Adam."""
    step: Literal["after", "speculative", "delayed"] = "after"
    """When a host or disk optimizer updates: in `optimizer.step()`; during the backward, rolled
    back if clipping says so; or one step late, which changes the trajectory."""
    cpu_share: float = 1.0
    """Share of each update that the CPU does where a GPU computes, 0 to 1; the GPU does the rest
    ('fused' only). The result is the same."""
    activation_min_bytes: int = MIB
    """Smallest saved activation in bytes that leaves the device, 1 KiB to 1 TiB."""

    def __post_init__(self) -> None:
        """Check every value."""
        for kind in ("optimizer", "gradients", "parameters", "activations"):
            tier = getattr(self, kind)
            if tier is not None:
                check.one_of(f"offload.{kind}", tier, TIERS)
        object.__setattr__(self, "paths", check.directories("offload.paths", self.paths))
        check.integer("offload.staging_bytes", self.staging_bytes, 16 * MIB, 16 * GIB)
        if self.host_bytes is not None:
            check.integer("offload.host_bytes", self.host_bytes, MIB, 65536 * GIB)
        if self.update is not None:
            check.one_of("offload.update", self.update, ("torch", "fused"))
        check.one_of("offload.moments", self.moments, ("float32", "bfloat16", "int8"))
        check.one_of("offload.step", self.step, ("after", "speculative", "delayed"))
        check.number("offload.cpu_share", self.cpu_share, 0.0, 1.0)
        check.integer("offload.activation_min_bytes", self.activation_min_bytes, KIB, 1024 * GIB)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How checkpoints are written."""

    max_shard_bytes: int = 5 * GIB
    """Largest safetensors file of the model in bytes, 1 KiB to 1 TiB. At most one such file is in
    host memory at a time."""
    asynchronous: bool = False
    """Write behind the training; the next save waits for the one before. What this rank saves
    (about 14 bytes a parameter of its share with bf16 and Adam) is copied to host memory, of a
    model that is there already only what is not written by the next step."""
    mirror: str | None = None
    """Address of fsspec, as in 's3://bucket/run', to which every finished checkpoint is copied, by
    all ranks; `latest` there names the newest. Nothing is removed there. AUTO: none."""

    def __post_init__(self) -> None:
        """Check every value."""
        check.integer("checkpoint.max_shard_bytes", self.max_shard_bytes, KIB, 1024 * GIB)
        check.boolean("checkpoint.asynchronous", self.asynchronous)
        if self.mirror is not None:
            check.url("checkpoint.mirror", self.mirror)


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Finding faults, and measuring."""

    journal: bool = False
    """Record and compare every collective: a rank that diverges is named, with operation and
    caller. Slower."""
    timeout_s: float = 600.0
    """Seconds that a collective waits for the other ranks before it raises, 1 to 86400."""
    stats: bool = True
    """Add bytes sent, peak memory, gradient norm, loss scale and tokens/s to the logs."""

    def __post_init__(self) -> None:
        """Check every value."""
        check.boolean("debug.journal", self.journal)
        check.number("debug.timeout_s", self.timeout_s, 1.0, 86400.0)
        check.boolean("debug.stats", self.stats)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """Everything that hf_speed can be told. `SpeedConfig()` leaves every choice to it."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the processes are laid out."""
    pipe: PipeConfig = field(default_factory=PipeConfig)
    """How a batch goes through the pipeline ranks."""
    tensor: TensorConfig = field(default_factory=TensorConfig)
    """How each layer is divided over ranks."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What is sharded."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Dtypes beside the one that computes."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    """Which tier holds what."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written."""
    debug: DebugConfig = field(default_factory=DebugConfig)
    """Finding faults, and measuring."""

    def __post_init__(self) -> None:
        """Check that every section is of its class."""
        check.section("mesh", self.mesh, MeshConfig)
        check.section("pipe", self.pipe, PipeConfig)
        check.section("tensor", self.tensor, TensorConfig)
        check.section("zero", self.zero, ZeroConfig)
        check.section("precision", self.precision, PrecisionConfig)
        check.section("offload", self.offload, OffloadConfig)
        check.section("checkpoint", self.checkpoint, CheckpointConfig)
        check.section("debug", self.debug, DebugConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field present; `load_config` makes an equal config of them."""
        tree = asdict(self)
        if not isinstance(self.zero.units, str):
            tree["zero"]["units"] = list(self.zero.units)
        tree["offload"]["paths"] = list(self.offload.paths)
        if not isinstance(self.pipe.balance, str):
            tree["pipe"]["balance"] = list(self.pipe.balance)
        return tree
