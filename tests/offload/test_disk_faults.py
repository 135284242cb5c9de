"""What goes wrong with a disk is an error with the place and the key, never a wrong number."""

import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_speed.errors import OffloadError
from hf_speed.offload import DiskStore, StagingPool, Ticket
from tests.offload.tiers import StagedDisk

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def _store(path: Path, *, staged: bool) -> DiskStore:
    if staged:
        return StagedDisk([path], staging=StagingPool(MIB, num_buffers=4, timeout_s=20))
    return DiskStore([path])


def _truncate(store: DiskStore, nbytes: int) -> None:
    for fd in store._file._fds:
        os.ftruncate(fd, nbytes)


@contextlib.contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    """Writes behind `nbytes` of any file fail, as on a disk that has gone bad there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


both_ways = pytest.mark.parametrize("staged", [False, True])


@both_ways
def test_a_truncated_file_is_an_error_of_the_fetch(tmp_path: Path, *, staged: bool) -> None:
    store = _store(tmp_path, staged=staged)
    store.allocate("row", MIB, torch.uint8)
    store.allocate("other", 4096, torch.uint8)
    store.commit("row", torch.ones(MIB, dtype=torch.uint8)).wait()
    _truncate(store, MIB // 2)
    ticket = store.fetch("row", torch.empty(MIB, dtype=torch.uint8))
    for _ in range(2):
        with pytest.raises(
            OffloadError,
            match=rf"the fetch of 'row' failed on {re.escape(str(tmp_path))}/.*errno 5",
        ) as caught:
            ticket.wait()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    assert ticket.done()
    # The other half of the row, and other rows, are as they were.
    out = torch.empty(MIB // 4, dtype=torch.uint8)
    store.fetch("row", out).wait()
    assert out.all()
    store.close()


@both_ways
def test_a_failed_commit_is_an_error_of_its_ticket(tmp_path: Path, *, staged: bool) -> None:
    store = _store(tmp_path, staged=staged)
    store.allocate("row", MIB, torch.uint8)
    value = torch.ones(MIB, dtype=torch.uint8)
    with _largest_file(MIB // 2):
        ticket = store.commit("row", value)
        with pytest.raises(OffloadError, match=r"the commit of 'row' failed on .*File too large"):
            ticket.wait()
    # Nobody is given what is left of it, though the disk is well again.
    with pytest.raises(OffloadError, match="'row' is lost, since a write to it has failed"):
        store.fetch("row", value)
    with pytest.raises(OffloadError, match="'row' is lost"):
        store.commit("row", value)
    store.free("row")
    store.allocate("row", MIB, torch.uint8)
    store.commit("row", value).wait()
    store.close()


CALLS = {
    "allocate": lambda store: store.allocate("new", 1, torch.uint8),
    "fetch": lambda store: store.fetch("other", torch.empty(4096, dtype=torch.uint8)),
    "fetch of the row": lambda store: store.fetch("row", torch.empty(MIB, dtype=torch.uint8)),
    "commit": lambda store: store.commit("other", torch.empty(4096, dtype=torch.uint8)),
    "close": lambda store: store.close(),
}


@both_ways
@pytest.mark.parametrize("call", CALLS)
def test_a_failed_commit_that_nobody_waits_for_is_heard(
    tmp_path: Path, call: str, *, staged: bool
) -> None:
    store = _store(tmp_path, staged=staged)
    store.allocate("row", MIB, torch.uint8)
    store.allocate("other", 4096, torch.uint8)
    with _largest_file(MIB // 2):
        ticket = store.commit("row", torch.ones(MIB, dtype=torch.uint8))
        _until_done(ticket)
        with pytest.raises(OffloadError, match=r"the commit of 'row' failed on .*File too large"):
            CALLS[call](store)
    # Heard once is enough: what does not touch the row goes on.
    if call != "close":
        store.commit("other", torch.ones(4096, dtype=torch.uint8)).wait()
    with pytest.raises(OffloadError, match="the commit of 'row' failed"):
        ticket.wait()
    store.close()
    assert list(tmp_path.iterdir()) == []


def _until_done(ticket: Ticket) -> None:
    while not ticket.done():
        pass


def test_a_failed_commit_that_a_fetch_has_to_wait_for_is_heard(tmp_path: Path) -> None:
    store = DiskStore([tmp_path])
    store.allocate("row", 8 * MIB, torch.uint8)
    with _largest_file(MIB // 2):
        store.commit("row", torch.ones(8 * MIB, dtype=torch.uint8))
        with pytest.raises(OffloadError, match=r"the commit of 'row' failed|'row' is lost"):
            store.fetch("row", torch.empty(MIB, dtype=torch.uint8)).wait()
    store.close()


def test_a_cut_page_that_cannot_be_read_is_an_error_of_the_commit(tmp_path: Path) -> None:
    store = DiskStore([tmp_path])
    store.allocate("row", 8192, torch.uint8)
    store.commit("row", torch.ones(8192, dtype=torch.uint8)).wait()
    _truncate(store, 0)
    with pytest.raises(OffloadError, match="the fetch of 'row' failed on"):
        store.commit("row", torch.zeros(10, dtype=torch.uint8), 7)
    store.close()


def test_a_full_disk_is_an_error_of_the_allocation(tmp_path: Path) -> None:
    store = DiskStore([tmp_path, tmp_path], stripe_bytes=4096)
    store.allocate("small", 100, torch.float32)
    with _largest_file(4 * MIB):
        with pytest.raises(OffloadError) as caught:
            store.allocate("large", 16 * MIB, torch.float32)
        assert re.search(
            r"the disk tier is full: 'large' needs \d+ bytes \(0\.06 GiB\) more, and free are "
            rf"{re.escape(str(tmp_path))}: \d+ bytes \(\d+\.\d\d GiB\), .*File too large",
            str(caught.value),
        )
        store.allocate("fits", MIB, torch.float32)
        value = torch.arange(MIB, dtype=torch.float32)
        store.commit("fits", value).wait()
        out = torch.empty_like(value)
        store.fetch("fits", out).wait()
        assert torch.equal(out, value)
    assert store.num_bytes == 400 + 4 * MIB
    store.close()


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"a disk store needs a place: set offload\.paths"):
        DiskStore([])
    with pytest.raises(OffloadError, match=r"names .*/missing, which does not exist. Make the dir"):
        DiskStore([tmp_path, tmp_path / "missing"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r"names .*/file, which is not a directory. Name one"):
        DiskStore([tmp_path / "file"])


def test_a_forbidden_place_is_refused() -> None:
    # Root may write anywhere, so root looks as another user, in a process of its own.
    code = (
        "import os, sys, torch\n"
        "from hf_speed.offload.rundir import RunDirectory\n"
        "from pathlib import Path\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: RunDirectory(Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o555)
        said = _python(code, path)
    assert "this process may not write there. Change its permissions, or name another" in said


def _python(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


MOUNTED = """
import contextlib, logging, os, sys, torch
from pathlib import Path
from hf_speed.errors import OffloadError
from hf_speed.offload import DiskStore
logging.basicConfig(stream=sys.stdout, format="%(message)s")
small, plain, closed = map(Path, sys.argv[1:])
MIB = 1 << 20

def refused(call, *words):
    try:
        call()
    except OffloadError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

refused(lambda: DiskStore([closed]), f"cannot use {closed}/", "mounted read-only. Name a directory")
assert not list(closed.iterdir())

store = DiskStore([small])
store.allocate("a", MIB // 4, torch.float32)                       # of 4 MiB
refused(lambda: store.allocate("b", MIB, torch.float32),
        "the disk tier is full: 'b' needs 4194304 bytes", f"{small}: 31", "No space left on device")
value = torch.arange(MIB // 4, dtype=torch.float32)
store.commit("a", value).wait()
store.allocate("c", MIB // 4, torch.float32)
out = torch.empty_like(value)
store.fetch("a", out).wait()
assert torch.equal(out, value)
filler = os.open(small / "filler", os.O_CREAT | os.O_WRONLY)       # someone else fills the disk
with contextlib.suppress(OSError):
    while os.write(filler, bytes(4096)): pass
refused(lambda: store.allocate("d", 4096, torch.float32), "'d' needs 16384 bytes", ": 0 bytes (0.0")
refused(lambda: DiskStore([small]), f"cannot use {small}: it is full, 0 bytes are free. Make")
store.commit("c", value).wait()                                    # its space was reserved
store.close()
(small / "filler").unlink()
assert not list(small.iterdir())

store = DiskStore([plain])
assert store.direct is False
store.allocate("a", 5000, torch.bfloat16)
store.commit("a", torch.ones(2500, dtype=torch.bfloat16), 1000).wait()
out = torch.empty(5000, dtype=torch.bfloat16)
store.fetch("a", out).wait()
assert out.sum() == 2500 and out[1000:3500].all()
store.close()
assert not list(plain.iterdir())
"""


def test_small_plain_and_read_only_file_systems(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("small", "plain", "closed")]
    for place in places:
        place.mkdir()
    small, plain, closed = map(str, places)
    unshare = shutil.which("unshare")
    private = [unshare or "unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mounts = (
        f"mount -t tmpfs -o size=4m none {small} && mount -t ramfs none {plain} && "
        f"mount -t tmpfs -o size=4m,ro none {closed}"
    )
    if unshare is None or subprocess.run([*private, "sh", "-c", mounts], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs and a ramfs in a namespace of its own")
    prefix = (*private, "sh", "-c", f'{mounts} && exec "$@"', "sh")
    said = _python(MOUNTED, small, plain, closed, prefix=prefix)
    assert f"the file system of {plain} has no direct I/O" in said
    assert "name a directory on a local disk" in said
