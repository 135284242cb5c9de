"""Stores of every tier for tests, at toy size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speed.offload import DeviceStore, DiskStore, HostStore, StagingPool, Store
from hf_speed.offload.pool import GRAIN_BYTES

CPU = torch.device("cpu")


class StagedDisk(DiskStore):
    """A disk store that treats the CPU as it treats a GPU: through staging buffers."""

    def _is_staged(self, tensor: Tensor) -> bool:
        del tensor
        return True


def _staged(path: Path) -> Store:
    return StagedDisk([path], staging=StagingPool(3 * GRAIN_BYTES, num_buffers=3, timeout_s=20))


TIERS: dict[str, Callable[[Path], Store]] = {
    "device": lambda _: DeviceStore(CPU),
    "host": lambda _: HostStore(),
    "host, memory used again": lambda _: HostStore(reuse=True),
    "disk": lambda path: DiskStore([path]),
    "three disks": lambda path: DiskStore([path] * 3, stripe_bytes=4096),
    "disk, staged": _staged,
}


@contextmanager
def opened(tier: str, path: Path) -> Iterator[Store]:
    """A store of `TIERS`, closed at the end."""
    store = TIERS[tier](path)
    try:
        yield store
    finally:
        store.close()


class Step(NamedTuple):
    """One call on a store: numbers from 0 to 1 choose among what is possible."""

    verb: str
    which: float
    start: float
    length: float
    waits: bool


def play(store: Store, steps: list[Step], device: torch.device = CPU) -> None:
    """Run `steps` on a store and on a dict of tensors, comparing all that is fetched.

    Args:
        store: empty.
        steps: what to do.
        device: of the tensors that are fetched into and committed.
    """
    plain: dict[str, Tensor] = {}
    fetched: list[tuple[object, Tensor, Tensor]] = []
    for index, step in enumerate(steps):
        if step.verb == "allocate":
            numel = SIZES[int(step.start * (len(SIZES) - 1))]
            dtype = DTYPES[int(step.length * (len(DTYPES) - 1))]
            plain[f"row{index}"] = torch.zeros(numel, dtype=dtype)
            store.allocate(f"row{index}", numel, dtype)
        elif plain:
            key = list(plain)[int(step.which * (len(plain) - 1))]
            if step.verb == "free":
                store.free(key)
                del plain[key]
                continue
            start = int(step.start * plain[key].numel())
            stop = start + int(step.length * (plain[key].numel() - start))
            part = plain[key][start:stop]
            if step.verb == "commit":
                value = (torch.arange(part.numel(), device=device) * 7 + index).to(part.dtype)
                part.copy_(value)
                ticket = store.commit(key, value, start)
            else:
                out = torch.full_like(part, 3, device=device)
                ticket = store.fetch(key, out, start)
                fetched.append((ticket, out, part.clone()))
            if step.waits:
                ticket.wait()
                assert ticket.done()
    for ticket, out, expected in fetched:
        ticket.wait()  # type: ignore[attr-defined]
        assert torch.equal(out.cpu(), expected)
    for key, expected in plain.items():
        out = torch.full_like(expected, 3, device=device)
        store.fetch(key, out).wait()
        assert torch.equal(out.cpu(), expected)
    assert store.num_bytes == sum(each.nbytes for each in plain.values()) <= store.peak_bytes


SIZES = [0, 1, 1000, 4096, 5000, 20_000, 30_000]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
