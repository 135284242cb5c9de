"""File I/O moves bytes unchanged, over both backends, and tells every failure of the kernel."""

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_speed.ops.aio import PAGE_BYTES, AioFile, AioQueue, aligned_empty

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
ACCESS = {"direct where possible": None, "buffered": False}


@pytest.fixture(params=["io_uring", "threads"])
def queue(request: pytest.FixtureRequest) -> Iterator[AioQueue]:
    try:
        made = AioQueue(backend=request.param, depth=4, block_bytes=16 * PAGE_BYTES)
    except OSError as error:
        pytest.skip(f"needs {request.param}: {error}")
    assert made.backend == request.param
    yield made
    made.close()


def _file(directory: Path, nbytes: int, *, parts: int = 1, direct: bool | None = None) -> AioFile:
    paths = [directory / f"part{i}" for i in range(parts)]
    return AioFile(paths, nbytes=nbytes, stripe_bytes=8 * PAGE_BYTES, direct=direct)


def _random(nbytes: int, *, shift: int) -> Tensor:
    whole = aligned_empty(nbytes + shift, torch.uint8)
    return whole.random_(generator=torch.Generator().manual_seed(nbytes))[shift:]


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_read_is_what_was_written(
    queue: AioQueue, tmp_path: Path, parts: int, access: str
) -> None:
    file = _file(tmp_path, 2 * MIB, parts=parts, direct=ACCESS[access])
    for nbytes in (0, 1, PAGE_BYTES, 8 * PAGE_BYTES - 1, 8 * PAGE_BYTES + 1, MIB + 12345):
        for shift in (0, 1, 64):
            source, target = _random(nbytes, shift=shift), _random(nbytes, shift=64 - shift)
            queue.write(file, source, 3 * PAGE_BYTES).wait()
            ticket = queue.read(file, target, 3 * PAGE_BYTES)
            ticket.wait()
            assert ticket.done()
            assert torch.equal(source, target), (nbytes, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool])
def test_every_dtype_moves_bitwise(queue: AioQueue, tmp_path: Path, dtype: torch.dtype) -> None:
    file = _file(tmp_path, MIB)
    source = torch.arange(10_000).to(dtype)
    target = torch.zeros_like(source)
    queue.write(file, source, 0).wait()
    queue.read(file, target, 0).wait()
    assert torch.equal(source, target)


def test_parts_of_a_row_are_read_and_written_alone(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 64 * PAGE_BYTES, parts=2)
    whole = _random(64 * PAGE_BYTES, shift=0)
    starts = range(0, whole.numel(), 4 * PAGE_BYTES)
    for ticket in [queue.write(file, whole[s : s + 4 * PAGE_BYTES], s) for s in starts]:
        ticket.wait()
    found = torch.zeros_like(whole)
    for ticket in [queue.read(file, found[s : s + 4 * PAGE_BYTES], s) for s in reversed(starts)]:
        ticket.wait()
    assert torch.equal(found, whole)


def test_a_write_is_padded_with_zeros_to_a_page(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 3 * PAGE_BYTES)
    queue.write(file, torch.ones(3 * PAGE_BYTES, dtype=torch.uint8), 0).wait()
    queue.write(file, torch.ones(1, dtype=torch.uint8), PAGE_BYTES).wait()
    found = torch.empty(3 * PAGE_BYTES, dtype=torch.uint8)
    queue.read(file, found, 0).wait()
    ones = found.view(3, PAGE_BYTES).sum(1)
    assert ones.tolist() == [PAGE_BYTES, 1, PAGE_BYTES]


def test_files_have_no_names_and_their_space_is_reserved(tmp_path: Path) -> None:
    file = _file(tmp_path, MIB + 1, parts=2)
    assert list(tmp_path.iterdir()) == []
    held = [os.fstat(fd) for fd in file._fds]
    assert sum(each.st_size for each in held) == MIB + PAGE_BYTES
    assert sum(each.st_blocks * 512 for each in held) >= MIB + PAGE_BYTES
    file.grow(2 * MIB)
    assert sum(os.fstat(fd).st_size for fd in file._fds) == 2 * MIB
    assert file.nbytes == 2 * MIB


def test_growing_keeps_what_is_there(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, MIB, parts=3)
    source = _random(MIB, shift=0)
    queue.write(file, source, 0).wait()
    file.grow(3 * MIB)
    queue.write(file, torch.zeros(2 * MIB, dtype=torch.uint8), MIB).wait()
    found = torch.empty_like(source)
    queue.read(file, found, 0).wait()
    assert torch.equal(found, source)


def test_direct_io_passes_by_the_page_cache(queue: AioQueue, tmp_path: Path) -> None:
    direct, buffered = _file(tmp_path, MIB), _file(tmp_path, MIB, direct=False)
    if not direct.direct or os.statvfs(tmp_path).f_fsid == 0:
        pytest.skip("needs a disk with O_DIRECT under the temporary directory")
    for file, pages in ((direct, 0), (buffered, MIB // mmap.PAGESIZE)):
        queue.write(file, _random(MIB, shift=0), 0).wait()
        assert _cached_pages(file._fds[0]) == pages
    assert not buffered.direct


def _cached_pages(fd: int) -> int:
    with mmap.mmap(fd, MIB) as seen:
        start = ctypes.c_char.from_buffer(seen)
        flags = (ctypes.c_ubyte * (MIB // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(MIB), flags) == 0
        del start
        return sum(flag & 1 for flag in flags)


def test_aligned_memory_starts_on_a_page() -> None:
    for numel, dtype in ((0, torch.float32), (5, torch.bfloat16), (3 * MIB, torch.float32)):
        tensor = aligned_empty(numel, dtype)
        assert tensor.shape == (numel,)
        assert tensor.dtype == dtype
        assert numel == 0 or tensor.data_ptr() % PAGE_BYTES == 0
        tensor.fill_(1)
        assert int(tensor.sum()) == numel


# ---- failures ----


def _replace(file: AioFile, path: str) -> None:
    """Put another file behind `file`, as a disk that fails would be."""
    fd = os.open(path, os.O_RDWR)
    os.dup2(fd, file._fds[0], inheritable=False)
    os.close(fd)


def test_a_full_disk_is_an_error_on_every_wait(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, MIB, direct=False)
    _replace(file, "/dev/full")
    ticket = queue.write(file, torch.zeros(MIB, dtype=torch.uint8), 0)
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"write of 32768 bytes at \d+ failed: No space"
        ) as caught:
            ticket.wait()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "part0")
    assert ticket.done()


def test_an_io_error_is_an_error_and_the_queue_goes_on(queue: AioQueue, tmp_path: Path) -> None:
    file, good = _file(tmp_path, MIB, direct=False), _file(tmp_path, MIB)
    _replace(file, "/proc/self/mem")  # page 0 is never mapped
    target = torch.ones(MIB, dtype=torch.uint8)
    ticket = queue.read(file, target[:PAGE_BYTES], 0)
    with pytest.raises(OSError, match=r"read of 4096 bytes at 0 failed: Input/output") as caught:
        ticket.wait()
    assert caught.value.errno == errno.EIO
    queue.write(good, target, 0).wait()


@pytest.mark.parametrize("access", ACCESS)
def test_a_truncated_file_is_an_error(queue: AioQueue, tmp_path: Path, access: str) -> None:
    file = _file(tmp_path, 16 * PAGE_BYTES, parts=2, direct=ACCESS[access])
    os.truncate(file._fds[1], PAGE_BYTES + 7)
    target = torch.empty(16 * PAGE_BYTES, dtype=torch.uint8)
    with pytest.raises(OSError, match=r"only \d+ bytes moved; was the file truncated") as caught:
        queue.read(file, target, 0).wait()
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / "part1")
    os.truncate(file._fds[1], 0)
    with pytest.raises(OSError, match=r"failed: Input/output error, or the file ends before it"):
        queue.read(file, target, 0).wait()
    queue.read(file, target[: 8 * PAGE_BYTES], 0).wait()


def test_one_bad_block_of_many_is_an_error(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 4 * MIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = _random(4 * MIB, shift=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, hard))
    try:
        first, second = queue.write(file, source, 0), queue.write(file, source[:MIB], 0)
        with pytest.raises(OSError, match="File too large") as caught:
            first.wait()
        second.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()
    open_before = _num_fds()
    with pytest.raises(FileNotFoundError):
        _file(tmp_path / "missing", MIB)
    (tmp_path / "part1").write_text("another run's")
    with pytest.raises(FileExistsError) as caught:
        _file(tmp_path, MIB, parts=2)
    assert str(caught.value.filename) == str(tmp_path / "part1")
    (tmp_path / "part1").unlink()
    with pytest.raises(OSError, match=r"cannot reserve \d+ bytes: File too large"):
        _file(tmp_path, 1 << 61)
    assert list(tmp_path.iterdir()) == []
    # Fewer: what earlier tests of this process left to the garbage collector.
    assert _num_fds() <= open_before


def _num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


MOUNTS = """
import errno, os, sys
from pathlib import Path
from hf_speed.ops.aio import AioFile
small, plain = Path(sys.argv[1]), Path(sys.argv[2])

def refused(code, words, make):
    try:
        make()
    except OSError as error:
        assert error.errno == code and words in str(error), error
    else:
        raise AssertionError(words)

refused(errno.ENOSPC, "cannot reserve 2097152 bytes: No space left on device",
        lambda: AioFile([small / "x"], nbytes=2 << 20))
file = AioFile([small / "x"], nbytes=256 << 10)
refused(errno.ENOSPC, "cannot reserve", lambda: file.grow(2 << 20))
assert file.nbytes == 256 << 10
rest = AioFile([small / "y"], nbytes=512 << 10)        # what the failed grow took is back
file.close(), rest.close()
AioFile([small / "z"], nbytes=768 << 10).close()

assert AioFile([plain / "a"], nbytes=4096).direct is False
refused(errno.EINVAL, "the file system refuses O_DIRECT; use another one, or direct=None",
        lambda: AioFile([plain / "b"], nbytes=4096, direct=True))
assert not AioFile([small / "c", plain / "c"], nbytes=4096).direct
assert not list(small.iterdir()) and not list(plain.iterdir())
"""


def test_a_small_disk_and_one_without_direct_io(tmp_path: Path) -> None:
    small, plain = tmp_path / "small", tmp_path / "plain"
    small.mkdir()
    plain.mkdir()
    unshare = shutil.which("unshare")
    private = [unshare or "unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mounts = f"mount -t tmpfs -o size=1m none {small} && mount -t ramfs none {plain}"
    if unshare is None or subprocess.run([*private, "sh", "-c", mounts], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs and a ramfs in a namespace of its own")
    script = f'{mounts} && exec "$@"'
    done = subprocess.run(
        [*private, "sh", "-c", script, "sh", sys.executable, "-c", MOUNTS, str(small), str(plain)],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


SECCOMP = """
import ctypes, logging, struct, sys, tempfile, torch
from pathlib import Path
from hf_speed.ops.aio import AioFile, AioQueue
libc = ctypes.CDLL(None, use_errno=True)
EPERM, IO_URING_SETUP = 1, 425
rules = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, IO_URING_SETUP,
                    0x06, 0, 0, 0x00050000 | EPERM, 0x06, 0, 0, 0x7FFF0000)
keep = ctypes.create_string_buffer(rules, len(rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(keep)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
try:
    AioQueue(backend="io_uring")
except OSError as error:
    print(error.errno, error)
queue = AioQueue(depth=3)
print(queue.backend)
file = AioFile([Path(sys.argv[1]) / "x"], nbytes=1 << 20)
source, target = torch.arange(1 << 18, dtype=torch.int32), torch.zeros(1 << 18, dtype=torch.int32)
queue.write(file, source, 0).wait(), queue.read(file, target, 0).wait()
print(torch.equal(source, target))
queue.write(file, source, 0)        # in flight when the process ends
"""


def test_where_io_uring_is_forbidden_threads_do_the_work_and_say_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECCOMP, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, logged, backend, equal = done.stdout.splitlines()
    assert refused.startswith(
        "1 [Errno 1] cannot start an AioQueue with backend='io_uring': Operation not permitted."
    )
    assert "uses 3 threads, since io_uring is not to be had here: Operation not" in logged
    assert (backend, equal) == ("threads", "True")


# ---- ends ----


def test_a_forgotten_tensor_lives_until_its_bytes_are_written(
    queue: AioQueue, tmp_path: Path
) -> None:
    file = _file(tmp_path, 8 * MIB)
    for index in range(8):
        queue.write(file, torch.full((MIB,), index, dtype=torch.uint8), index * MIB)
    gc.collect()
    clutter = [torch.full((MIB,), 255, dtype=torch.uint8) for _ in range(8)]
    queue.close()
    with contextlib.closing(AioQueue()) as other:
        found = torch.empty(8 * MIB, dtype=torch.uint8)
        other.read(file, found, 0).wait()
    assert torch.equal(
        found.view(8, MIB), torch.arange(8, dtype=torch.uint8)[:, None].expand(8, MIB)
    )
    assert len(clutter) == 8


def test_tickets_outlive_the_queue_and_the_file(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 4 * MIB)
    tickets = [queue.write(file, _random(4 * MIB, shift=1), 0) for _ in range(4)]
    file.close()
    file.close()
    queue.close()
    queue.close()
    for ticket in tickets:
        assert ticket.done()
        ticket.wait()


def test_a_dropped_queue_ends_its_threads(tmp_path: Path) -> None:
    def threads() -> int:
        names = [p.read_text() for p in Path("/proc/self/task").glob("*/comm")]
        return names.count("hf_speed_aio\n")

    before = threads()
    dropped = AioQueue(backend="threads", depth=3)
    assert threads() == before + 3
    dropped.write(_file(tmp_path, MIB), torch.zeros(MIB, dtype=torch.uint8), 0)
    del dropped
    gc.collect()
    assert threads() == before


def test_a_queue_serves_several_threads(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 4 * MIB, parts=2)
    failures: list[str] = []

    def work(index: int) -> None:
        for round_ in range(8):
            source = torch.full((MIB // 4,), index * 8 + round_, dtype=torch.int32)
            target = torch.empty_like(source)
            queue.write(file, source, index * MIB).wait()
            queue.read(file, target, index * MIB).wait()
            if not torch.equal(source, target):
                failures.append(f"{index} {round_}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_a_forked_child_is_told_and_the_parent_goes_on(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, 16 * MIB)
    source = _random(16 * MIB, shift=1)
    ticket = queue.write(file, source, 0)
    said, say = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
        child = os.fork()
    if child == 0:
        try:
            os.write(say, _errors_in_child(queue, file, source, ticket).encode())
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(said) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert text.count("was made before a fork, and its threads live in the parent process") == 2
    assert "was submitted before a fork: only the parent process can wait" in text or "done" in text
    assert "own queue works" in text
    ticket.wait()
    found = torch.empty_like(source)
    queue.read(file, found, 0).wait()
    assert torch.equal(found, source)


def _errors_in_child(queue: AioQueue, file: AioFile, source: Tensor, ticket: object) -> str:
    said = []
    for call in (
        lambda: queue.write(file, source, 0),
        lambda: queue.read(file, source, 0),
        ticket.wait,  # type: ignore[attr-defined]
    ):
        try:
            call()
            said.append("done")
        except RuntimeError as error:
            said.append(str(error))
    queue.close()
    with contextlib.closing(AioQueue(depth=2)) as own:
        own.read(file, torch.empty(PAGE_BYTES, dtype=torch.uint8), 0).wait()
        said.append("own queue works")
    return "\n".join(said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "libaio"}, "backend='libaio' is none of auto, io_uring, threads"),
        ({"depth": 0}, "depth=0 is not between 1 and 1024"),
        ({"block_bytes": 5000}, "block_bytes=5000 is not a multiple of 4096"),
    ],
)
def test_a_queue_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AioQueue(**settings)  # type: ignore[arg-type]


def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least one path"):
        AioFile([], nbytes=1)
    with pytest.raises(ValueError, match="stripe_bytes=100 is not a multiple of 4096"):
        AioFile([tmp_path / "x"], nbytes=1, stripe_bytes=100)
    file = _file(tmp_path, MIB)
    with pytest.raises(ValueError, match=r"cannot shrink .* from 1048576 to 1 bytes"):
        file.grow(1)
    file.close()
    with pytest.raises(ValueError, match=r"cannot grow .*: it is closed"):
        file.grow(2 * MIB)


def test_a_request_that_does_not_fit_is_refused(queue: AioQueue, tmp_path: Path) -> None:
    file = _file(tmp_path, MIB)
    page = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot read at 100: not a multiple of 4096"):
        queue.read(file, page, 100)
    with pytest.raises(ValueError, match=r"cannot write bytes 1048576 to 1052672 of .*: it holds"):
        queue.write(file, page, MIB)
    with pytest.raises(ValueError, match=r"cannot write bytes -4096 to 0 of"):
        queue.write(file, page, -PAGE_BYTES)
    with pytest.raises(ValueError, match=r"strides \(2,\) on cpu: file I/O takes contiguous CPU"):
        queue.write(file, page[::2], 0)
    with pytest.raises(ValueError, match=r"on meta: file I/O takes contiguous CPU tensors"):
        queue.read(file, page.to("meta"), 0)
    file.close()
    with pytest.raises(ValueError, match=r"cannot write .*: it is closed"):
        queue.write(file, page, 0)
    queue.close()
    with pytest.raises(ValueError, match="cannot read: the queue is closed"):
        queue.read(_file(tmp_path, MIB), page, 0)
