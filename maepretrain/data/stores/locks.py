"""Locks of the shard cache: readers share a shard's, whoever evicts or fetches it holds one alone.

`filelock`, which holds the other locks (`maepretrain.files.locked`), cannot take over here: it has
no shared lock on a file, a fetcher writes what it reserves into its lock file through the
descriptor that holds the lock, and waiting processes queue in the kernel, not by polling.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from pathlib import Path

# Open .lock and .part files. A worker forked during a download must not keep its lock.
_unshared: set[int] = set()


def _after_fork() -> None:
    while _unshared:
        os.close(_unshared.pop())


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def unshared(path: Path, flags: int = 0) -> Iterator[int]:
    """A file, made if need be, that a forked worker does not keep open."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    _unshared.add(file)
    try:
        yield file
    finally:
        _unshared.discard(file)
        os.close(file)


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold a lock file; BlockingIOError where somebody else holds it and `wait` is off."""
    while True:
        with unshared(path) as file:
            try:
                flock(file, LOCK_EX | (0 if wait else LOCK_NB))
                if os.fstat(file).st_nlink:  # else whoever held it has deleted it
                    yield file
                    return
            finally:
                flock(file, LOCK_UN)  # closing would not free it if a fork has just copied it


def share(file: int) -> None:
    """Keep a shard that is open from eviction until it is closed."""
    flock(file, LOCK_SH)


def pin(path: Path) -> int | None:
    """A finished shard, opened, marked as used and safe from eviction; None where there is none."""
    with suppress(FileNotFoundError), ExitStack() as stack:
        file = os.open(path, os.O_RDONLY)
        stack.callback(os.close, file)
        share(file)
        if os.fstat(file).st_nlink:  # else it was evicted since it was opened
            with suppress(PermissionError):  # another user fetched it
                os.utime(file)
            stack.pop_all()
            return file
    return None


def delete_unused(path: Path) -> bool:
    """Delete a shard that nobody has open, or a `.part` that nobody fetches."""
    with suppress(OSError):
        if path.suffix == ".part":
            lock = path.with_suffix(".lock")
            with exclusive(lock, wait=False):
                try:
                    path.unlink()
                finally:
                    lock.unlink()
        else:
            with path.open("r+b") as file:
                flock(file, LOCK_EX | LOCK_NB)
                path.unlink()
        return True
    return False


def reserved(path: Path) -> int:
    """Bytes that a fetcher has announced for its `.part`."""
    if path.suffix == ".part":
        with suppress(OSError, ValueError):
            return int(path.with_suffix(".lock").read_bytes().partition(b" ")[0])
    return 0
