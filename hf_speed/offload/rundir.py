"""The directory that a run makes for itself on a disk, and what dead runs have left there.

    <path>/hf_speed-offload-<random>/lock       held with flock for as long as the process lives
    <path>/hf_speed-offload-<random>/<part>     unlinked as soon as it is open: no name, no rest

The kernel lets go of the lock with the process, however it ends. So whoever gets the lock of a
directory knows that its run is dead, and removes it; nothing of it is ever read.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path

from hf_speed.errors import OffloadError
from hf_speed.logs import get_logger

PREFIX = "hf_speed-offload-"
LOCK = "lock"
_ATTEMPTS = 16

_log = get_logger(__name__)


class RunDirectory:
    """A directory of this run alone, removed by `close`, at exit, or by the next run.

    Args:
        parent: an existing directory.

    Attributes:
        path: the directory.

    Raises:
        OffloadError: `parent` cannot be used.
    """

    def __init__(self, parent: Path) -> None:
        check_parent(parent)
        try:
            remove_dead(parent)
            self.path, lock = _claim(parent)
        except OSError as error:
            raise unusable(parent, error) from error
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove the directory. A second call does nothing."""
        self._finalizer()


def check_parent(parent: Path) -> None:
    """Raise OffloadError if `parent` is not a directory."""
    if not parent.exists():
        raise OffloadError(
            f"offload.paths names {parent}, which does not exist. Make the directory, or mount its "
            f"disk."
        )
    if not parent.is_dir():
        raise OffloadError(f"offload.paths names {parent}, which is not a directory. Name one.")


def unusable(path: Path, error: OSError) -> OffloadError:
    """What to tell where the system refuses to make something under `path`."""
    place = error.filename or path
    if error.errno == errno.EROFS:
        why = "its file system is mounted read-only. Name a directory that can be written"
    elif error.errno in (errno.EACCES, errno.EPERM):
        why = "this process may not write there. Change its permissions, or name another directory"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = f"it is full, {free_bytes(path)} bytes are free. Make room, or name another disk"
    elif error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        why = (
            "its file system has no file locks, which keep two runs apart. Name a directory on a "
            "local disk"
        )
    else:
        why = f"{error.strerror}. Name another directory"
    return OffloadError(f"offload.paths cannot use {place}: {why}.")


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write there."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def remove_dead(parent: Path) -> None:
    """Remove what runs that are no more have left in `parent`; leave the living alone."""
    with os.scandir(parent) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
        ]
    for directory in sorted(found):
        try:
            removed = _remove_if_dead(directory)
        except FileNotFoundError:
            continue  # another process was faster
        except OSError as error:  # another user's, or another process is at it
            _log.info("left %s as it is: %s", directory, error, extra={"all_ranks": True})
            continue
        if removed:
            _log.info(
                "removed %s, which a run that has ended left behind",
                directory,
                extra={"all_ranks": True},
            )


def _remove_if_dead(directory: Path) -> bool:
    try:
        lock = _open_lock(directory, os.O_RDWR)
    except FileNotFoundError:
        # Being made by someone, or being removed. Only an empty one goes: its maker tries again.
        directory.rmdir()
        return True
    if lock is None:
        return False
    try:
        _empty(directory)
    finally:
        os.close(lock)
    return True


def _open_lock(directory: Path, flags: int) -> int | None:
    """The lock file of a directory, locked; None if someone holds it."""
    lock = os.open(directory / LOCK, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _empty(directory: Path) -> None:
    """Remove a directory that this process has locked; the lock goes last, since it guards."""
    for path in directory.iterdir():
        if path.name != LOCK:
            path.unlink()
    (directory / LOCK).unlink(missing_ok=True)
    directory.rmdir()


def _claim(parent: Path) -> tuple[Path, int]:
    """Make a directory and take its lock, against others that sweep at this moment."""
    for _ in range(_ATTEMPTS):
        directory = parent / f"{PREFIX}{secrets.token_hex(8)}"
        directory.mkdir(mode=0o700)
        try:
            lock = _open_lock(directory, os.O_RDWR | os.O_CREAT)
            if lock is None:
                continue  # a sweep came between the open and the lock, and removes it now
            if _is_still(directory / LOCK, lock):
                return directory, lock
            os.close(lock)
        except FileNotFoundError:
            continue  # a sweep came before the lock was made
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                _empty(directory)
            raise
    raise OSError(errno.EBUSY, f"another run removed {_ATTEMPTS} new directories", str(parent))


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _remove(directory: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork that ends: the directory is its parent's
    try:
        _empty(directory)
    except OSError as error:
        _log.info("could not remove %s: %s", directory, error, extra={"all_ranks": True})
    os.close(lock)


def make_all(parents: Sequence[Path]) -> list[RunDirectory]:
    """One for each of `parents`; none where one cannot be made."""
    made: list[RunDirectory] = []
    try:
        made.extend(map(RunDirectory, parents))  # keeps those made before one fails
    except BaseException:
        for directory in made:
            directory.close()
        raise
    return made
