"""Files of `torch.save`, read tensor by tensor.

Such a file is a zip: `data.pkl` describes the object, `data/0`, `data/1`, ... are the bytes of the
storages, stored as they are. The description is loaded by `pickles.py`, with a handle in the place
of each tensor; values are read when they are asked for, with `pread`, so that memory holds what is
asked for and never the file.

A distributed checkpoint of torch keeps many such zips in one file: hence the window.
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.header import read_at
from hf_speed.checkpoint.imports.pickles import Factory, Record, StorageKind, load_pickle
from hf_speed.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")

_ENCRYPTED = 1
"""Bit of a zip entry's flags."""


class Extent(NamedTuple):
    """Bytes of a file."""

    path: Path
    offset: int
    nbytes: int

    def read(self, out: Tensor, start: int) -> None:
        """Fill `out`, contiguous, with the bytes from `start` on.

        Raises:
            CheckpointError: the file has fewer.
        """
        if out.nbytes == 0:
            return
        if start + out.nbytes > self.nbytes:
            raise CheckpointError(
                f"{self.path} holds {self.nbytes} bytes where {start + out.nbytes} are described."
            )
        view = out.reshape(-1).view(torch.uint8).numpy().data
        position = self.offset + start
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}.") from error
        try:
            if read_at(descriptor, view, position) < len(view):
                raise CheckpointError(f"{self.path} ends before byte {position + len(view)}.")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}.") from error
        finally:
            os.close(descriptor)


class StoredTensor(NamedTuple):
    """A tensor that lies in a file.

    Attributes:
        extent: the bytes of its storage.
        dtype: of its elements.
        start: element of the storage at which it begins.
        shape: of the tensor.
        stride: in elements.
    """

    extent: Extent
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow one another in the storage."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def read(self) -> Tensor:
        """All of it, on the CPU."""
        if self.is_contiguous:
            return self.read_flat(0, self.numel).view(self.shape)
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)
        )
        flat = torch.empty(span, dtype=self.dtype)
        self.extent.read(flat, self.start * self.dtype.itemsize)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def read_flat(self, start: int, numel: int) -> Tensor:
        """(numel,): elements [start, start + numel) of a contiguous tensor, flattened."""
        if not self.is_contiguous:
            return self.read().reshape(-1)[start : start + numel]
        if start < 0 or numel < 0 or start + numel > self.numel:
            raise CheckpointError(
                f"{self.extent.path} is asked for elements [{start}, {start + numel}) of a tensor "
                f"of {self.numel}."
            )
        out = torch.empty(numel, dtype=self.dtype)
        self.extent.read(out, (self.start + start) * self.dtype.itemsize)
        return out


class _Storage(NamedTuple):
    extent: Extent
    dtype: torch.dtype


class _Window:
    """A part of a file, as a file: what `zipfile` needs of one."""

    def __init__(self, path: Path, offset: int, nbytes: int) -> None:
        self._file = path.open("rb")
        self._offset = offset
        self._nbytes = nbytes
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if base + position < 0:
            raise OSError("seek before the start")
        self._position = base + position
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._nbytes - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if count < 0 else min(count, left))
        self._position += len(data)
        return data

    def close(self) -> None:
        self._file.close()


def load_archive(path: Path, *, offset: int = 0, nbytes: int | None = None) -> Any:
    """What `torch.save` wrote, with a StoredTensor in the place of each tensor.

    Args:
        path: the file.
        offset: where the archive begins in it, in bytes.
        nbytes: its length; None: to the end.

    Raises:
        CheckpointError: no such archive, cut short, or it names what it should not.
    """
    try:
        size = path.stat().st_size
        window = Extent(path, offset, size - offset if nbytes is None else nbytes)
        if offset < 0 or window.nbytes < 0 or offset + window.nbytes > size:
            raise CheckpointError(
                f"{path} has {size} bytes; bytes {offset} to {offset + window.nbytes} are wanted: "
                f"it is cut short."
            )
        records, description = _open_zip(window)
    except (zipfile.BadZipFile, struct.error, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no file of torch.save, or is cut short: {error}. (What torch before 1.6 "
            f"has written is of another kind: load it and save it again.)"
        ) from error

    def storage(identity: Any) -> _Storage:
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise ValueError(f"it refers to {identity!r:.80}")
        kind, key = identity[1], identity[2]
        if not isinstance(kind, StorageKind) or key not in records:
            raise ValueError(f"the storage {key!r} is not there")
        return _Storage(records[key], kind.dtype)

    return load_pickle(description, str(path), extra=_REBUILD, storage=storage)


def _open_zip(window: Extent) -> tuple[dict[str, Extent], bytes]:
    """Where each storage lies, and the pickle."""
    stream: Any = _Window(*window)
    records: dict[str, Extent] = {}
    description = None
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                _, _, name = entry.filename.partition("/")
                if not (name in ("data.pkl", "byteorder") or name.startswith("data/")):
                    continue
                # Before anything is read: what is stored as it is cannot expand.
                record = _record(stream, window, entry)
                if name == "data.pkl":
                    description = archive.read(entry)
                elif name == "byteorder":
                    if record.nbytes > 16 or archive.read(entry).strip() != b"little":
                        raise ValueError("it was written on a big-endian machine")
                else:
                    records[name.removeprefix("data/")] = record
    finally:
        stream.close()
    if description is None:
        raise ValueError("it has no data.pkl")
    return records, description


def _record(stream: _Window, window: Extent, entry: zipfile.ZipInfo) -> Extent:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename} is compressed or encrypted")
    # The local header repeats the name, and pads so that the data is aligned.
    stream.seek(entry.header_offset)
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if magic != b"PK\x03\x04" or start + entry.file_size > window.nbytes:
        raise ValueError(f"{entry.filename} is not where it should be")
    return Extent(window.path, window.offset + start, entry.file_size)


def _tensor(
    storage: Any, start: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    sizes, steps = tuple(shape), tuple(stride)
    numbers = (start, *sizes, *steps)
    if len(sizes) != len(steps) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {sizes!r:.60} and stride {steps!r:.60}")
    made = StoredTensor(storage.extent, dtype or storage.dtype, start, sizes, steps)
    last = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    held = storage.extent.nbytes // made.dtype.itemsize
    if made.numel and (start + last >= held or made.numel > held):
        raise ValueError(f"a tensor of shape {sizes} does not fit its {held} elements")
    return made


def _rebuild_v2(storage: Any, start: Any, shape: Any, stride: Any, *_rest: Any) -> StoredTensor:
    return _tensor(storage, start, shape, stride)


def _rebuild_v3(*arguments: Any) -> StoredTensor:
    storage, start, shape, stride, _requires_grad, _hooks, dtype, *_rest = arguments
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of dtype {dtype!r:.60}")
    return _tensor(storage, start, shape, stride, dtype)


def _rebuild_parameter(data: Any, *_rest: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter without data")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    # Tensors with attributes of their own, which are dropped. Other subclasses keep their values
    # elsewhere.
    if kind is not Record or not isinstance(function, Factory) or not isinstance(arguments, tuple):
        raise ValueError("a tensor of an unknown class")
    return function(*arguments)


_REBUILD: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Factory(_rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Factory(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): Factory(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Factory(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Factory(_rebuild_from_type),
}
