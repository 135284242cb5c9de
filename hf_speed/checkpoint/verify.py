"""Whether the weights of a checkpoint are those that were saved: read by all ranks, each a share.

State pieces are checked where they are read (`reader.py`): ranks ask for what they hold. Weights
are whole tensors, of which each rank may want a little; if each read them whole to check them, the
model would be read once for every rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hf_speed.checkpoint.digest import (
    FileRecord,
    Progress,
    digest_of,
    digest_span,
    digest_tensors,
    tree_digest,
)
from hf_speed.checkpoint.manifest import MANIFEST_PATH
from hf_speed.checkpoint.reader import read_manifest
from hf_speed.checkpoint.sources import TensorSource
from hf_speed.checkpoint.staging import agreed
from hf_speed.errors import CheckpointError
from hf_speed.mesh import AxisGroup


class Damage(NamedTuple):
    """What is wrong with a file, and in which tensor, if it is one."""

    tensor: str | None
    text: str


def verify_weights(directory: str | Path, *, world: AxisGroup) -> None:
    """Read the weights that the manifest lists, and compare checksums. Collective.

    Each byte is read by one rank. Nothing to do where there is no manifest (a plain Hub model), or
    one of a version without checksums. One object all-gather.

    Raises:
        CheckpointError: on every rank; a file is missing or damaged, with its name and the
            tensor's.
    """
    home = Path(directory)
    with agreed(world, f"Verifying the weights of {home}", left="Nothing was loaded."):
        if (home / MANIFEST_PATH).is_file():
            files = {
                name: record for name, record in read_manifest(home).files.items() if record.tensors
            }
            _verify_share(home, files, world)


def _verify_share(home: Path, files: Mapping[str, FileRecord], world: AxisGroup) -> None:
    total = sum(record.nbytes for record in files.values())
    # Shares are stretches of all the bytes; a tensor belongs to the rank in whose share it begins.
    low, high = (total * rank // world.size for rank in (world.rank, world.rank + 1))
    before = 0
    for name, record in files.items():
        if before < high and before + record.nbytes > low:
            with OpenFile(home / name) as file:
                damage = file.damage_of_header(record)
                mine = [
                    key
                    for key, span in file.header.spans.items()
                    if low <= before + span.begin < high
                ]
                for key in mine if damage is None else ():
                    damage = damage or file.damage_of(key, record.tensors[key])
            if damage is not None:
                raise CheckpointError(
                    f"{home / name} is damaged: {damage.text}. Copy the file again, or use another "
                    f"checkpoint."
                )
        before += record.nbytes


class OpenFile(TensorSource):
    """A safetensors file that is read to see whether it is what was saved."""

    def digests(self, progress: Progress | None = None) -> FileRecord:
        """Read the whole file, and say what is in it.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            tensors = digest_tensors(self._descriptor, self.header, progress)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}.") from error
        digest = tree_digest(digest_of(self.header.raw), tensors.values())
        return FileRecord(self.path.stat().st_size, digest, tensors)

    def damage_of_header(self, record: FileRecord) -> Damage | None:
        """Whether all before the data is as it was; reads no data.

        The checksum of the file is that of the header and those of the tensors, which the record
        has.
        """
        spans = self.header.spans
        for name in spans.keys() ^ record.tensors.keys():
            where = "the file has" if name in spans else "the manifest lists"
            return Damage(name, f"only {where} a tensor {name!r}")
        leaves = [record.tensors[name] for name in spans]
        found = tree_digest(digest_of(self.header.raw), leaves)
        if found != record.digest:
            return Damage(
                None,
                f"its header was changed: with it the checksum is {found}, that "
                f"of the save was {record.digest}",
            )
        return None

    def damage_of(self, name: str, digest: str) -> Damage | None:
        """Whether a tensor has the bytes that it had.

        Raises:
            CheckpointError: it cannot be read.
        """
        span = self.header.spans[name]
        try:
            found = digest_span(self._descriptor, span.begin, span.end)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read at {name}: {error}.") from error
        if found == digest:
            return None
        return Damage(
            name,
            f"in {name!r} (bytes {span.begin} to {span.end}): its checksum is {found}, that of the "
            f"save was {digest}",
        )
