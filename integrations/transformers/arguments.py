"""TrainingArguments with one more field, `hf_speed`.

    class MyArguments(transformers.TrainingArguments): ...
    MyArguments = integrate_args(MyArguments)

The field keeps what the user gave, as a value that JSON can hold, so to_dict, to_json_string,
dataclasses.replace and HfArgumentParser see nothing special; the checked SpeedConfig lives beside
it in the plain attribute `hf_speed_config`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from hf_speed.config.tree import SpeedConfig
from hf_speed.errors import ConfigError
from hf_speed.integrations.carrier import carried_config, plain_config

FIELD_HELP = (
    "hf_speed config: a path to a .yaml or .json file, or JSON text (in Python also a dict)."
)


def read_hf_speed(args: Any) -> None:
    """Set `args.hf_speed_config` from `args.hf_speed`, before anything depends on it.

    Raises:
        ConfigError: the config is wrong, or a second backend is asked for beside it.
    """
    config = carried_config(args.hf_speed)
    args.hf_speed = plain_config(args.hf_speed)
    args.hf_speed_config = config
    if config is None:
        return
    for name in ("deepspeed", "fsdp"):
        value = getattr(args, name, None)
        if value:
            raise ConfigError(
                f"hf_speed and {name}={value!r} were both asked for, but only one can shard the "
                "model. "
                f"Remove {name}=, or leave hf_speed=None and unset HF_SPEED_CONFIG."
            )
    if args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size=True restarts a step that ran out of memory in the middle of its "
            "collectives, which "
            "hf_speed cannot join again. Set per_device_train_batch_size yourself."
        )
    if args.parallelism_config is not None:
        raise ConfigError(
            "parallelism_config and hf_speed both lay out the processes. Remove parallelism_config "
            "and set mesh.pp, mesh.tp, mesh.dp_replicate and mesh.dp_shard in the hf_speed config."
        )


@dataclass(repr=False)
class HfSpeedArgumentsMixin:
    """What `hf_speed` adds to a TrainingArguments class; see `integrate_args`."""

    # Exactly this type: HfArgumentParser makes a command-line string of it, and resolves any other
    # union to `dict`.
    hf_speed: dict | str | None = field(default=None, metadata={"help": FIELD_HELP})

    hf_speed_config = None
    """The checked SpeedConfig; None: plain transformers. Not a field."""

    def __post_init__(self) -> None:
        """Check the config first: the base class reads the properties below."""
        read_hf_speed(self)
        super().__post_init__()  # pyrefly: ignore[missing-attribute]

    @property
    def place_model_on_device(self) -> bool | None:
        """False under hf_speed: the engine moves the model itself, unit by unit."""
        placed: bool | None = super().place_model_on_device  # pyrefly: ignore[missing-attribute]
        return placed if self.hf_speed_config is None else False

    @property
    def n_gpu(self) -> int:
        """At most 1 under hf_speed: the Trainer would put nn.DataParallel around the model."""
        count: int = super().n_gpu  # pyrefly: ignore[missing-attribute]
        return count if self.hf_speed_config is None else min(count, 1)


def _rebuild(base: type, state: dict[str, Any]) -> Any:
    """Unpickle an instance of a class that `integrate_args(base)` made."""
    cls = integrate_args(base)
    args: Any = object.__new__(cls)
    args.__dict__.update(state)
    return args


def _reduce(base: type) -> Callable[[Any], tuple[Any, ...]]:
    # A class made at run time cannot be pickled by name; the Trainer torch.saves its arguments.
    def reduce(self: Any) -> tuple[Any, ...]:
        return _rebuild, (base, dict(self.__dict__))

    return reduce


def integrate_args(base: type) -> type:
    """A dataclass like `base` with the `hf_speed` field; `base` itself if it has it.

    Args:
        base: transformers.TrainingArguments or a subclass, such as trl.SFTConfig.

    Raises:
        ConfigError: `base` is not a TrainingArguments class.
    """
    if not (isinstance(base, type) and issubclass(base, transformers.TrainingArguments)):
        raise ConfigError(
            "integrate_args needs transformers.TrainingArguments or a subclass of it, not "
            f"{base!r}."
        )
    if issubclass(base, HfSpeedArgumentsMixin):
        return base
    namespace = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce__": _reduce(base),
        "_VALID_DICT_FIELDS": [*base._VALID_DICT_FIELDS, "hf_speed"],
    }
    return dataclass(repr=False)(type(base.__name__, (HfSpeedArgumentsMixin, base), namespace))


def config_of(args: Any) -> SpeedConfig | None:
    """The config that `args` carries; of a class without the field, HF_SPEED_CONFIG."""
    if hasattr(args, "hf_speed_config"):
        return args.hf_speed_config
    return carried_config(None)


@dataclass(repr=False)
class TrainingArguments(HfSpeedArgumentsMixin, transformers.TrainingArguments):
    """transformers.TrainingArguments with the field `hf_speed`: a path, dict or SpeedConfig."""

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - not a field, as in the base class
        *transformers.TrainingArguments._VALID_DICT_FIELDS,
        "hf_speed",
    ]
