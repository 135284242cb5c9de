"""A safetensors file mapped into memory: tensors without a copy, each checked when first asked for.

The library's own reader leaves errors of the header to its texts and cannot say what bytes it read;
here the bytes that are hashed are those that are handed out.
"""

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from hf_speed.checkpoint.digest import digest_of
from hf_speed.checkpoint.header import DTYPE_OF_CODE, Span, read_header
from hf_speed.errors import CheckpointError


class MappedFile:
    """An open file, unmapped when it and the tensors that came from it are gone."""

    def __init__(self, path: Path) -> None:
        """Map `path` and check its header.

        Raises:
            CheckpointError: it cannot be opened, or is not a safetensors file.
        """
        self.path = path
        self._verified: set[str] = set()
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self.header = read_header(descriptor, str(path))
                # Copied on write, of which there is none: torch warns of memory it may not change.
                self._bytes = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error}.") from error

    def span(self, name: str, holds: str) -> Span:
        """Where a tensor lies; `holds` names it in messages, as in "the exp_avg of lm_head.weight".

        Raises:
            CheckpointError: it is not there, or has a dtype that torch lacks.
        """
        span = self.header.spans.get(name)
        if span is None:
            raise CheckpointError(f"{self.path} lacks {holds}: it has no tensor {name!r}.")
        if span.code not in DTYPE_OF_CODE:
            raise CheckpointError(
                f"{self.path} holds {holds} as {span.code}; known are {', '.join(DTYPE_OF_CODE)}."
            )
        return span

    def tensor(self, name: str, holds: str, digest: str | None) -> Tensor:
        """One tensor, a view of the mapping: to be copied from, never written to.

        Args:
            name: its key.
            holds: names it in messages.
            digest: the checksum that its bytes must have; None: there is none.

        Raises:
            CheckpointError: see `span`; or it is damaged.
        """
        span = self.span(name, holds)
        if digest is not None and name not in self._verified:
            with memoryview(self._bytes) as data, data[span.begin : span.end] as part:
                found = digest_of(part)
            if found != digest:
                raise CheckpointError(
                    f"{self.path} is damaged in {holds} ({name!r}, bytes {span.begin} to "
                    f"{span.end}): its checksum is {found}, that of the save was {digest}. Copy "
                    f"the file again, or use another checkpoint."
                )
            self._verified.add(name)
        dtype = DTYPE_OF_CODE[span.code]
        numel = (span.end - span.begin) // dtype.itemsize
        if numel == 0:
            return torch.empty(span.shape, dtype=dtype)
        flat = torch.frombuffer(self._bytes, dtype=dtype, count=numel, offset=span.begin)
        return flat.view(span.shape)
