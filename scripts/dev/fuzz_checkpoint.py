"""Coverage-guided fuzzing of what reads the bytes of a checkpoint, with atheris (libFuzzer).

    .venv/bin/pip install atheris
    .venv/bin/python scripts/dev/fuzz_checkpoint.py manifest -max_total_time=60 [CORPUS]

Targets: `manifest` (its JSON), `header` (of a safetensors file), `archive` (pickles and tensors of
other frameworks). An input may be refused with CheckpointError, or read; any other exception, a
hang or a manifest that does not come back from its own JSON ends the run with the input in a file.
The suite does the same with hypothesis, shorter: tests/checkpoint/test_fuzz.py.
"""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# By name: it is no part of any extra, so checkers may not find it.
atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["hf_speed.checkpoint"]):
    from hf_speed.checkpoint.header import read_header
    from hf_speed.checkpoint.imports.archive import load_archive
    from hf_speed.checkpoint.manifest import Manifest
    from hf_speed.checkpoint.tensorfile import write_tensors

from hf_speed.errors import CheckpointError  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="hf_speed-fuzz-"))


def manifest(data: bytes) -> None:
    """One that is accepted says the same after it was written and read again."""
    text = data.decode("utf-8", errors="surrogateescape")
    try:
        found = Manifest.from_json(text, where="fuzz")
    except CheckpointError:
        return
    again = Manifest.from_json(found.to_json(), where="fuzz")
    assert again._replace(package_version="") == found._replace(package_version="")  # noqa: S101


def header(data: bytes) -> None:
    """Every span of an accepted header lies within the file."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        found = read_header(descriptor, "fuzz")
        assert all(0 <= s.begin <= s.end <= len(data) for s in found.spans.values())  # noqa: S101
    except CheckpointError:
        return
    finally:
        os.close(descriptor)


def archive(data: bytes) -> None:
    """Nothing but plain values and records comes out of a pickle."""
    path = SCRATCH / "archive.pt"
    path.write_bytes(data)
    try:
        load_archive(path)
    except CheckpointError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "header": header,
    "archive": archive,
}


def seeds(directory: Path) -> None:
    """Good inputs to begin with."""
    write_tensors(directory / "header", {"a": torch.arange(4.0), "b": torch.ones(2, 2)})
    torch.save({"a": torch.arange(4.0), "b": [1, "two", None]}, directory / "archive")
    empty = Manifest(1, {"stage": 3}, {"w": {"step": 1.0}}, {}, (), {}, package_version="0")
    (directory / "manifest").write_text(json.dumps(json.loads(empty.to_json())))


def main() -> None:
    """Fuzz the target named first; other arguments are libFuzzer's."""
    name, *options = sys.argv[1:] or [""]
    if name not in TARGETS:
        raise SystemExit(f"Name a target: {', '.join(TARGETS)}.")
    seeds(SCRATCH)
    atheris.Setup([sys.argv[0], *options, str(SCRATCH)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
