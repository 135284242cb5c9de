"""Teaching the stock classes `hf_speed`: opt-in, and undone by disable().

enable() adds the field to transformers.TrainingArguments and every subclass of it that exists
(dataclasses defined later inherit it), and makes transformers.Trainer and accelerate.Accelerator
swap the class of an instance whose config asks for an engine. So classes imported by name before
enable(), TRL's among them, work as well.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import field, make_dataclass
from typing import Any, NamedTuple

import accelerate
import transformers

from hf_speed.integrations.accelerate import Accelerator
from hf_speed.integrations.carrier import carried_config
from hf_speed.integrations.transformers.arguments import (
    FIELD_HELP,
    HfSpeedArgumentsMixin,
    config_of,
    read_hf_speed,
)
from hf_speed.integrations.transformers.trainer import integrate_trainer

_RECORD = "_hf_speed_patches"
_MISSING = object()


class _Patch(NamedTuple):
    """One changed attribute, and what it was."""

    owner: Any
    name: str
    before: Any


class _Patches:
    """Changed attributes, in order; undone in reverse."""

    def __init__(self) -> None:
        self._made: list[_Patch] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, remembering what the class itself (not its bases) held."""
        self._made.append(_Patch(owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        while self._made:
            patch = self._made.pop()
            if patch.before is _MISSING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.before)


def enable() -> None:
    """Let the stock classes take `hf_speed`. Does nothing the second time."""
    if _RECORD in vars(transformers.TrainingArguments):
        return
    patches = _Patches()
    patches.set(transformers.TrainingArguments, _RECORD, patches)
    _patch_arguments(patches)
    patches.set(transformers.Trainer, "__init__", _trainer_init(transformers.Trainer.__init__))
    patches.set(
        accelerate.Accelerator, "__init__", _accelerator_init(accelerate.Accelerator.__init__)
    )


def disable() -> None:
    """Put back what enable() changed. Trainers and arguments made in between keep working."""
    patches = vars(transformers.TrainingArguments).get(_RECORD)
    if patches is not None:
        patches.undo()


def _patch_arguments(patches: _Patches) -> None:
    base = transformers.TrainingArguments
    patches.set(base, "hf_speed", None)
    patches.set(base, "hf_speed_config", None)
    patches.set(base, "__post_init__", _post_init(base.__post_init__))
    patches.set(base, "_VALID_DICT_FIELDS", [*base._VALID_DICT_FIELDS, "hf_speed"])
    patches.set(
        base,
        "place_model_on_device",
        _property("place_model_on_device", vars(base)["place_model_on_device"]),
    )
    patches.set(base, "n_gpu", _property("n_gpu", vars(base)["n_gpu"]))
    for cls in _with_subclasses(base):
        if issubclass(cls, HfSpeedArgumentsMixin):
            continue
        if "__init__" in vars(cls):
            patches.set(cls, "__init__", _arguments_init(cls.__init__))
        if "__dataclass_fields__" in vars(cls):
            patches.set(
                cls,
                "__dataclass_fields__",
                {**vars(cls)["__dataclass_fields__"], "hf_speed": _new_field()},
            )
    patches.set(base, "__annotations__", {**base.__annotations__, "hf_speed": dict | str | None})


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for each in cls.__subclasses__():
        yield from _with_subclasses(each)


def _new_field() -> Any:
    spec = field(default=None, metadata={"help": FIELD_HELP})
    made = make_dataclass("_Holder", [("hf_speed", dict | str | None, spec)])
    return made.__dataclass_fields__["hf_speed"]


def _arguments_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, hf_speed: Any = _MISSING, **kwargs: Any) -> None:
        # A hand-written subclass calls its base's __init__ as well: only who was given the value
        # sets it.
        if hf_speed is not _MISSING:
            self.hf_speed = hf_speed
        original(self, *args, **kwargs)

    return init


def _post_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        read_hf_speed(self)
        original(self)

    return post_init


def _property(name: str, original: property) -> property:
    """The mixin's property, on a class that does not have the mixin."""

    def read(self: Any) -> Any:
        value = original.fget(self)  # pyrefly: ignore[not-callable]
        if self.hf_speed_config is None:
            return value
        return min(value, 1) if name == "n_gpu" else False

    return property(read, doc=original.__doc__)


def _trainer_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None and config_of(args) is not None:
            self.__class__ = integrate_trainer(type(self))
        original(self, model, args, *rest, **kwargs)

    return init


def _accelerator_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, hf_speed: Any = None, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Ours takes its config itself.
        if not isinstance(self, Accelerator):
            config = carried_config(hf_speed)
            if config is not None:
                Accelerator.adopt(self, config)

    return init
