"""The memory tiers of one run: which store holds what, and the walk that moves chunks between them.

A store is made for each tier that the config names, and shared by all buffers that live on it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch.optim import Optimizer

from hf_speed.config import ResolvedOffload
from hf_speed.engine.estimate import QUEUE_BLOCK_BYTES, QUEUE_DEPTH
from hf_speed.errors import ConfigError
from hf_speed.logs import get_logger
from hf_speed.offload import DiskStore, HostStore, StagingPool, Store
from hf_speed.offload.activations import ActivationOffload
from hf_speed.ops.aio import AioQueue
from hf_speed.optim.rules import UpdateRule, rule_of
from hf_speed.zero.cells import GroupTiers
from hf_speed.zero.chunks import Walk
from hf_speed.zero.group import FlatGroup
from hf_speed.zero.stream import SharedWalk, StreamedUpdates

_log = get_logger(__name__)

_MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


class MemoryTiers:
    """Opens the stores that a config asks for.

    Args:
        offload: every tier decided.
        device: where modules compute.

    Raises:
        OffloadError: a directory of the disk tier cannot be used.
    """

    def __init__(self, offload: ResolvedOffload, *, device: torch.device) -> None:
        self.device = device
        self._offload = offload
        self._stores: dict[str, Store] = {}
        self._queue: AioQueue | None = None
        parameters = self._store(offload.parameters)
        optimizer = self._store(offload.optimizer)
        gradients = self._store(offload.gradients)
        stores = (parameters, optimizer, gradients)
        streams = any(store is not None for store in stores) or offload.update == "fused"
        self.of_groups = GroupTiers(parameters, optimizer, gradients, streams=streams)
        self.activations = self._activation_offload() if offload.activations != "device" else None
        pin = device.type == "cuda"
        # The host updates what lives there or beyond: what travels then is the gradient alone.
        updates_on = device if optimizer is None else torch.device("cpu")
        self._walk = Walk(
            staging_bytes=offload.staging_bytes,
            device=updates_on,
            pin=pin and updates_on.type == "cpu",
        )
        self._shared: SharedWalk | None = None
        if offload.cpu_share < 1.0:
            walk = Walk(staging_bytes=offload.staging_bytes, device=device, pin=False)
            self._shared = SharedWalk(walk, 1.0 - offload.cpu_share)

    def _store(self, tier: str) -> Store | None:
        if tier == "device":
            return None
        if tier not in self._stores:
            self._stores[tier] = self.new_store("host" if tier == "host" else "disk")
        return self._stores[tier]

    def _activation_offload(self) -> ActivationOffload:
        """Rows come and go, so their store is one of its own."""
        offload = self._offload
        store: Store = (
            HostStore(pin=self.device.type == "cuda", reuse=True)
            if offload.activations == "host"
            else self.new_store("disk")
        )
        return ActivationOffload(
            store, min_bytes=offload.activation_min_bytes, window_bytes=offload.staging_bytes
        )

    def new_store(self, tier: Literal["host", "disk"], paths: Sequence[str] = ()) -> Store:
        """Another store, for who asks; its owner closes it.

        Args:
            tier: of the store.
            paths: directories of a disk store; none: those of the config.

        Raises:
            ConfigError: a disk without a directory.
        """
        on_gpu = self.device.type == "cuda"
        if tier == "host":
            return HostStore(pin=on_gpu)
        chosen = tuple(paths) or self._offload.paths
        if not chosen:
            raise ConfigError(
                "The disk tier needs a place: give paths=, one or more directories on fast local "
                "disks, or set offload.paths."
            )
        staging = StagingPool(self._offload.staging_bytes, pin=True) if on_gpu else None
        if self._queue is None:
            self._queue = AioQueue(depth=QUEUE_DEPTH, block_bytes=QUEUE_BLOCK_BYTES)
        return DiskStore(chosen, queue=self._queue, staging=staging)

    @property
    def stores(self) -> Sequence[Store]:
        """Every open store."""
        return tuple(self._stores.values())

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Highest use so far of the tiers that the process's own memory does not show."""
        disk = sum(store.peak_bytes for tier, store in self._stores.items() if tier == "disk")
        if self.activations is not None and self._offload.activations == "disk":
            disk += self.activations.peak_bytes
        return {"disk": disk} if disk else {}

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffers that the walks have needed, and of a disk's own blocks."""
        return self._walk.num_bytes + (0 if self._queue is None else self._queue.bounce_bytes)

    def updates_for(self, optimizer: Optimizer, groups: Sequence[FlatGroup]) -> StreamedUpdates:
        """How `optimizer` steps where buffers live on these tiers.

        Raises:
            ConfigError: offload.update or offload.moments ask for what its class has no kernel for.
        """
        return StreamedUpdates(
            optimizer,
            [group for group in groups if group.trainable],
            store=self.of_groups.optimizer,
            walk=self._walk,
            rule=self._rule(optimizer),
            moments=_MOMENTS[self._offload.moments],
            when=self._offload.step,
            shared=self._shared,
        )

    def _rule(self, optimizer: Optimizer) -> UpdateRule | None:
        """The one-pass kernel that updates as `optimizer` would, if it is wanted and there is one.

        Raises:
            ConfigError: the config asks for what only such a kernel can do.
        """
        offload = self._offload
        rule = None if offload.update == "torch" else rule_of(optimizer)
        if rule is not None:
            return rule
        wants = [
            f"offload.{field}={value!r}"
            for field, value, plain in (
                ("moments", offload.moments, "float32"),
                ("step", offload.step, "after"),
                ("cpu_share", offload.cpu_share, 1.0),
            )
            if value != plain
        ]
        if offload.update == "fused":
            wants.insert(0, "offload.update='fused'")
        if wants:
            raise ConfigError(
                f"{wants[0]} needs a one-pass kernel, and none is used for "
                f"{type(optimizer).__name__} here. Use AdamW, Adam, SGD, Adagrad or "
                f"hf_speed.optim.Lion, without amsgrad and the like and with offload.update left "
                f"out, or remove {wants[0].partition('=')[0]}."
            )
        _log.info("%s updates chunk by chunk with its own step.", type(optimizer).__name__)
        return None

    def close(self) -> None:
        """Give every tier's memory back."""
        if self.activations is not None:
            self.activations.close()
        with ExitStack() as closing:
            # In this order from the end: every store is closed, even if one of them fails to.
            if self._queue is not None:
                closing.callback(self._queue.close)
            for store in self._stores.values():
                closing.callback(store.close)
            self._stores.clear()
        self._queue = None
