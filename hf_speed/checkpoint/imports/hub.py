"""Hub models, in safetensors files or in those of torch.save, as a plain Trainer leaves them.

Beside the weights there may be an optimizer's state, by number: `numbered.py`.
"""

import os
from pathlib import Path
from typing import Any

from hf_speed.checkpoint.header import DTYPE_OF_CODE, read_header
from hf_speed.checkpoint.imports.archive import Extent, StoredTensor, load_archive
from hf_speed.checkpoint.imports.foreign import (
    Foreign,
    Strips,
    grad_scaler,
    mapping,
    plain_name,
    text,
)
from hf_speed.checkpoint.imports.numbered import read_numbered
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME
from hf_speed.checkpoint.strict_json import load_json
from hf_speed.errors import CheckpointError
from hf_speed.shard.reshard import strides

OLD_SINGLE_NAME = "pytorch_model.bin"
OLD_INDEX_NAME = "pytorch_model.bin.index.json"

_INDEXES = (INDEX_NAME, OLD_INDEX_NAME)
_SINGLES = (SINGLE_NAME, OLD_SINGLE_NAME)


def is_hub_model(directory: Path) -> bool:
    """Whether a directory holds weights as `save_pretrained` writes them."""
    return any((directory / name).is_file() for name in (*_INDEXES, *_SINGLES))


def open_hub(directory: Path, *, home: Path) -> Foreign:
    """A Hub model. Without an optimizer's state, a run that resumes from it begins at step 0.

    Args:
        directory: with the weights.
        home: where config.json and the like are.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    weights: dict[str, Strips] = {}
    for name in _files(directory):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, which the model's index names.")
        is_old = path.suffix == ".bin"
        weights |= _torch_tensors(path) if is_old else _safetensors(path)
    if not weights:
        raise CheckpointError(f"{directory} holds no weights.")
    return Foreign(
        origin="Hub model",
        weights=weights,
        dtypes={name: value.dtype for name, value in weights.items()},
        home=home,
        loss_scale=grad_scaler(directory / "scaler.pt"),
        numbered=read_numbered(directory),
    )


def _files(directory: Path) -> list[str]:
    """Names of the files with weights: those of safetensors where there are both."""
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        path = directory / index
        if path.is_file():
            where = str(path)
            body = mapping(load_json(path.read_text(encoding="utf-8"), where), "the index", where)
            homes = mapping(body.get("weight_map"), "weight_map", where)
            files = {text(file, "a file", where) for file in homes.values()}
            for file in files:
                if Path(file).name != file:
                    raise CheckpointError(f"{where} names the file {file!r:.80}, not beside it.")
            return sorted(files)
        if (directory / single).is_file():
            return [single]
    raise CheckpointError(f"{directory} has none of {', '.join((*_INDEXES, *_SINGLES))}.")


def _safetensors(path: Path) -> dict[str, Strips]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        header = read_header(descriptor, str(path))
    finally:
        os.close(descriptor)
    found = {}
    for name, span in header.spans.items():
        dtype = DTYPE_OF_CODE.get(span.code)
        if dtype is None:
            raise CheckpointError(f"{path}: {name} has the dtype {span.code}, which torch lacks.")
        extent = Extent(path, span.begin, span.end - span.begin)
        found[name] = Strips.whole(StoredTensor(extent, dtype, 0, span.shape, strides(span.shape)))
    return found


def _torch_tensors(path: Path) -> dict[str, Strips]:
    tree: Any = mapping(load_archive(path), "the file", str(path))
    found = {}
    for name, value in tree.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{path}: {name!s:.80} is no tensor.")
        found[plain_name(text(name, "a parameter", str(path)))] = Strips.whole(value)
    return found
