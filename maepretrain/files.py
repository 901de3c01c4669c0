"""Writing files so that a full disk, a kill or a power cut leaves the old one or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when it is whole: an error or a stop leaves what was there.

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
