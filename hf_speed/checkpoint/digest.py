"""Checksums of a checkpoint's files: xxh3_128, written as 32 hexadecimal digits.

They show damage of every kind (disks, copies, half an upload), at the speed of memory. They are no
signature: who may write the files may write the manifest too.

A safetensors file is written tensor by tensor in any order, so its digest is a tree:

    digest of a tensor     of its bytes
    digest of the file     of the digest of everything before the data, then those of the tensors
                           in the order in which they lie in the file

Of any other file it is that of its bytes. https://xxhash.com
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import xxhash

from hf_speed.checkpoint.header import Header, read_header
from hf_speed.errors import CheckpointError

ALGORITHM = "xxh3_128"

_DIGEST = re.compile(r"[0-9a-f]{32}")
_CHUNK_BYTES = 8 << 20


class FileRecord(NamedTuple):
    """What is known of a file.

    Attributes:
        nbytes: its size.
        digest: its checksum; None in a checkpoint that was written without them.
        tensors: name -> checksum of each tensor; empty where another record has them.
    """

    nbytes: int
    digest: str | None = None
    tensors: Mapping[str, str] = {}


Progress = Callable[[int], object]
"""Told of bytes that have been read."""


def digest_of(data: bytes | memoryview) -> str:
    """The checksum of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def is_digest(value: object) -> bool:
    """Whether a value has the form of a checksum."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def tree_digest(header: str, tensors: Iterable[str]) -> str:
    """The checksum of a safetensors file, from those of its parts in the order of the file."""
    return digest_of(bytes.fromhex("".join((header, *tensors))))


def digest_file(path: Path, progress: Progress | None = None) -> FileRecord:
    """Read a file once, without keeping it in memory, and say what it holds.

    Args:
        path: of a file.
        progress: called with the number of bytes after each 8 MiB.

    Raises:
        CheckpointError: it cannot be read; or it is called .safetensors and is not that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}.") from error
    try:
        size = os.fstat(descriptor).st_size
        if path.suffix != ".safetensors":
            return FileRecord(size, digest_span(descriptor, 0, size, progress))
        header = read_header(descriptor, str(path))
        tensors = digest_tensors(descriptor, header, progress)
        return FileRecord(size, tree_digest(digest_of(header.raw), tensors.values()), tensors)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    finally:
        os.close(descriptor)


def digest_tensors(
    descriptor: int, header: Header, progress: Progress | None = None
) -> dict[str, str]:
    """Name -> checksum of every tensor of an open file, in the order of the file."""
    return {
        name: digest_span(descriptor, span.begin, span.end, progress)
        for name, span in header.spans.items()
    }


def digest_span(descriptor: int, begin: int, end: int, progress: Progress | None = None) -> str:
    """The checksum of bytes [begin, end) of an open file, of which at most 8 MiB are in memory.

    Raises:
        OSError: it cannot be read, or is shorter.
    """
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - begin)))
    while begin < end:
        done = os.preadv(descriptor, [buffer[: min(len(buffer), end - begin)]], begin)
        if done == 0:
            raise OSError(f"it ends at byte {begin}, {end} are expected")
        state.update(buffer[:done])
        begin += done
        if progress is not None:
            progress(done)
    return state.hexdigest()
