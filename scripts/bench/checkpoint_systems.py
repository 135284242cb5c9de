"""What the checkpoint benches save: one run of one model under each system, ZeRO-3 on every rank.

Each rank holds a `Trainee`, whose methods are the commands of its world (`pipe_world`):

    train(n)         seconds of each step
    save(place)      seconds until the system's call returned on every rank, and until all of its
                     files were forced to disk; memory that the save took beyond the training
    behind(place)    the same save beside the training, where the system has that: how long its call
                     blocks, and the steps until it is whole
    load(place)      seconds to put it back

DeepSpeed forces nothing to disk, DCP all but the consolidated model; the bench forces what is left,
each rank its part of the files. Before a load all files leave the page cache.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
import torch.distributed as dist
from workload import Shape, make_batch

MIB = 1 << 20
SHARD_BYTES = 128 * MIB
"""Files of the model: several for each rank, as a large model has them at 5 GiB."""

PATIENCE = 100
"""Steps within which a save behind the training must be whole."""


class Saved(NamedTuple):
    """One save, on one rank."""

    returned_s: float
    """Until the call had returned on every rank."""
    durable_s: float
    """Until everything was on disk."""
    extra_bytes: int
    """Peak resident memory within the save, beyond what was resident before it."""


class Behind(NamedTuple):
    """One save beside the training, on one rank."""

    stall_s: float
    """For which the call, and what it put off, kept the training."""
    whole_s: float
    """From the call until all is on disk, seen at the end of a step."""
    steps_s: list[float]
    """The steps that ran meanwhile."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"this kernel's /proc/self/status has no {field}")
    return int(match[1]) * 1024


def forget_peak() -> int:
    """Give freed memory back, start the peak anew, and give what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def files_of(place: str) -> list[Path]:
    """All files below a directory, sorted."""
    return sorted(path for path in Path(place).rglob("*") if path.is_file())


def force(paths: list[Path]) -> None:
    """Force files or directories to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def evict(place: str) -> None:
    """Have the files read from disk, not from the page cache; those of a tmpfs stay in memory."""
    for path in files_of(place):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Trainee:
    """One rank of a system that trains; the subclasses say how the system saves."""

    def __init__(self, system: peers.System, shape: Shape, rank: int) -> None:
        """Train one step, so that the optimizer has state."""
        self.system = system
        self._ids = make_batch(shape, rank, "cpu")
        self.train(1)

    def write(self, place: str) -> None:
        """Save as the system's users do."""
        raise NotImplementedError

    def read(self, place: str) -> None:
        """Load what `write` wrote."""
        raise NotImplementedError

    def start_behind(self, place: str) -> None:
        """Start a save beside the training."""
        raise NotImplementedError(f"{type(self).__name__} has no save beside the training.")

    def is_whole(self, place: str) -> bool:
        """Whether that save is done, as far as this rank knows."""
        raise NotImplementedError

    def put_off_s(self) -> float:
        """Seconds for which saves have kept the training after their call had returned, in all."""
        return 0.0

    def train(self, count: int) -> list[float]:
        """Seconds of each step."""
        return [self._step() for _ in range(count)]

    def loss(self) -> float:
        """The loss of the next step, which is not taken: of the state as it is."""
        with torch.no_grad():
            return float(self.system.model(input_ids=self._ids, labels=self._ids).loss)

    def save(self, place: str) -> Saved:
        """See the module."""
        before = forget_peak()
        begin = self._together()
        self.write(place)
        returned = self._together()
        peak = resident("VmHWM")
        rank, size = dist.get_rank(), dist.get_world_size()
        force(files_of(place)[rank::size])
        if rank == 0:
            force([Path(place), *(path for path in Path(place).rglob("*") if path.is_dir())])
        return Saved(returned - begin, self._together() - begin, max(peak - before, 0))

    def behind(self, place: str) -> Behind:
        """See the module."""
        put_off = self.put_off_s()
        begin = self._together()
        self.start_behind(place)
        stall = time.perf_counter() - begin
        steps: list[float] = []
        while not self._agreed(self.is_whole(place)):
            if len(steps) == PATIENCE:
                raise RuntimeError(f"the save was not whole after {PATIENCE} steps")
            steps.append(self._step())
        stall += self.put_off_s() - put_off
        return Behind(stall, time.perf_counter() - begin, steps)

    def load(self, place: str) -> float:
        """See the module."""
        begin = self._together()
        self.read(place)
        return self._together() - begin

    def _step(self) -> float:
        begin = time.perf_counter()
        self.system.backward(self._ids)
        self.system.update()
        return time.perf_counter() - begin

    @staticmethod
    def _together() -> float:
        dist.barrier()
        return time.perf_counter()

    @staticmethod
    def _agreed(said: bool) -> bool:  # noqa: FBT001 - it is the value that is agreed on
        flag = torch.tensor([int(said)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())


class Ours(Trainee):
    """hf_speed: a Hub model and, beside it, masters where they differ, moments and counters."""

    def __init__(self, shape: Shape, dtype: str, rank: int) -> None:
        """At stage 3."""
        from hf_speed.engine import engine_of

        options: dict[str, object] = {"asynchronous": True, "max_shard_bytes": SHARD_BYTES}
        system = peers.ours(shape, dtype, "cpu", stage=3, checkpoint=options)
        found = engine_of(system.model)
        if found is None:
            raise RuntimeError("the model has no engine")
        self._engine = found
        super().__init__(system, shape, rank)

    def write(self, place: str) -> None:
        """As save_state and the Trainer do."""
        self._submit(place, self._engine.saves.at_once(f"Saving {place}"))

    def read(self, place: str) -> None:
        """As load_state and the Trainer do."""
        from hf_speed.integrations.weights import load_model

        load_model(self._engine, place)
        self._engine.load(place)

    def start_behind(self, place: str) -> None:
        """With checkpoint.asynchronous."""
        self._submit(place, self._engine.saves.begin(f"Saving {place}"))

    def put_off_s(self) -> float:
        """What a step is about to change is copied just before it."""
        return self._engine.saves.secured_s

    def is_whole(self, place: str) -> bool:
        """The manifest is written last."""
        from hf_speed.checkpoint.manifest import MANIFEST_PATH

        return (Path(place) / MANIFEST_PATH).is_file()

    def _submit(self, place: str, save: Any) -> None:
        from hf_speed.integrations.weights import write_model

        write_model(self._engine, place, save=save)
        self._engine.save(place, save=save)


class DeepSpeed(Trainee):
    """DeepSpeed ZeRO-3: every rank its own pickles; no Hub model."""

    TAG = "step"

    def __init__(self, shape: Shape, dtype: str, rank: int) -> None:
        """At stage 3, with the bucket that transformers' integration would choose."""
        system = peers.deepspeed(shape, dtype, "cpu", stage=3, small_bucket=True)
        super().__init__(system, shape, rank)

    def write(self, place: str) -> None:
        """`save_checkpoint`."""
        self._engine.save_checkpoint(place, tag=self.TAG)

    def read(self, place: str) -> None:
        """`load_checkpoint`."""
        path, _ = self._engine.load_checkpoint(place, tag=self.TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {place}")

    @property
    def _engine(self) -> Any:
        return self.system.model


class Dcp(Trainee):
    """FSDP2 with DCP: the model in safetensors files, the optimizer in DCP's own.

    Each rank writes its shards. `consolidate` makes a Hub model from the model's, which is what
    the other two thirds of a comparison with a Hub model are about.
    """

    def __init__(self, shape: Shape, dtype: str, rank: int, *, consolidate: bool = False) -> None:
        """`fully_shard`, as in `peers`."""
        self._consolidate = consolidate
        self._future: Any = None
        self._group: Any = dist.new_group(backend="gloo")
        super().__init__(peers.fsdp2(shape, dtype, "cpu"), shape, rank)

    def consolidating(self, yes: bool) -> None:  # noqa: FBT001 - a command takes its value by place
        """Make a Hub model from now on, or not."""
        self._consolidate = yes

    def write(self, place: str) -> None:
        """`HuggingFaceStorageWriter` and `FileSystemWriter`, all else left at its defaults."""
        from torch.distributed import checkpoint as dcp

        model, optimizer = self._states()
        writer = dcp.HuggingFaceStorageWriter(
            f"{place}/model", save_distributed=True, enable_consolidation=self._consolidate
        )
        dcp.save(model, storage_writer=writer)
        dcp.save(optimizer, storage_writer=dcp.FileSystemWriter(f"{place}/optimizer"))

    def read(self, place: str) -> None:
        """The model from the Hub files if there are such, else from the shards."""
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, optimizer = self._states()
        dcp.load(model, storage_reader=dcp.HuggingFaceStorageReader(f"{place}/model"))
        dcp.load(optimizer, storage_reader=dcp.FileSystemReader(f"{place}/optimizer"))
        set_state_dict(
            self.system.model,
            self._optimizer,
            model_state_dict=model,
            optim_state_dict=optimizer,
        )

    def start_behind(self, place: str) -> None:
        """`async_save` of both in one, as DCP keeps one save in flight."""
        from torch.distributed import checkpoint as dcp

        model, optimizer = self._states()
        self._future = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            storage_writer=dcp.FileSystemWriter(place),
            process_group=self._group,
        )

    def is_whole(self, place: str) -> bool:
        """The future says so."""
        del place
        return bool(self._future.done())

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self.system.optimizer is None:
            raise RuntimeError("FSDP2's system tells no optimizer")
        return self.system.optimizer

    def _states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.system.model, self._optimizer)
        return model, dict(optimizer)


SYSTEMS = {"hf_speed": Ours, "DeepSpeed": DeepSpeed, "DCP": Dcp}
