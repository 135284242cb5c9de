"""Safetensors files read tensor by tensor, without mapping them into memory.

A memory map of a file counts as this process's memory page by page as it is read, and an export
reads everything: the peak would be the model. Here each tensor is read into memory of its own, and
nothing else is held.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hf_speed.checkpoint.digest import digest_of
from hf_speed.checkpoint.header import DTYPE_OF_CODE, read_at, read_header
from hf_speed.errors import CheckpointError


class TensorSource:
    """An open safetensors file. Use as a context manager, or `close()`.

    Attributes:
        path: of the file.
        header: what it says of itself, checked.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: missing, cut short, or no safetensors file.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} is missing or damaged: {error}.") from error
        try:
            self.header = read_header(self._descriptor, str(path))
        except OSError as error:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        except BaseException:
            self.close()
            raise

    def read(self, name: str, digest: str | None = None) -> Tensor:
        """One whole tensor, owned by the caller.

        Args:
            name: of the tensor.
            digest: the checksum that its bytes must have; None: not known.

        Raises:
            CheckpointError: no such tensor, one whose dtype torch lacks, other bytes than the
                checksum's, or the file is cut short.
        """
        span = self.header.spans.get(name)
        dtype = None if span is None else DTYPE_OF_CODE.get(span.code)
        if span is None or dtype is None:
            there = "has no such tensor" if span is None else f"has it in the dtype {span.code}"
            raise CheckpointError(f"{self.path}: {name} cannot be read: the file {there}.")
        out = torch.empty(span.shape, dtype=dtype)
        data = out.reshape(-1).view(torch.uint8).numpy().data
        if span.end > span.begin:
            self._read_at(span.begin, data)
        if digest is not None and digest_of(data) != digest:
            raise CheckpointError(
                f"{self.path} is damaged: the bytes of {name} have another checksum than the "
                f"manifest says. Copy the file again, or use another checkpoint."
            )
        return out

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        """The header has been read already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _read_at(self, offset: int, into: memoryview) -> None:
        try:
            done = read_at(self._descriptor, into, offset)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}.") from error
        if done < len(into):
            raise CheckpointError(f"{self.path} is damaged: it was cut short meanwhile.")
