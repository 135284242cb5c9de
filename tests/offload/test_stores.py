"""Every tier keeps the same bytes under the same calls, and says what is wrong with a call."""

import os
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speed.errors import OffloadError
from hf_speed.offload import DONE, DiskStore, HostStore, StagingPool, pinned
from hf_speed.ops.aio import AioQueue
from tests.offload.tiers import CPU, TIERS, StagedDisk, Step, opened, play

SHARE = st.floats(0, 1)
STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["allocate", "allocate", "fetch", "fetch", "commit", "commit", "free"]),
        *(SHARE, SHARE, SHARE),
        st.booleans(),
    ),
    max_size=40,
)
every_tier = pytest.mark.parametrize("tier", TIERS)


@every_tier
@settings(max_examples=30)
@given(steps=STEPS)
def test_a_store_is_a_dict_of_tensors(
    tmp_path_factory: pytest.TempPathFactory, tier: str, steps: list[Step]
) -> None:
    with opened(tier, tmp_path_factory.mktemp("disk")) as store:
        play(store, steps)


@every_tier
def test_intervals_in_flight_keep_their_order(tier: str, tmp_path: Path) -> None:
    # Nothing is waited for until the end: what is fetched is what was committed before.
    with opened(tier, tmp_path) as store:
        store.allocate("row", 100_000, torch.float32)
        plain = torch.zeros(100_000)
        kept = []
        for index in range(60):
            start, count = (index * 7919) % 60_000, 1000 * (index % 40)
            value = torch.full((count,), float(index))
            kept.append((store.commit("row", value, start), value, value))
            plain[start : start + count] = index
            if index % 3 == 0:
                out = torch.empty(50_000)
                kept.append((store.fetch("row", out, 25_000), out, plain[25_000:75_000].clone()))
        for ticket, out, expected in kept:
            ticket.wait()
            assert torch.equal(out, expected)


@every_tier
def test_rows_are_counted_by_their_bytes(tier: str, tmp_path: Path) -> None:
    with opened(tier, tmp_path) as store:
        store.allocate("a", 10_001, torch.bfloat16)
        store.allocate("b", 3, torch.float32)
        store.allocate("none", 0, torch.float32)
        assert (store.num_bytes, store.peak_bytes) == (20_014, 20_014)
        store.free("a")
        assert (store.num_bytes, store.peak_bytes) == (12, 20_014)
        store.allocate("a", 3, torch.uint8)
        assert (store.num_bytes, store.peak_bytes) == (15, 20_014)


@every_tier
def test_a_row_whose_memory_was_used_before_reads_as_zeros(tier: str, tmp_path: Path) -> None:
    with opened(tier, tmp_path) as store:
        for index in range(3):
            store.allocate(f"row{index}", 9000, torch.float32)
            out = torch.ones(9000)
            store.fetch(f"row{index}", out).wait()
            assert not out.any()
            store.commit(f"row{index}", torch.ones(9000)).wait()
            store.free(f"row{index}")


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_view_is_the_memory_itself(tier: str, tmp_path: Path) -> None:
    with opened(tier, tmp_path) as store:
        store.allocate("row", 5000, torch.float32)
        view = store.view("row")
        assert view is not None
        view[4096:].fill_(2)
        out = torch.zeros(904)
        assert store.fetch("row", out, 4096) is DONE
        assert torch.equal(out, torch.full((904,), 2.0))
        store.commit("row", torch.ones(10)).wait()
        assert view[:10].sum() == 10


def test_a_disk_has_no_view(tmp_path: Path) -> None:
    with opened("disk", tmp_path) as store:
        store.allocate("row", 5, torch.float32)
        assert store.view("row") is None
        with pytest.raises(OffloadError, match="cannot view 'rwo': the disk tier has no such key"):
            store.view("rwo")


@every_tier
def test_a_call_that_makes_no_sense_says_why(tier: str, tmp_path: Path) -> None:
    store = TIERS[tier](tmp_path)
    name = store.tier
    store.allocate("row", 100, torch.float32)
    row = torch.zeros(100)
    cases = [
        (
            lambda: store.allocate("row", 1, torch.uint8),
            "'row' on the .* tier: it exists, with 100",
        ),
        (lambda: store.allocate("new", -1, torch.uint8), "cannot allocate -1 elements for 'new'"),
        (lambda: store.fetch("no", row), f"cannot fetch 'no': the {name} tier has no such key"),
        (lambda: store.commit("no", row), f"cannot commit 'no': the {name} tier has no such key"),
        (lambda: store.free("no"), f"cannot free 'no': the {name} tier has no such key"),
        (lambda: store.fetch("row", row.half()), "and torch.float16: its row holds torch.float32"),
        (lambda: store.commit("row", row.view(10, 10)), r"shape \(10, 10\), strides \(10, 1\)"),
        (lambda: store.commit("row", row[::2]), r"strides \(2,\) .* Give a contiguous tensor"),
        (lambda: store.fetch("row", row, 1), "cannot fetch elements 1 to 101 of 'row': it has 100"),
        (lambda: store.commit("row", row, -1), "cannot commit elements -1 to 99 of 'row'"),
    ]
    for call, message in cases:
        with pytest.raises(OffloadError, match=message):
            call()
    assert store.num_bytes == 400
    store.close()
    store.close()
    assert store.num_bytes == 0
    with pytest.raises(OffloadError, match=f"fetch 'row': this store of the {name} tier is closed"):
        store.fetch("row", row)
    with pytest.raises(OffloadError, match=r"cannot allocate 'x': this store of the .* is closed"):
        store.allocate("x", 1, torch.uint8)


def test_a_gpu_needs_staging_buffers(tmp_path: Path) -> None:
    store = StagedDisk([tmp_path])
    store.allocate("row", 100, torch.float32)
    with pytest.raises(
        OffloadError, match=r"no staging buffers, and cpu cannot be read .* staging"
    ):
        store.fetch("row", torch.zeros(100))
    store.close()


def test_staged_transfers_take_no_more_than_their_buffers(tmp_path: Path) -> None:
    pool = StagingPool(4 * 32768, num_buffers=4, timeout_s=20)
    store = StagedDisk([tmp_path], staging=pool)
    value = torch.arange(1_000_000, dtype=torch.float32)
    store.allocate("row", value.numel(), value.dtype)
    held = pool.take()  # someone else has one: the others do
    tickets = [store.commit("row", value)]
    out = torch.zeros_like(value)
    tickets.append(store.fetch("row", out))
    for ticket in tickets:
        ticket.wait()
    assert torch.equal(out, value)
    pool.give(held)
    assert pool.num_free == 4
    store.close()


def test_a_staged_transfer_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    queue = AioQueue()
    pool = StagingPool(2 * 32768, num_buffers=2, timeout_s=0.05)
    store = StagedDisk([tmp_path], queue=queue, staging=pool)
    store.allocate("row", 100_000, torch.uint8)
    store.commit("row", torch.ones(100_000, dtype=torch.uint8)).wait()
    held = [pool.take(), pool.take()]
    ticket = store.fetch("row", torch.empty(100_000, dtype=torch.uint8))
    with pytest.raises(OffloadError, match="all 2 staging buffers of 32768 bytes were held"):
        ticket.wait()
    for buffer in held:
        pool.give(buffer)
    queue.close()
    ticket = store.fetch("row", torch.empty(100_000, dtype=torch.uint8))
    with pytest.raises(OffloadError, match=r"between disk and cpu failed: .*the queue is closed"):
        ticket.wait()
    assert pool.num_free == 2
    store.close()


def test_a_fork_is_told_to_make_its_own_store(tmp_path: Path) -> None:
    with opened("disk, staged", tmp_path) as store:
        store.allocate("row", 100, torch.uint8)
        store.commit("row", torch.ones(100, dtype=torch.uint8)).wait()
        said, say = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
            child = os.fork()
        if child == 0:
            try:
                store.fetch("row", torch.empty(100, dtype=torch.uint8))
            except OffloadError as error:
                os.write(say, str(error).encode())
            finally:
                os._exit(0)
        os.close(say)
        with os.fdopen(said) as pipe:
            assert re.search(
                r"store was made before a fork, .* Make a store of its own", pipe.read()
            )
        os.waitpid(child, 0)
        out = torch.empty(100, dtype=torch.uint8)
        store.fetch("row", out).wait()
        assert out.all()


class _Runtime:
    """A CUDA runtime that counts what is locked, and locks one row only."""

    def __init__(self) -> None:
        self.locked: set[int] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        """0, or CUDA's number for a lack of memory."""
        assert nbytes > 0
        assert flags == 0
        if self.locked:
            return 2
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """0."""
        self.locked.remove(address)
        return 0


def test_host_rows_are_locked_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _Runtime()
    monkeypatch.setattr(pinned, "_runtime", lambda: runtime)
    store = HostStore(pin=True)
    store.allocate("none", 0, torch.float32)
    store.allocate("row", 100, torch.float32)
    assert runtime.locked == {store.view("row").data_ptr()}
    with pytest.raises(
        OffloadError, match=r"the host tier is full: 'new' .*CUDA cannot lock 4 byte"
    ):
        store.allocate("new", 1, torch.float32)
    store.free("row")
    assert not runtime.locked
    store.allocate("new", 1, torch.float32)
    store.close()
    assert not runtime.locked
    store = HostStore(pin=True)
    store.allocate("row", 100, torch.float32)
    del store  # not closed
    assert not runtime.locked
    pool = StagingPool(1 << 20, pin=True)
    assert len(runtime.locked) == 1
    pool.close()
    assert not runtime.locked


def test_a_full_host_and_a_full_device_say_so(tmp_path: Path) -> None:
    for tier, instead in (("host", "disk"), ("device", "host")):
        with opened(tier, tmp_path) as store:
            store.allocate("small", 1000, torch.uint8)
            with pytest.raises(OffloadError) as caught:
                store.allocate("large", 1 << 60, torch.float32)
            message = str(caught.value)
            assert (
                f"the {tier} tier is full: 'large' needs {1 << 62} bytes (4294967296.00 GiB)"
                in (message)
            )
            assert "beside 1000 bytes (0.00 GiB) of other rows" in message
            assert f"offload.optimizer='{instead}'" in message
            assert store.num_bytes == 1000


def test_host_rows_take_no_memory_before_they_are_written() -> None:
    store = HostStore()
    before = _resident_bytes()
    store.allocate("row", 1 << 30, torch.uint8)
    assert _resident_bytes() - before < 8 << 20
    store.commit("row", torch.ones(64 << 20, dtype=torch.uint8)).wait()
    assert _resident_bytes() - before > 56 << 20
    store.free("row")
    assert _resident_bytes() - before < 16 << 20
    store.close()


def _resident_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) * 1024


def test_host_memory_that_is_used_again_never_raises_the_peak() -> None:
    store = HostStore(reuse=True)
    addresses = []
    for _ in range(3):
        store.allocate("a", 1 << 20, torch.uint8, zeros=False)
        view = store.view("a")
        assert view is not None
        addresses.append(view.data_ptr())
        store.free("a")
    assert len(set(addresses)) == 1
    store.allocate("b", (1 << 20) - 4096, torch.uint8)  # another size: the first one goes back
    assert store._kept_bytes == 0
    assert store.peak_bytes == 1 << 20
    store.close()


@pytest.mark.parametrize("tier", ["host", "disk", "disk, staged"])
def test_a_store_is_shared_by_threads(tier: str, tmp_path: Path) -> None:
    failures: list[str] = []
    with opened(tier, tmp_path) as store:

        def work(name: int) -> None:
            for index in range(20):
                value = torch.full((3000,), float(name * 100 + index))
                out = torch.empty_like(value)
                key = f"{name}.{index}"
                store.allocate(key, 3000, torch.float32)
                store.commit(key, value)
                store.fetch(key, out).wait()
                if not torch.equal(out, value):
                    failures.append(key)
                store.free(key)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.num_bytes == 0


def test_disk_rows_take_disk_and_no_memory(tmp_path: Path) -> None:
    store = DiskStore([tmp_path])
    before = _resident_bytes()
    store.allocate("row", 64 << 20, torch.uint8)
    assert _resident_bytes() - before < 4 << 20
    assert store.file_bytes == 64 << 20
    store.free("row")
    store.allocate("half", 32 << 20, torch.uint8)
    store.allocate("other half", 32 << 20, torch.uint8)
    assert store.file_bytes == 64 << 20
    store.close()
    assert (store.device, store.tier) == (CPU, "disk")
