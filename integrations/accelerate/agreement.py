"""Do the ranks that share a batch get the same one?

Nothing would fail if they did not: the first pipeline stage would read one batch and the loss
another one's labels. So what goes into the model is compared, at its 1st, 2nd, 4th, 8th, ... call.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hf_speed.engine import Engine, engine_of
from hf_speed.errors import ConfigError
from hf_speed.mesh import ParallelMesh
from hf_speed.mesh.collectives import all_gather_flat


class SameBatch:
    """A hook before a model's forward that compares inputs over the ranks of one batch.

    The user's call counts: in a pipeline the model calls itself once for every stage and piece.
    """

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        self._calls = 0
        self._depth = 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare. At few calls one small all-gather over `pp` and `tp`; at others nothing.

        Raises:
            ConfigError: on every rank, if inputs differ.
        """
        self._depth += 1
        engine = self._engine
        # An engine that has given the model back has no mesh any more.
        if self._depth > 1 or engine is None or engine_of(model) is not engine:
            return
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            self._compare(engine.mesh, model, [*args, kwargs])

    def leave(self, *_: Any) -> None:
        """A hook behind the forward, also of one that fails."""
        self._depth -= 1

    def _compare(self, mesh: ParallelMesh, model: nn.Module, inputs: list[Any]) -> None:
        group = mesh.axis("pp", "tp")
        sums = torch.zeros(group.size, dtype=torch.int64, device=mesh.device)
        sums[group.rank] = _checksum(inputs)
        all_gather_flat(sums, group=group, journal=mesh.journal).wait()
        if len(set(sums.tolist())) > 1:
            raise ConfigError(
                f"The {group.size} ranks that share a batch (mesh.pp={mesh.sizes['pp']} x mesh.tp="
                f"{mesh.sizes['tp']}) gave {type(model).__name__} different inputs at its call "
                f"{self._calls}. Let the Trainer or accelerator.prepare() make the data loader; "
                f"where rows are shuffled or changed at random, seed all ranks alike (set_seed), "
                f"or let rank 0 read for all (dispatch_batches=True)."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SameBatch":
        """A copy of the model is a plain model."""
        return SameBatch(None)

    def __reduce__(self) -> tuple[type["SameBatch"], tuple[None]]:
        return SameBatch, (None,)


def watch_batches(engine: Engine) -> None:
    """Compare what the ranks of one batch give to an engine's model, for as long as it has it."""
    if engine.mesh.axis("pp", "tp").is_identity:
        return
    hook = SameBatch(engine)
    engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    engine.model.register_forward_hook(hook.leave, always_call=True)


def _checksum(value: Any) -> int:
    total = 0
    for tensor in _tensors(value):
        flat = tensor.detach().reshape(-1).cpu()
        total = crc32(str(tuple(tensor.shape)).encode(), total)
        if flat.numel():
            total = crc32(flat.view(torch.uint8).numpy().data, total)
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            # A cache is of the layers that a rank has.
            if name != "past_key_values":
                yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
