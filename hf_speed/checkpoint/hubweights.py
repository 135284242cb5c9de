"""The weights of a Hub model on disk, and their values in another dtype.

A value comes from the file that the index names, or, where another dtype is wanted and the
checkpoint keeps a master of more bits beside the model, from that: 16-bit files rewritten in
float32 get the bits that they lack. A master has the name and the layout of the model in memory; a
ModelPlan says what becomes of it on the Hub. Memory: one tensor, or what becomes of one group.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_speed.checkpoint.header import DTYPE_OF_CODE, Span
from hf_speed.checkpoint.manifest import Entry, Manifest, load_json
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME, ModelPlan, TensorGroup
from hf_speed.checkpoint.sources import TensorSource
from hf_speed.checkpoint.tensorfile import TensorSpec
from hf_speed.errors import CheckpointError
from hf_speed.logs import get_logger

ADAPTER_NAME = "adapter_model.safetensors"
"""As PEFT calls it; has no index."""

MASTER = "master"
"""The kind of state that is a weight of more bits."""

_log = get_logger(__name__)


class HubWeights(NamedTuple):
    """The weights of a Hub model on disk.

    Attributes:
        directory: where.
        homes: each tensor's file.
        tensors: what the files' headers say of each.
        metadata: the index's.
        says_format: every file's header has {"format": "pt"}, without which transformers refuses.
        digests: checksums of tensors that a manifest lists.
    """

    directory: Path
    homes: Mapping[str, str]
    tensors: Mapping[str, Span]
    metadata: Mapping[str, Any]
    says_format: bool
    digests: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files."""
        return sorted(set(self.homes.values()))

    @property
    def has_index(self) -> bool:
        """Whether there is an index beside them."""
        return (self.directory / INDEX_NAME).is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter, not a model."""
        return self.files == [ADAPTER_NAME]

    def specs(self, cast: torch.dtype | None) -> list[TensorSpec]:
        """The tensors file by file, floating-point ones in the dtype `cast`.

        Raises:
            CheckpointError: a dtype that torch lacks.
        """
        found = []
        for name in sorted(self.homes, key=lambda each: (self.homes[each], each)):
            stored = self.tensors[name]
            dtype = DTYPE_OF_CODE.get(stored.code)
            if dtype is None:
                raise CheckpointError(
                    f"{self.directory / self.homes[name]}: {name} has the dtype {stored.code}, "
                    f"which hf_speed cannot rewrite. Export without dtype and max_shard_size."
                )
            wanted = cast if cast is not None and dtype.is_floating_point else dtype
            found.append(TensorSpec(name, stored.shape, wanted))
        return found


def find_weights(directory: Path, manifest: Manifest | None = None) -> HubWeights:
    """Read the index and every file's header, which shows if a file is cut short.

    Args:
        directory: holds a model or an adapter.
        manifest: of the checkpoint that it is part of; None: it is none.

    Raises:
        CheckpointError: no weights here; a file is missing or damaged; the index lies.
    """
    metadata: Any = {}
    if (directory / INDEX_NAME).is_file():
        homes, metadata = _read_index(directory)
    else:
        single = next((n for n in (SINGLE_NAME, ADAPTER_NAME) if (directory / n).is_file()), None)
        if single is None:
            raise CheckpointError(
                f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: there is no model to "
                f"export. Give a checkpoint-N directory, or one that save_pretrained has written."
            )
        with TensorSource(directory / single) as source:
            homes = dict.fromkeys(source.header.spans, single)
    tensors: dict[str, Span] = {}
    says_format = True
    for file in sorted(set(homes.values())):
        with TensorSource(directory / file) as source:
            says_format &= source.header.metadata.get("format") == "pt"
            mine = [name for name, home in homes.items() if home == file]
            absent = [name for name in mine if name not in source.header.spans]
            if absent:
                raise CheckpointError(
                    f"{directory / file} lacks {absent[0]}, which the index puts there."
                )
            tensors |= {name: source.header.spans[name] for name in mine}
    records = {} if manifest is None else manifest.files
    digests = {
        name: records[file].tensors[name]
        for name, file in homes.items()
        if file in records and name in records[file].tensors
    }
    return HubWeights(directory, homes, tensors, metadata, says_format, digests)


def _read_index(directory: Path) -> tuple[dict[str, str], Any]:
    where = str(directory / INDEX_NAME)
    index = load_json((directory / INDEX_NAME).read_text(encoding="utf-8"), where)
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{where} has no weight_map.")
    for file in homes.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{where} names the file {file!r}, which leaves {directory}.")
    metadata = index.get("metadata")
    return homes, metadata if isinstance(metadata, dict) else {}


class Masters:
    """The masters that a checkpoint keeps beside its weights, by the names of the Hub.

    Args:
        directory: of the checkpoint.
        manifest: of it; None: there are no masters.
        plan: what becomes of the model's tensors on the Hub; None: they keep names and shapes.
    """

    def __init__(self, directory: Path, manifest: Manifest | None, plan: ModelPlan | None) -> None:
        self._directory = directory
        entries = () if manifest is None else manifest.entries
        self._entries = {entry.name: entry for entry in entries if entry.kind == MASTER}
        aliases = {} if plan is None else plan.aliases
        # A tied weight has one master, under any of its names.
        self._entries |= {
            aliases[name]: entry
            for name, entry in list(self._entries.items())
            if aliases.get(name, name) not in self._entries
        }
        groups = (
            [TensorGroup((name,), (name,), is_rename=True) for name in self._entries]
            if plan is None
            else plan.groups
        )
        self._plan = plan
        self._group_of = {
            target: group
            for group in groups
            if all(source in self._entries for source in group.sources)
            for target in group.targets
        }
        self._converted: tuple[TensorGroup, Mapping[str, Tensor]] | None = None

    def serves(self, name: str, stored: Span, wanted: torch.dtype) -> bool:
        """Whether `name` in the dtype `wanted` should come from here rather than from its file."""
        group, dtype = self._group_of.get(name), DTYPE_OF_CODE.get(stored.code)
        if group is None or dtype is None or wanted == dtype:
            return False
        entries = [self._entries[source] for source in group.sources]
        fits = not group.is_rename or entries[0].shape == stored.shape
        return fits and all(entry.dtype.itemsize > dtype.itemsize for entry in entries)

    def order(self, name: str) -> tuple[str, ...]:
        """Sorts tensors that become of the same masters together."""
        group = self._group_of.get(name)
        return (name,) if group is None else (*group.sources[:1], name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Masters that become none of the Hub tensors `names`."""
        groups = [self._group_of[name] for name in names if name in self._group_of]
        used = {id(self._entries[source]) for group in groups for source in group.sources}
        return sorted({entry.name for entry in self._entries.values() if id(entry) not in used})

    def read(self, name: str) -> Tensor:
        """The value of a Hub tensor, from its masters.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        group = self._group_of[name]
        if group.is_rename or self._plan is None:
            return self._whole(self._entries[group.sources[0]])
        if self._converted is None or self._converted[0] is not group:
            self._converted = None
            sources = {source: self._whole(self._entries[source]) for source in group.sources}
            self._converted = group, self._plan.convert(sources)
        return self._converted[1][name]

    def _whole(self, entry: Entry) -> Tensor:
        """One tensor from its pieces."""
        out = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.pieces:
            with TensorSource(self._directory / piece.file) as source:
                value = source.read(piece.key, piece.digest)
            if (tuple(value.shape), value.dtype) != (piece.extents, entry.dtype):
                raise CheckpointError(
                    f"{self._directory / piece.file} holds the {entry.label} as "
                    f"{tuple(value.shape)} {value.dtype}; the manifest says {piece.extents} "
                    f"{entry.dtype}."
                )
            out[piece.box.slices((0,) * len(entry.shape))] = value
        return out


def report_unused(masters: Masters, weights: HubWeights) -> None:
    """Warn of masters whose bits will be missing from the files."""
    unused = masters.unused(weights.homes)
    if unused:
        _log.warning(
            "%s keeps %d masters, first %s, whose names its Hub files do not have: these weights "
            "are taken from the files, with the bits that those have.",
            weights.directory,
            len(unused),
            unused[0],
        )
