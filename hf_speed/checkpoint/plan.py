"""Which full tensors go in which file of a Hub model: pure values, made by the integrations."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from hf_speed.checkpoint.manifest import dump_json
from hf_speed.checkpoint.tensorfile import TensorSpec
from hf_speed.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class PlannedFile(NamedTuple):
    """One file of the model and the tensors in it."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(spec.nbytes for spec in self.tensors)


class TensorGroup(NamedTuple):
    """Tensors of the model that together become tensors of the Hub layout.

    Attributes:
        sources: names in the model; the group is complete when all have come.
        targets: names in the files.
        is_rename: the one source is the one target, byte for byte.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    is_rename: bool


class ModelPlan(NamedTuple):
    """A Hub model on disk, before its values are known.

    Attributes:
        files: in the order in which their tensors come.
        groups: every source and every target in exactly one.
        convert: from a group's sources to its targets; not called for renames.
        aliases: other names of a source (tied weights) -> its name here.
        num_parameters: of the model, tied ones counted once.
    """

    files: tuple[PlannedFile, ...]
    groups: tuple[TensorGroup, ...]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    aliases: Mapping[str, str]
    num_parameters: int

    @property
    def is_sharded(self) -> bool:
        """True where the model has several files and so an index."""
        return len(self.files) > 1

    def writers(self, world_size: int) -> Callable[[str], frozenset[int]]:
        """From a name in the model to the ranks whose files hold something that is made of it."""
        file_of = {spec.name: i for i, file in enumerate(self.files) for spec in file.tensors}
        ranks = {
            source: frozenset(file_of[target] % world_size for target in group.targets)
            for group in self.groups
            for source in group.sources
        }
        return lambda name: ranks[self.aliases.get(name, name)]

    def index_json(self) -> str:
        """What `model.safetensors.index.json` says, as transformers writes it."""
        weight_map = {spec.name: file.name for file in self.files for spec in file.tensors}
        total = sum(file.nbytes for file in self.files)
        return dump_json(
            {
                "metadata": {"total_parameters": self.num_parameters, "total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            },
            "The index of the model",
            indent=2,
        )


def split_files(specs: list[TensorSpec], max_shard_bytes: int) -> tuple[PlannedFile, ...]:
    """Fill files in order up to `max_shard_bytes`; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: max_shard_bytes is below 1.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes} must be at least 1.")
    shards: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    if len(shards) == 1:
        return (PlannedFile(SINGLE_NAME, tuple(shards[0])),)
    return tuple(
        PlannedFile(f"model-{index:05d}-of-{len(shards):05d}.safetensors", tuple(shard))
        for index, shard in enumerate(shards, start=1)
    )
