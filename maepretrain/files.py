"""Writing files so that a full disk, a kill or a power cut leaves the old one or the new one, and
that no two processes write into one at the same time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from filelock import FileLock


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when it is whole: an error or a stop leaves the old one.

    An OSError names a file also where the system does not (a full disk).
    """
    # Not a process id: nodes that share the disk may write the same file.
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclude all other processes and threads that lock this path, by a file `NAME.lock` beside it.

    The lock ends with its process, however that ends, and its file with the lock. A disk without
    locks excludes nobody.
    """
    lock = FileLock(f"{path}.lock", poll_interval=0.01, fallback_to_soft=False)
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            # Whoever waits for a file that is gone by the time it gets the lock takes a new one.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
