"""What an Accelerator was told that cannot take effect beside an engine."""

from collections.abc import Mapping
from typing import Any, Protocol

from accelerate.utils import DDPCommunicationHookType, DynamoBackend

from hf_speed.errors import ConfigError

PLUGINS = ("deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin")


class Told(Protocol):
    """What is looked at of an Accelerator."""

    state: Any
    ddp_handler: Any
    scaler_handler: Any

    @property
    def mixed_precision(self) -> str:
        """The dtype that computes."""
        ...

    @property
    def parallelism_config(self) -> Any:
        """Accelerate's own layout of the processes."""
        ...


def refuse_backends(asked_for: Mapping[str, Any]) -> None:
    """Refuse a second library that lays out the processes.

    Raises:
        ConfigError: there is one.
    """
    for name, value in asked_for.items():
        if value is not None:
            instead = ""
            if name == "parallelism_config":
                instead = (
                    " Write the sizes in the hf_speed config: mesh.pp, mesh.tp, mesh.dp_replicate "
                    "and mesh.dp_shard."
                )
            raise ConfigError(
                f"hf_speed and {name}={type(value).__name__} were both asked for, but only one can "
                f"lay out the processes. Remove {name} (an accelerate config or ACCELERATE_USE_* "
                f"may set it), or hf_speed.{instead}"
            )


def refuse_what_has_no_effect(accelerator: Told) -> None:
    """Refuse other backends, and options of what the engine does itself.

    Raises:
        ConfigError: says which, and what to write instead.
    """
    asked_for = {name: getattr(accelerator.state, name, None) for name in PLUGINS}
    refuse_backends({**asked_for, "parallelism_config": accelerator.parallelism_config})
    hook = None if accelerator.ddp_handler is None else accelerator.ddp_handler.comm_hook
    if hook not in (None, DDPCommunicationHookType.NO):
        raise ConfigError(
            f"DistributedDataParallelKwargs(comm_hook={hook}) has no effect under hf_speed, "
            f"which reduces gradients itself. Remove it and set precision.reduce_dtype, the "
            f"dtype in which gradients travel, in the hf_speed config."
        )
    if accelerator.scaler_handler is not None:
        raise ConfigError(
            "GradScalerKwargs has no effect under hf_speed, which scales the loss itself. "
            "Remove it and set precision.loss_scale (initial, window, hysteresis, floor) in the "
            "hf_speed config."
        )
    if accelerator.mixed_precision == "fp8":
        raise ConfigError(
            "mixed_precision='fp8' is not supported by hf_speed. Use 'no', 'bf16' or 'fp16'."
        )
    dynamo: Any = accelerator.state.dynamo_plugin
    if dynamo.backend != DynamoBackend.NO:
        raise ConfigError(
            f"torch.compile (dynamo backend {dynamo.backend}) is not supported by hf_speed: the "
            f"compiled graph would hold on to parameters that the engine re-points. Leave it off."
        )
