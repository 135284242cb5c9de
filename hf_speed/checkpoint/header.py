"""What a safetensors file says of itself before the data, checked before any of it is believed.

Format: https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
"""

import os
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from hf_speed.checkpoint.strict_json import expect, expect_sizes, expect_text, load_json
from hf_speed.errors import CheckpointError

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each dtype."""

DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

METADATA = "__metadata__"


_READ_BYTES = 1 << 30
"""Linux reads at most 2 GiB per call."""


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` with the bytes of an open file from `offset` on; fewer where the file ends.

    Returns:
        How many bytes were read.

    Raises:
        OSError: it cannot be read.
    """
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + _READ_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done


class Span(NamedTuple):
    """A tensor in a file: `code` is its dtype as safetensors calls it, bytes [begin, end) hold it.

    The bytes are counted from the start of the file.
    """

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """Attributes: `spans` in the order of the file; `raw`, everything before the data."""

    spans: Mapping[str, Span]
    metadata: Mapping[str, str]
    raw: bytes


def read_header(descriptor: int, where: str) -> Header:
    """Read and check the header of an open file; `where` names it in messages.

    Raises:
        CheckpointError: not a safetensors file: cut short, no JSON, sizes that do not fit the
            dtypes, or tensors that overlap, leave gaps or end elsewhere than the file.
        OSError: it cannot be read.
    """
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, LENGTH_BYTES, 0)
    length = int.from_bytes(prefix, "little")
    start = LENGTH_BYTES + length
    if len(prefix) < LENGTH_BYTES or length > MAX_HEADER_BYTES or start > size:
        raise CheckpointError(
            f"{where} is damaged: it has {size} bytes, and a header of {length} by its first "
            f"{LENGTH_BYTES} (at most {MAX_HEADER_BYTES})."
        )
    text = os.pread(descriptor, length, LENGTH_BYTES)
    if len(text) < length:
        raise CheckpointError(f"{where} is damaged: it ends within its header.")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is damaged: its header is no text: {error}.") from error
    return _parse(decoded, prefix + text, size, where)


def _parse(text: str, raw: bytes, size: int, where: str) -> Header:
    table = expect(load_json(text, f"{where}: the header"), dict, where, "the header")
    metadata = expect(table.pop(METADATA, {}), dict, where, METADATA)
    for key, value in metadata.items():
        expect(value, str, where, f"{key} in {METADATA}")
    found = [
        (expect_text(name, where, "a name"), _span(value, len(raw), f"{where}: {name!r}"))
        for name, value in table.items()
    ]
    # Empty tensors lie before the one that begins at the same place.
    spans = dict(sorted(found, key=lambda item: (item[1].begin, item[1].end)))
    here = len(raw)
    for name, span in spans.items():
        if span.begin != here:
            raise CheckpointError(
                f"{where} is damaged: {name} begins at byte {span.begin}, but what lies before it "
                f"ends at {here}."
            )
        here = span.end
    if here != size:
        raise CheckpointError(
            f"{where} is damaged: it has {size} bytes, but its tensors end at {here}."
        )
    return Header(spans, metadata, raw)


def _span(value: object, start: int, where: str) -> Span:
    fields = expect(value, dict, where, "the tensor")
    code = expect(fields.get("dtype"), str, where, "dtype")
    shape = expect_sizes(fields.get("shape"), where, "shape")
    offsets: Any = expect_sizes(fields.get("data_offsets"), where, "data_offsets")
    if len(fields) != 3 or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the fields {sorted(fields)}, data_offsets {offsets}.")
    begin, end = offsets
    dtype = DTYPE_OF_CODE.get(code)
    # Of a dtype that is not ours the library that wrote it knows the size.
    if dtype is not None and end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{where} has {end - begin} bytes where {shape} {code} needs "
            f"{prod(shape) * dtype.itemsize}."
        )
    return Span(code, shape, start + begin, start + end)
