"""Remote shards: each is fetched once per node, verified, and kept in a folder of bounded size.

A shard is kept as `KEY-a.tar`. While it is fetched it is `KEY-a.tar.part`, and its fetcher holds a
lock on `KEY-a.tar.lock`; the kernel frees the lock however the fetcher ends, and the next one goes
on where the `.part` stops. Whoever has a shard open shares a lock on it, and eviction takes only
what it can lock alone. Nothing here imports torch: worker processes start fast.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maepretrain.data.errors import ShardError
from maepretrain.data.stores.locks import delete_unused, exclusive, pin, reserved, share, unshared
from maepretrain.data.stores.remote import (
    Answer,
    Remote,
    Retry,
    StartOver,
    basename,
    without_secrets,
)

DEFAULT_LIMIT = 100 * 10**9
ROOM = 8 << 20  # bytes to evict at once where the disk is full
PATIENCE = 10.0  # seconds to wait until somebody closes a shard that is in the way

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_MADE_HERE = re.compile(r"[0-9a-f]{32}-.*(?<!\.lock)")


@dataclass(frozen=True)
class _Part:
    """A shard that is being fetched: what its index says of it, its open `.part`, and its lock."""

    url: str
    size: int | None
    sha256: str | None
    path: Path
    file: int
    lock: int

    def length(self) -> int:
        return os.fstat(self.file).st_size

    def cut(self, length: int = 0) -> None:
        os.ftruncate(self.file, length)

    def tag(self) -> str:
        """Which version of the shard the bytes are of."""
        return os.pread(self.lock, 1 << 16, 0).decode().partition(" ")[2]

    def stale(self, found: str) -> ShardError:
        return ShardError(
            f"{without_secrets(self.url)} {found}: its index is stale; "
            "run `maepretrain shards index` on it"
        )


class ShardCache:
    """Remote shards in one folder per node, shared by all processes; pickles to workers.

    A shard whose size and checksum are not known is fetched once and never asked for again, even
    where the store has a newer one.

    Args:
        folder: on a disk of the node itself; by default $MAEPRETRAIN_CACHE, else
            maepretrain/shards in $XDG_CACHE_HOME or ~/.cache.
        limit: bytes that the folder may hold; the shards used longest ago make room.
        timeout, attempts, storage_options: how stores are asked, as for `Remote`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit: int = DEFAULT_LIMIT,
        timeout: float = 60.0,
        attempts: int = 5,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.folder = _default_folder() if folder is None else folder
        self.limit = limit
        self.remote = Remote(timeout, attempts, storage_options)

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> int:
        """File descriptor of the whole shard, fetched first if need be.

        The shard stays in the cache until the descriptor is closed (`os.close`), also by workers
        that were forked in between.

        Args:
            url: the shard.
            size: its bytes, where its index says so.
            sha256: its checksum in hexadecimal, where its index says so.

        Raises:
            ShardError: a shard that cannot be fetched, is not what its index says or has no room.
        """
        path = self.path(url, size, sha256)
        part, lock = (path.with_name(path.name + suffix) for suffix in (".part", ".lock"))
        try:
            if (file := pin(path)) is not None:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(lock) as held:
                try:
                    if (file := pin(path)) is not None:  # whoever held the lock has fetched it
                        return file
                    with unshared(part, os.O_APPEND) as file:
                        return self._download(_Part(url, size, sha256, part, file, held))
                finally:
                    if not part.exists():
                        lock.unlink(missing_ok=True)
        except OSError as error:
            raise ShardError(
                f"cannot keep {without_secrets(url)} in {self.folder}: {error.strerror or error} "
                f"({_free(self.folder):,} bytes are free there)"
            ) from error

    def path(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Where the shard lies once it was fetched; another version of it has another name."""
        key = hashlib.sha256(f"{url}|{sha256 or size}".encode()).hexdigest()[:32]
        # A shard that is itself named `a.part` must not pass for half a download.
        name = re.sub(r"[^A-Za-z0-9._-]|\.(?=(?:part|lock)$)", "_", basename(url)[-100:])
        return self.folder / f"{key}-{name}"

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Make sure that the shard is there; arguments and errors as for `open`."""
        os.close(self.open(url, size, sha256))
        return self.path(url, size, sha256)

    def rename(self, old: Path, new: Path) -> None:
        """Give a finished shard that is held open another name, as `path` makes it."""
        with exclusive(self.folder / "cache.lock"):  # who adds up the folder sees it once
            old.replace(new)

    def small(self, url: str) -> bytes | None:
        """A small remote file, never cached; see `Remote.small`."""
        return self.remote.small(url)

    def expand(self, pattern: str) -> list[str]:
        """URLs that match a pattern; see `Remote.expand`."""
        return self.remote.expand(pattern)

    def _download(self, part: _Part) -> int:
        """The finished shard, opened and safe from eviction."""
        try:
            if part.sha256 is None and not part.tag():
                part.cut()  # nothing would tell whether the rest is of the same version
            for _ in range(2):  # the first try may go on with bytes of another version
                self._fill(part)
                if part.sha256 is None or _digest(part.path) == part.sha256:
                    break
                part.cut()
            else:
                raise part.stale(f"does not have the checksum {part.sha256}")
            os.fsync(part.file)
            file = os.open(part.path, os.O_RDONLY)
            share(file)  # before others see it: it cannot be evicted first
            self.rename(part.path, part.path.with_suffix(""))
            return file
        finally:
            if not part.length():
                part.path.unlink(missing_ok=True)

    def _fill(self, part: _Part) -> None:
        """All bytes of the shard, through lost connections and a full disk."""
        while True:
            try:
                return self.remote.persist(part.url, partial(self._receive, part), part.length)
            except OSError as error:
                if error.errno in _DISK_FULL:
                    with exclusive(self.folder / "cache.lock"):
                        if self._evict(part, at_least=ROOM) < ROOM:
                            continue
                part.cut()
                raise

    def _receive(self, part: _Part) -> None:
        """One try: append to the part what is missing."""
        try:
            with self.remote.ask(part.url, part.length()) as answer:
                self._append(part, answer)
        except StartOver:
            part.cut()
            self._receive(part)
        except ShardError:
            part.cut()
            raise

    def _append(self, part: _Part, answer: Answer) -> None:
        if part.size is not None and answer.total not in (None, part.size):
            raise part.stale(f"has {answer.total:,} bytes, not {part.size:,}")
        if part.sha256 is None and answer.start and answer.tag != part.tag():
            raise StartOver
        part.cut(answer.start)
        total = answer.total if part.size is None else part.size
        end = answer.start
        self._reserve(part, total or 0, answer.tag)
        for block in answer.blocks:
            end += len(block)
            if total is None:
                self._reserve(part, end, answer.tag)
            elif end > total:
                raise StartOver if answer.start else part.stale(f"has more than {total:,} bytes")
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(part.file, rest) :]
        if total is not None and end < total:
            raise Retry(f"it ended after {end:,} of {total:,} bytes")

    def _reserve(self, part: _Part, size: int, tag: str) -> None:
        """Make room for `size` bytes of this shard, and tell the others by its lock file."""
        shard = f"{without_secrets(part.url)} ({size:,} bytes)"
        if size > self.limit:
            raise ShardError(
                f"{shard} is larger than the cache in {self.folder}, "
                f"{self.limit:,} bytes; raise --data.cache.gigabytes"
            )
        gives_up = time.monotonic() + PATIENCE
        while True:
            with exclusive(self.folder / "cache.lock"):
                if self._evict(part, size) <= 0:
                    os.ftruncate(part.lock, 0)
                    os.pwrite(part.lock, f"{size} {tag}".encode(), 0)
                    return
            if time.monotonic() > gives_up:
                raise ShardError(
                    f"no room for {shard}: the cache in {self.folder} may hold "
                    f"{self.limit:,} bytes and all of it is in use; raise --data.cache.gigabytes"
                )
            time.sleep(0.1)

    def _evict(self, part: _Part, size: int = 0, at_least: int = 0) -> int:
        """Delete what was used longest ago until `size` bytes more fit; the bytes still missing.

        With the lock of the cache held. `at_least` bytes are deleted also where the limit is kept.
        """
        kept: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            # Never what others put into the folder.
            if _MADE_HERE.fullmatch(path.name) and path != part.path:
                with suppress(FileNotFoundError):  # its fetcher has just renamed or deleted it
                    stat = path.stat()
                    kept.append((stat.st_mtime_ns, max(stat.st_size, reserved(path)), path))
        missing = max(at_least, sum(size for _, size, _ in kept) + size - self.limit)
        for _, freed, path in sorted(kept):
            if missing <= 0:
                break
            if delete_unused(path):
                missing -= freed
        return missing


def _default_folder() -> Path:
    if named := os.environ.get("MAEPRETRAIN_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "maepretrain" / "shards"


def _free(folder: Path) -> int:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
