"""Writing one safetensors file tensor by tensor, in any order, without holding it in memory.

The shapes are known before the values, so the header goes first and each value to its own offset.
(safetensors' own `save_file` wants every tensor of the file alive at once and keeps the GIL.) Each
value is hashed on its way, so that a file's checksum is known when it is closed.

Format: https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
"""

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hf_speed.checkpoint.digest import FileRecord, tree_digest
from hf_speed.checkpoint.header import DTYPE_CODES, DTYPE_OF_CODE, LENGTH_BYTES
from hf_speed.checkpoint.output import MIN_DIRECT_BYTES, PAGE_BYTES, OutputFile
from hf_speed.errors import CheckpointError

__all__ = [
    "DTYPE_CODES",
    "DTYPE_OF_CODE",
    "TensorFile",
    "TensorSpec",
    "sync_directory",
    "sync_file",
    "write_tensors",
    "write_text",
]


class TensorSpec(NamedTuple):
    """What is known of a tensor before its value."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data in a file."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file that waits for its values. Not for use by two threads at once."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        """Create `path` and write the header.

        Raises:
            CheckpointError: a dtype that safetensors has no name for.
            OSError: the file cannot be created or written.
        """
        # Wide dtypes first: then every tensor is aligned to its own dtype, as readers that map the
        # file want.
        self.path = path
        ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        self._specs = {spec.name: spec for spec in ordered}
        self._digests: dict[str, str] = {}
        header, self._offsets = _header(ordered)
        self.nbytes = len(header) + sum(spec.nbytes for spec in ordered)
        self._out = OutputFile(path, self.nbytes)
        try:
            data = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            self._header_digest = self._out.write(0, data)
        except OSError:
            self._out.close()
            raise

    @property
    def is_full(self) -> bool:
        """True when every value has been written."""
        return len(self._digests) == len(self._specs)

    @property
    def record(self) -> FileRecord:
        """Size and checksums, once every value has been written."""
        tensors = {name: self._digests[name] for name in self._specs}
        return FileRecord(self.nbytes, tree_digest(self._header_digest, tensors.values()), tensors)

    def write(self, name: str, value: Tensor) -> None:
        """Write one value, a CPU tensor of the shape and dtype that were announced.

        Raises:
            CheckpointError: not announced, or another shape or dtype.
            OSError: the disk is full, or fails.
        """
        spec = self._specs.get(name)
        if spec is None or (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{self.path.name} expects {spec} where {name} of shape {tuple(value.shape)} and "
                f"dtype {value.dtype} came."
            )
        data = value.detach().contiguous().reshape(-1)
        self._digests[name] = self._out.write(self._offsets[name], data.view(torch.uint8))

    def close(self) -> None:
        """Force the file to disk and close it.

        Raises:
            CheckpointError: some values were never written.
            OSError: the disk fails.
        """
        try:
            if not self.is_full:
                missing = sorted(self._specs.keys() - self._digests.keys())
                raise CheckpointError(f"{self.path.name} was closed without {missing[:5]}.")
            self._out.sync()
        finally:
            self._out.close()

    def abandon(self) -> None:
        """Close without waiting for the disk; the file is of no use."""
        self._out.close()

    def __enter__(self) -> Self:
        """The header is written already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; abandon the file where the block failed."""
        if error is None:
            self.close()
        else:
            self.abandon()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a whole safetensors file, forced to disk; tensors may be on any device."""
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    with TensorFile(path, specs) as file:
        for name, value in tensors.items():
            file.write(name, value.cpu())
    return file.record


def write_text(path: Path, text: str) -> None:
    """Write a text file, forced to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Force renames and removals within a directory to disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Force a file that others have written to disk."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(specs: list[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where each tensor begins in the file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    begins = {}
    for spec in specs:
        if spec.dtype not in DTYPE_CODES:
            raise CheckpointError(
                f"{spec.name} has dtype {spec.dtype}, which safetensors cannot hold."
            )
        table[spec.name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begins[spec.name] = begin
        begin += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    # Data that begin on a page are written without a detour (output.py); readers want 8.
    align = PAGE_BYTES if begin >= MIN_DIRECT_BYTES else 8
    text += b" " * (-(LENGTH_BYTES + len(text)) % align)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, {name: len(header) + offset for name, offset in begins.items()}
