"""Reading other frameworks' pickles without running anything that they name.

A pickle names functions and classes and says what to call them with; loading a stranger's file with
plain `pickle` runs whatever it likes. Here every name is looked up in one table of stand-ins: plain
records, storage markers, and factories of tensor handles. No name outside the table is imported, no
function of another library is called, and no stand-in does more than keep what it is given. So
DeepSpeed need not be installed to read what it has saved.

A value that a pickle builds can be anything of plain data nested in stand-ins; who uses it checks
types.

Format: https://docs.python.org/3/library/pickletools.html
"""

import io
import pickle  # noqa: TID251 - the one place that reads foreign pickles, by an allow list
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import torch

from hf_speed.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 30
"""Structure without tensors: a pickle of this size describes millions of them."""


class Record:
    """Stands in for a class whose instances are data: keeps their attributes in `fields`.

    `state` is what the object was built from where that is no dict of attributes, and `arguments`
    what its class was called with.
    """

    __slots__ = ("arguments", "fields", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.fields: dict[str, Any] = {}
        self.state: Any = None

    def __new__(cls, *_arguments: Any) -> Self:
        """Also reached without `__init__`: a pickle may make an object by its `__new__` alone."""
        made = super().__new__(cls)
        Record.__init__(made)
        return made

    def __setstate__(self, state: object) -> None:
        """Keep what `pickle` would have put into the object."""
        if isinstance(state, dict):
            self.fields = state
        else:
            self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """One attribute of the original."""
        return self.fields.get(name, default)


class ChunkKey(Record):
    """Stands in for torch's MetadataIndex, a key of dicts: (name, offsets)."""

    __slots__ = ()

    @property
    def key(self) -> tuple[Any, Any]:
        """What equality goes by."""
        return self.get("fqn"), self.get("offset")

    def __eq__(self, other: object) -> bool:
        """Of the same chunk."""
        return isinstance(other, ChunkKey) and self.key == other.key

    def __hash__(self) -> int:
        """By name and offsets."""
        return hash(self.key)


class ChunkOf(Record):
    """Stands in for torch's record of a tensor in a distributed checkpoint."""

    __slots__ = ()


class BytesOf(Record):
    """Stands in for torch's record of another object in a distributed checkpoint."""

    __slots__ = ()


class EnumMember(Record):
    """Stands in for a member of an enum: `value` is its value, or its name in some pickles."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """What the member was made from."""
        return self.arguments[0] if self.arguments else None


class PlainDict(dict[Any, Any]):
    """An OrderedDict, without the attributes that state dicts carry beside their items."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drop them: version numbers of modules."""


class Factory:
    """A function that a pickle may call; it can be neither changed nor read."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self._make(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        """Refuse a pickle that would change the table.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"it changes a function to {state!r:.60}")


class StorageKind(Factory):
    """Names the dtype of a storage. Not for calling."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(_refuse_call)
        self.dtype = dtype


def _refuse_call(*_arguments: Any) -> NoReturn:
    raise ValueError("it makes a storage from nothing")


def _enum_by_name(kind: object, name: object) -> EnumMember:
    # Some versions of Python store a member as getattr(EnumClass, name).
    if not (isinstance(kind, type) and issubclass(kind, EnumMember)):
        raise ValueError(f"it reads an attribute of {kind!r:.60}")
    return kind(name)


def _encoded(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it encodes text in an unexpected way")
    return text.encode("latin1")


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 "
    "uint8 uint16 uint32 uint64 bool"
)
_DATA_CLASSES: dict[str, tuple[type[Record], str]] = {
    # module -> stand-in, names of classes
    "deepspeed.runtime.fp16.loss_scaler": (
        Record,
        "LossScaler DynamicLossScaler LossScaleConfig LossScalerBase",
    ),
    "deepspeed.utils.tensor_fragment": (Record, "fragment_address tensor_fragment"),
    "deepspeed.checkpoint.utils": (Record, "SubparamShape"),
    "deepspeed.checkpoint.universal_checkpoint": (Record, "SubparamShape"),
    "deepspeed.checkpoint.constants": (Record, "SubparamShape"),
    "torch.distributed.checkpoint.filesystem": (Record, "_StorageInfo _StoragePrefix"),
    "torch.distributed._shard.sharded_tensor.metadata": (Record, "TensorProperties"),
    "pathlib": (Record, "PosixPath PurePosixPath Path"),
    "pathlib._local": (Record, "PosixPath PurePosixPath Path"),
}
_ENUMS = {
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "torch.distributed.checkpoint.metadata": "_MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata": "MEM_FORMAT_ENCODING",
}
_METADATA: dict[str, type[Record]] = {
    "Metadata": Record,
    "MetadataIndex": ChunkKey,
    "TensorStorageMetadata": ChunkOf,
    "BytesStorageMetadata": BytesOf,
    "ChunkStorageMetadata": Record,
    "TensorProperties": Record,
    "StorageMeta": Record,
}


def _table() -> dict[tuple[str, str], Any]:
    """Every name that a pickle may use."""
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): PlainDict,
        ("collections", "defaultdict"): Factory(lambda *_arguments: PlainDict()),
        ("torch", "Size"): torch.Size,
        ("torch", "device"): Factory(lambda *arguments: arguments),
        ("torch.serialization", "_get_layout"): Factory(lambda name: name),
        ("_codecs", "encode"): Factory(_encoded),
        ("torch", "Tensor"): Record,
        ("torch._tensor", "Tensor"): Record,
        ("torch.nn.parameter", "Parameter"): Record,
    }
    for module in ("builtins", "__builtin__"):
        known[module, "set"] = Factory(frozenset)
        known[module, "getattr"] = Factory(_enum_by_name)
    for name, dtype in _STORAGES.items():
        known["torch", name] = known["torch.storage", name] = StorageKind(dtype)
    for name in _DTYPES.split():
        known["torch", name] = getattr(torch, name)
    for module, (stand_in, names) in _DATA_CLASSES.items():
        for name in names.split():
            known[module, name] = stand_in
    for module, name in _ENUMS.items():
        known[module, name] = EnumMember
    for name, stand_in in _METADATA.items():
        known["torch.distributed.checkpoint.metadata", name] = stand_in
    return known


ALLOWED: Mapping[tuple[str, str], Any] = _table()
"""(module, name) -> what stands in for it."""


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that knows the names of the table, and tensors if it is told how to make them.

    Args:
        data: the pickle.
        extra: more names, such as the functions that rebuild tensors.
        storage: from the persistent id of a storage to a handle of it.
    """

    def __init__(
        self,
        data: bytes,
        extra: Mapping[tuple[str, str], Any],
        storage: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._known = {**ALLOWED, **extra}
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in.

        Raises:
            UnknownNameError: the table has none.
        """
        try:
            return self._known[module, name]
        except KeyError:
            raise UnknownNameError(f"{module}.{name}") from None

    def persistent_load(self, identity: Any) -> Any:
        """A handle of a storage.

        Raises:
            ValueError: there are no storages here.
        """
        if self._storage is None:
            raise ValueError("it refers to storages that are not there")
        return self._storage(identity)


class UnknownNameError(ValueError):
    """A pickle names something that is not on the list."""


def load_pickle(
    data: bytes,
    where: str,
    *,
    extra: Mapping[tuple[str, str], Any] | None = None,
    storage: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle, made of plain data and stand-ins; nothing that it names is run.

    Args:
        data: the pickle's bytes.
        where: its file, for messages.
        extra: names beyond the table.
        storage: from persistent ids to handles.

    Raises:
        CheckpointError: it names something unknown, or is damaged.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where} holds a pickle of {len(data)} bytes; more than {MAX_PICKLE_BYTES} is no "
            f"description of a checkpoint."
        )
    try:
        return SafeUnpickler(data, extra or {}, storage).load()
    except UnknownNameError as error:
        raise CheckpointError(
            f"{where} wants {error} to be imported, which is not on the list of what checkpoints "
            f"of DeepSpeed and torch consist of. It was not run. If the file is your own, save it "
            f"again without such objects (client_state, extra keys of the state dict)."
        ) from error
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{where} is damaged: its pickle asks for endless memory.") from error
    except Exception as error:
        # A damaged pickle fails in any way; the list above is what keeps it harmless.
        raise CheckpointError(
            f"{where} is damaged, or no checkpoint: {type(error).__name__}: {error}."
        ) from error
