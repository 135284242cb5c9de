"""Bytes of model state per rank and tier, from sizes alone: nothing is allocated.

With P elements in bf16, float32 masters and Adam, over N ranks, gradients accumulated in g bytes
(ZeRO, arXiv:1910.02054, figure 1, has g = 2):

    stage 0: 2P + gP + 12P             parameters, gradients, optimizer (master, two moments)
    stage 1, 2: 2P + gP/N + 12P/N
    stage 3: gP/N + 12P/N              and 2P/N where parameters or optimizer are off the device

plus what is in flight. Stage 1 sends its gradients on as the backward makes them, like stage 2; it
keeps whole ones only over micro-steps that do not reduce (`accumulates`). Activations, and what
kernels and torch take for themselves, are not counted.

With layers divided over T ranks and dealt out to S pipeline ranks, P is what is left on one of
them, about 1/(ST) of the model, and N the ranks of its data-parallel group. A pipeline reduces once
after all its backwards, so at every stage it keeps whole sums (gP); at stage 3 its parameters are
whole for the length of a step too (2P), unless pipe.gather is 'microbatch'.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple, Self

import torch

from hf_speed.config import SpeedConfig, TierBytes, Tiers
from hf_speed.config.offload import update_of
from hf_speed.config.parallel import check_world
from hf_speed.config.planner import ON_DEVICE
from hf_speed.engine.flight import Buffer, Passing, most_alive
from hf_speed.shard.layout import FlatLayout
from hf_speed.zero.gather import FETCHES_AHEAD
from hf_speed.zero.spec import GroupSpec

SCALE_BYTES = 4
QUEUE_DEPTH = 16
QUEUE_BLOCK_BYTES = 1 << 20
"""A disk's queue has so many blocks of its own for what is not aligned."""
BLOCK_NUMEL = 256
"""An int8 moment has one float32 scale for a block of so many elements."""


class GroupSize(NamedTuple):
    """One flat buffer to be: the elements of its parameters, and bytes per element.

    `num_sharers` pipeline or slicing ranks hold the same, and add up their gradients.
    """

    numels: tuple[int, ...]
    compute: int
    master: int
    wire: int
    accumulate: int
    trained: bool
    num_sharers: int = 1

    @classmethod
    def of(cls, spec: GroupSpec) -> Self:
        """The sizes of a group of a real model, or of one on the meta device."""
        numels = tuple(entry.parameter.numel() for entry in spec.entries)
        compute, master, wire, accumulate = (dtype.itemsize for dtype in spec.dtypes)
        num_sharers = max(len(spec.sharing.stages), 1) * max(len(spec.sharing.slices), 1)
        return cls(numels, compute, master, wire, accumulate, spec.trainable, num_sharers)

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(self.numels)

    @property
    def has_copy(self) -> bool:
        """Whether the optimizer updates a copy in another dtype."""
        return self.trained and self.master != self.compute


class StateBytes(NamedTuple):
    """Bytes per rank at one stage, by what they are; `by_tier` says where.

    Attributes:
        stage: 0 to 3.
        tiers: of optimizer, gradients and parameters.
        parameters: what the rank keeps while nothing computes.
        gradients: what waits for the step.
        optimizer: masters that are a copy, and moments.
        in_flight: on the device: gathered or fetched units, gradients on their way, chunks that
            are updated there.
        staging: host memory that chunks pass; only where a tier is not the device.
    """

    stage: int
    tiers: Tiers
    parameters: int
    gradients: int
    optimizer: int
    in_flight: int
    staging: int

    @property
    def total(self) -> int:
        """All of it, wherever it is."""
        return sum(self.by_tier)

    @property
    def by_tier(self) -> TierBytes:
        """The same bytes by where they are."""
        amounts = {"device": self.in_flight, "host": self.staging, "disk": 0}
        kinds = (self.optimizer, self.gradients, self.parameters)
        for tier, num_bytes in zip(self.tiers, kinds, strict=True):
            amounts[tier] += num_bytes
        return TierBytes(**amounts)


class Estimator:
    """Bytes of one rank of a model on one world, at any stage and tiers.

    Args:
        units: the groups of each unit, as `planning.group_specs` divides them; the root, which
            stays gathered from the start of the forward to the end of the backward, comes last.
            Of what this rank has: some of the layers under mesh.pp, slices of them under mesh.tp.
        config: what the user set; its stage and tiers are left to `at`.
        world_size: number of ranks.
        num_moments: tensors that the optimizer keeps per parameter (Adam 2, momentum 1, SGD 0).
        device_type: where modules compute; the host is at hand for a CPU and not for a GPU.
    """

    def __init__(
        self,
        units: Sequence[Sequence[GroupSize]],
        config: SpeedConfig,
        *,
        world_size: int,
        num_moments: int = 2,
        device_type: str = "cuda",
    ) -> None:
        self._blocks = [list(unit) for unit in units[:-1]]
        self._root = [group for unit in units[-1:] for group in unit]
        self._config = config
        self._num_moments = num_moments
        self._device_type = device_type
        sizes = check_world(config, world_size)
        self._replicas, self._shards = sizes.dp_replicate, sizes.dp_shard
        self._is_pipeline = sizes.pp > 1
        self._world_size = world_size
        self._layouts: dict[tuple[tuple[int, ...], int, int], FlatLayout] = {}

    def at(self, stage: int, tiers: Tiers = ON_DEVICE, *, accumulates: bool = False) -> StateBytes:
        """Estimate one stage.

        Args:
            stage: 0 to 3.
            tiers: of optimizer, gradients and parameters.
            accumulates: several backwards per step: stages 0 and 1 then keep whole gradients. In a
                pipeline there always are, and every stage does.
        """
        parameters = gradients = optimizer = 0
        # An update that may be refused writes into second buffers, a late one keeps its gradient.
        when = self._config.offload.step if tiers.optimizer != "device" else "after"
        num_buffers = 1 if when == "after" else 2
        num_gradients = 2 if when == "delayed" else 1
        for group in self._groups():
            layout = self.layout(group, stage)
            kept = _parameter_bytes(group, layout, stage=stage, tiers=tiers)
            parameters += kept
            if group.trained:
                optimizer += num_buffers * self._optimizer_bytes(group, layout.part_numel)
                gradients += num_gradients * layout.part_numel * group.accumulate
                if kept and num_buffers > 1:
                    parameters += layout.part_numel * group.compute
        on_device, on_host = self._staging(tiers, when)
        return StateBytes(
            stage=stage,
            tiers=tiers,
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            in_flight=self._in_flight(stage, tiers, accumulates=accumulates) + on_device,
            staging=on_host,
        )

    def needed(self, stage: int, tiers: Tiers) -> TierBytes:
        """What a plan is chosen by: as if gradients accumulated over micro-steps."""
        return self.at(stage, tiers, accumulates=True).by_tier

    def copied_by_save(self, stage: int, *, num_elements: int) -> int:
        """Host bytes that one rank copies at most for a save behind the training.

        They are its part of the states, and of the model's files, which are dealt out whole, so
        that what a rank gets is rounded up to files. Masters are in either, not in both.

        Args:
            stage: 0 to 3.
            num_elements: of the whole model.
        """
        limit = self._config.checkpoint.max_shard_bytes

        def in_files(itemsize: int) -> int:
            num_bytes = num_elements * itemsize
            num_files = ceil(ceil(num_bytes / limit) / self._world_size)
            return min(num_bytes, num_files * limit)

        groups = list(self._groups())
        parts = [(group, self.layout(group, stage).part_numel) for group in groups if group.trained]
        # Smaller moments are counted as if they were stored as float32.
        moments = self._num_moments * sum(numel * group.master for group, numel in parts)
        masters = sum(numel * group.master for group, numel in parts if group.has_copy)
        widest = max((group.master for group in groups), default=0)
        computes = max((group.compute for group in groups), default=0)
        return moments + max(in_files(widest), masters + in_files(computes))

    def _staging(self, tiers: Tiers, when: str) -> tuple[int, int]:
        """Bytes on device and host of the buffers that chunks pass.

        The update has some where a buffer cannot be updated in its place: on the host, or on a GPU
        that keeps the optimizer's state or shares the update. Between a disk and a GPU are others.
        """
        offload = self._config.offload
        if tiers == ON_DEVICE:
            return 0, 0
        queue = QUEUE_DEPTH * QUEUE_BLOCK_BYTES if "disk" in tiers else 0
        if self._device_type == "cpu":
            return 0, queue + (offload.staging_bytes if when != "after" or queue else 0)
        num_device = int(tiers.optimizer == "device") + int(offload.cpu_share < 1.0)
        num_host = int(tiers.optimizer != "device") + int("disk" in tiers)
        return num_device * offload.staging_bytes, queue + num_host * offload.staging_bytes

    def _streams(self, tiers: Tiers) -> bool:
        """Whether updates go chunk by chunk, as `GroupTiers.streams` says."""
        fused = update_of(self._config.offload, tiers.optimizer) == "fused"
        return tiers != ON_DEVICE or fused

    def _parts(self, stage: int) -> int:
        return self._shards if stage else 1

    def layout(self, group: GroupSize, stage: int) -> FlatLayout:
        """The flat buffer of a group at a stage."""
        parts = self._parts(stage)
        replicas = self.copies(group) // parts
        key = (group.numels, parts, replicas)
        if key not in self._layouts:
            self._layouts[key] = FlatLayout.plan(
                [("", (numel,)) for numel in group.numels],
                dtype=torch.uint8,
                parts=parts,
                replicas=replicas,
            )
        return self._layouts[key]

    def copies(self, group: GroupSize) -> int:
        """Ranks between which a group's gradients are summed."""
        return self._shards * self._replicas * group.num_sharers

    def _travels(self, group: GroupSize, tiers: Tiers) -> bool:
        """Whether gradients leave their parameters, as in `FlatGroup.travels`."""
        apart = group.has_copy or self._streams(tiers)
        return apart or self.copies(group) > 1

    def _is_gathered(self, group: GroupSize, stage: int, tiers: Tiers) -> bool:
        """Whether whole values are here only while they compute."""
        return tiers.parameters != "device" or (
            stage == 3 and (group.has_copy or self._parts(stage) > 1)
        )

    def _optimizer_bytes(self, group: GroupSize, numel: int) -> int:
        """Moments of `numel` elements, and their master where that is a copy."""
        match self._config.offload.moments:
            case "float32":
                moment = numel * group.master  # As torch keeps them: in the dtype that it updates.
            case "bfloat16":
                moment = numel * 2
            case _:
                moment = numel + ceil(numel / BLOCK_NUMEL) * SCALE_BYTES
        return self._num_moments * moment + (numel * group.master if group.has_copy else 0)

    def _in_flight(self, stage: int, tiers: Tiers, *, accumulates: bool) -> int:
        """Device bytes of what passes through, in buffers that are used again for equal sizes.

        A pipeline first computes: forwards, then with its sums here. Then it lets the parameters go
        and reduces the sums. The largest of the three counts.
        """
        sums = self._is_pipeline or (accumulates and stage < 2)
        here = self._gathered(stage, tiers)
        backward: list[list[Passing]] = []
        for unit in (*self._blocks[::-1], self._root):
            backward.append([])
            for group in unit:
                passing = self._passing(group, stage, tiers, sums=sums)
                backward[-1].append(passing)
        reducing = most_alive(backward[:-1], backward[-1], fills=not self._is_pipeline)
        if self._is_pipeline:
            # Those of a run wait beside older ones until its loss's backward says that they count.
            for _ in range(2 if accumulates else 1):
                here.update(each.summed for unit in backward for each in unit if each.summed)
            most = self._gathered(stage, tiers, num_kept=1) | here | reducing
        else:
            most = here + reducing
        num_bytes = sum(count * size.numel * size.itemsize for size, count in most.items())
        return num_bytes + self._widened(stage, tiers)

    def _passing(self, group: GroupSize, stage: int, tiers: Tiers, *, sums: bool) -> Passing:
        """The buffers that a group's gradients pass through.

        Args:
            group: whose.
            stage: 0 to 3.
            tiers: of model states.
            sums: they are summed up before, on the device whatever their tier, and reduced once.
        """
        layout = self.layout(group, stage)
        keeps = self._is_gathered(group, stage, tiers) and not self._is_pipeline
        gathered = None
        if keeps and not self._config.zero.regather and group not in self._root:
            gathered = Buffer(layout.padded_numel, group.compute)
        if not (group.trained and self._travels(group, tiers)):
            return Passing(gathered=gathered)
        return Passing(
            sent=Buffer(layout.padded_numel, group.wire),
            summed=Buffer(layout.padded_numel, group.accumulate) if sums else None,
            leaving=(
                Buffer(layout.part_numel, group.accumulate)
                if self._leaves(tiers.gradients)
                else None
            ),
            gathered=gathered,
        )

    def _gathered(self, stage: int, tiers: Tiers, *, num_kept: int = 0) -> Counter[Buffer]:
        """Buffers of gathered values: those that stay, and those of a few units at a time.

        Args:
            stage: 0 to 3.
            tiers: of model states.
            num_kept: units besides, which an earlier forward has kept for its backward.
        """
        zero, stays, passes = self._config.zero, Counter[Buffer](), Counter[Buffer]()
        all_stay = self._is_pipeline and (self._config.pipe.gather == "step" or not zero.regather)
        for unit in (*self._blocks, self._root):
            for group in unit:
                if not self._is_gathered(group, stage, tiers):
                    continue
                size = Buffer(self.layout(group, stage).padded_numel, group.compute)
                if unit is self._root or all_stay:
                    stays[size] += 1
                elif zero.regather:
                    passes[size] += 1
        num_ahead = zero.prefetch_units + 1 + num_kept
        if zero.prefetch_units and self._leaves(tiers.parameters):
            num_ahead += FETCHES_AHEAD
        return stays + Counter({size: min(count, num_ahead) for size, count in passes.items()})

    def _leaves(self, tier: str) -> bool:
        """Whether what goes to a tier is copied there, and is not made or read there."""
        return tier == "disk" or (tier == "host" and self._device_type != "cpu")

    def _groups(self) -> Iterator[GroupSize]:
        """Every group."""
        for unit in (*self._blocks, self._root):
            yield from unit

    def _widened(self, stage: int, tiers: Tiers) -> int:
        """Copies of 16-bit gradients in the dtype that torch's optimizer reads them in."""
        reads_any_dtype = update_of(self._config.offload, tiers.optimizer) == "fused"
        if tiers.optimizer != "device" or reads_any_dtype:
            return 0  # Off the device gradients are widened chunk by chunk.
        return sum(
            self.layout(group, stage).part_numel * group.master
            for group in self._groups()
            if group.trained and group.accumulate < group.master
        )


def _parameter_bytes(group: GroupSize, layout: FlatLayout, *, stage: int, tiers: Tiers) -> int:
    if stage < 3:
        return layout.padded_numel * group.compute
    on_device = tiers.parameters == tiers.optimizer == "device"
    # Gathers cast from the master where both are at hand: no part in the dtype that computes.
    return 0 if group.has_copy and on_device else layout.part_numel * group.compute
