"""Remote shards: each is fetched once per node, verified, and kept in a folder of bounded size.

Any store that fsspec knows: https, s3, gs, hf, ... A shard is kept as `KEY-a.tar`. While it is
fetched it is `KEY-a.tar.part`, and its fetcher holds a lock on `KEY-a.tar.lock`; the kernel frees
the lock however the fetcher ends, and the next one goes on where the `.part` stops. Whoever has a
shard open shares a lock on it, and eviction takes only what it can lock alone. Nothing here imports
torch: worker processes start fast.
"""

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, TypeVar

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from maepretrain.data.faults import ShardError

DEFAULT_LIMIT = 100 * 10**9
BLOCK = 8 << 20
BACKOFF = 1.0  # seconds before the second try; doubled up to BACKOFF_MOST
BACKOFF_MOST = 30.0
PATIENCE = 10.0  # seconds to wait until somebody closes a shard that is in the way

_T = TypeVar("_T")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_MADE_HERE = re.compile(r"[0-9a-f]{32}-.*(?<!\.lock)")
_PASSING = {408, 425, 429}  # and all of 5xx: another try may help
# A global generator would change what a seeded run draws; a copied one would repeat in workers.
_jitter = SystemRandom()

# Filesystems live on until the process ends. Were one that a forked worker inherited collected
# there, its finalizer would wait for a loop that no thread runs, and take the parent's connections
# out of the epoll that both share.
_filesystems: dict[int, Any] = {}

# Open .lock and .part files. A worker forked during a download must not keep its lock.
_unshared: set[int] = set()


def _after_fork() -> None:
    while _unshared:
        os.close(_unshared.pop())


os.register_at_fork(after_in_child=_after_fork)


class _Missing(ShardError):
    """The store has no such file."""


class _Retry(Exception):
    """A failure that may pass."""


class _StartOver(Exception):
    """What is already there is of no use."""


def is_remote(url: str) -> bool:
    """Whether `url` is fetched: `https://h/a.tar` yes, `/a.tar` and `file:///a.tar` no."""
    return bool(re.match(r"(?!file:)[a-z][a-z0-9+.-]*://", url, re.IGNORECASE))


def basename(url: str) -> str:
    """The last part of a URL's path, without its query."""
    return _without_secrets(url).rstrip("/").rsplit("/", 1)[-1]


def _without_secrets(url: str) -> str:
    return re.sub(r"://[^/]*@", "://", url.partition("?")[0])


@dataclass(frozen=True)
class _Answer:
    """What a store says of a file, and its bytes from `start` on.

    `start` is 0 where the store cannot start later; `tag` differs between versions of the file, and
    is empty where the store does not say.
    """

    start: int
    total: int | None
    tag: str
    blocks: Iterator[bytes]


@dataclass(frozen=True)
class _Wanted:
    """A shard, what its index says of it, and where it is kept."""

    url: str
    size: int | None
    sha256: str | None
    path: Path

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def stale(self, found: str) -> ShardError:
        return ShardError(
            f"{_without_secrets(self.url)} {found}: its index is stale; "
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
        timeout: seconds without any byte from a store before a try counts as failed.
        attempts: tries in a row that may bring nothing before a shard is given up.
        storage_options: arguments of fsspec's filesystem, such as `endpoint_url`.
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
        self.timeout = timeout
        self.attempts = attempts
        self.storage_options = storage_options

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
        wanted = _Wanted(url, size, sha256, self.path(url, size, sha256))
        try:
            file = _pinned(wanted.path)
            if file is not None:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(wanted.beside(".lock")) as lock:
                assert lock is not None, "it was waited for"
                try:
                    file = _pinned(wanted.path)  # whoever held the lock has fetched it
                    return self._download(wanted, lock) if file is None else file
                finally:
                    if not wanted.beside(".part").exists():
                        wanted.beside(".lock").unlink(missing_ok=True)
        except OSError as error:
            raise ShardError(
                f"cannot keep {_without_secrets(url)} in {self.folder}: {error.strerror or error} "
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
        with _alone(self.folder / "cache.lock"):  # who adds up the folder sees it once
            old.replace(new)

    def small(self, url: str) -> bytes | None:
        """A small remote file, such as a shard's index, never cached; None where there is none.

        Forbidden counts as none: S3 says that of a missing file to whoever may not list a bucket.

        Raises:
            ShardError: any other failure, after `attempts` tries.
        """

        def ask() -> bytes:
            with self._ask(url, 0) as answer:
                return b"".join(answer.blocks)

        try:
            return self._persist(url, ask)
        except _Missing:
            return None

    def expand(self, pattern: str) -> list[str]:
        """URLs that match a pattern with `*`, `?` or `[...]`, sorted, without `.idx` files.

        A pattern without any is returned as it is. An empty list where nothing matches.

        Raises:
            ShardError: a store that cannot be listed (http) or does not answer.
        """
        path = pattern.partition("://")[2].partition("/")[2]  # a host may hold brackets
        if _is_http(pattern) and "=" in path:
            path = path.partition("?")[0]  # the question mark opens a query
        if not re.search(r"[*?\[]", path):
            return [pattern]
        if _is_http(pattern):
            raise ShardError(
                f"{_without_secrets(pattern)}: http(s) cannot be listed: name shards with braces"
            )

        def ask() -> list[str]:
            with self._asking(pattern):
                fs, path = self._filesystem(pattern)
                return self._call(fs, "glob", path)

        protocol = pattern.partition("://")[0]
        found = sorted(self._persist(pattern, ask))
        return [f"{protocol}://{path.lstrip('/')}" for path in found if not path.endswith(".idx")]

    def _download(self, wanted: _Wanted, lock: int) -> int:
        path = wanted.beside(".part")
        part = _open_unshared(path, os.O_APPEND)
        try:
            if wanted.sha256 is None and not _tag(lock):
                os.ftruncate(part, 0)  # nothing would tell whether the rest is of the same version
            for _ in range(2):  # the first try may go on with bytes of another version
                self._fill(wanted, part, lock)
                if wanted.sha256 is None or _digest(path) == wanted.sha256:
                    break
                os.ftruncate(part, 0)
            else:
                raise wanted.stale(f"does not have the checksum {wanted.sha256}")
            os.fsync(part)
            file = os.open(path, os.O_RDONLY)
            flock(file, LOCK_SH)  # before others see it: it cannot be evicted first
            self.rename(path, wanted.path)
            return file
        finally:
            if not os.fstat(part).st_size:
                path.unlink(missing_ok=True)
            _close_unshared(part)

    def _fill(self, wanted: _Wanted, part: int, lock: int) -> None:
        """All bytes of the shard, through lost connections and a full disk."""
        while True:
            try:
                self._persist(
                    wanted.url,
                    partial(self._receive, wanted, part, lock),
                    lambda: os.fstat(part).st_size,
                )
                return
            except OSError as error:
                if error.errno in _DISK_FULL:
                    with _alone(self.folder / "cache.lock"):
                        if self._evict(wanted, at_least=BLOCK) < BLOCK:
                            continue
                os.ftruncate(part, 0)
                raise

    def _receive(self, wanted: _Wanted, part: int, lock: int) -> None:
        """One try: append to the part what is missing."""
        try:
            with self._ask(wanted.url, os.fstat(part).st_size) as answer:
                self._append(wanted, answer, part, lock)
        except _StartOver:
            os.ftruncate(part, 0)
            self._receive(wanted, part, lock)
        except ShardError:
            os.ftruncate(part, 0)
            raise

    def _append(self, wanted: _Wanted, answer: _Answer, part: int, lock: int) -> None:
        if wanted.size is not None and answer.total not in (None, wanted.size):
            raise wanted.stale(f"has {answer.total:,} bytes, not {wanted.size:,}")
        if wanted.sha256 is None and answer.start and answer.tag != _tag(lock):
            raise _StartOver
        os.ftruncate(part, answer.start)
        total = answer.total if wanted.size is None else wanted.size
        end = answer.start
        self._reserve(wanted, lock, total or 0, answer.tag)
        for block in answer.blocks:
            end += len(block)
            if total is None:
                self._reserve(wanted, lock, end, answer.tag)
            elif end > total:
                raise _StartOver if answer.start else wanted.stale(f"has more than {total:,} bytes")
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(part, rest) :]
        if total is not None and end < total:
            raise _Retry(f"it ended after {end:,} of {total:,} bytes")

    def _reserve(self, wanted: _Wanted, lock: int, size: int, tag: str) -> None:
        """Make room for `size` bytes of this shard, and tell the others by its lock file."""
        shard = _without_secrets(wanted.url)
        if size > self.limit:
            raise ShardError(
                f"{shard} ({size:,} bytes) is larger than the cache in {self.folder}, "
                f"{self.limit:,} bytes; raise --data.cache_gb"
            )
        gives_up = time.monotonic() + PATIENCE
        while True:
            with _alone(self.folder / "cache.lock"):
                if self._evict(wanted, size) <= 0:
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"{size} {tag}".encode(), 0)
                    return
            if time.monotonic() > gives_up:
                raise ShardError(
                    f"no room for {shard} ({size:,} bytes): the cache in {self.folder} may hold "
                    f"{self.limit:,} bytes and all of it is in use; raise --data.cache_gb"
                )
            time.sleep(0.1)

    def _evict(self, wanted: _Wanted, size: int = 0, at_least: int = 0) -> int:
        """Delete what was used longest ago until `size` bytes more fit; the bytes still missing.

        With the lock of the cache held. `at_least` bytes are deleted also where the limit is kept.
        """
        kept: list[tuple[int, int, Path]] = []
        for entry in os.scandir(self.folder):
            # Never what others put into the folder.
            if _MADE_HERE.fullmatch(entry.name) and entry.name != wanted.path.name + ".part":
                with suppress(FileNotFoundError):  # its fetcher has just renamed or deleted it
                    stat, path = entry.stat(), Path(entry.path)
                    kept.append((stat.st_mtime_ns, max(stat.st_size, _reserved(path)), path))
        missing = max(at_least, sum(size for _, size, _ in kept) + size - self.limit)
        for _, freed, path in sorted(kept):
            if missing <= 0:
                break
            if _delete(path):
                missing -= freed
        return missing

    def _persist(
        self, url: str, work: Callable[[], _T], progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """The result of `work`, tried again until `attempts` tries in a row made no progress."""
        failures, furthest = 0, progress()
        while True:
            try:
                return work()
            except _Retry as error:
                # Starting over is no progress until it comes further than before.
                failures = 0 if progress() > furthest else failures + 1
                furthest = max(furthest, progress())
                if failures >= self.attempts:
                    raise ShardError(
                        f"cannot fetch {_without_secrets(url)}: {error} ({failures} tries)"
                    ) from None
                wait = min(BACKOFF * 2 ** max(0, failures - 1), BACKOFF_MOST)
                time.sleep(wait * _jitter.uniform(0.5, 1))

    def _ask(self, url: str, start: int) -> AbstractContextManager[_Answer]:
        with self._asking(url):
            fs, path = self._filesystem(url)
        return self._http(fs, url, start) if _is_http(url) else self._ranges(fs, path, url, start)

    @contextmanager
    def _asking(self, url: str) -> Iterator[None]:
        """Errors of a store become `_Retry`, or a ShardError where another try cannot help."""
        try:
            yield
        except (_Retry, ShardError):
            raise
        except FileNotFoundError:
            raise _Missing(f"cannot fetch {_without_secrets(url)}: there is no such file") from None
        except ImportError as error:
            extra = _EXTRAS.get(url.partition("://")[0])
            hint = f"pip install 'maepretrain[{extra}]'" if extra else str(error)
            raise ShardError(f"cannot fetch {_without_secrets(url)}: {hint}") from None
        except PermissionError as error:
            raise _Missing(f"cannot fetch {_without_secrets(url)}: {_reason(error)}") from None
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ShardError(f"cannot fetch {_without_secrets(url)}: {_reason(error)}") from None
        except TimeoutError:
            raise _Retry(f"nothing came for {self.timeout:g} seconds") from None
        except Exception as error:
            raise _Retry(_reason(error)) from None

    def _filesystem(self, url: str) -> tuple[Any, str]:
        options = dict(self.storage_options or {})
        if _is_http(url):  # a cluster's way out is often a proxy that only $https_proxy names
            options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
        fs, path = url_to_fs(url, **options)
        _filesystems[id(fs)] = fs
        fs.invalidate_cache()  # listings that may be days old
        return fs, path

    def _call(self, fs: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if not fs.async_impl:
            return getattr(fs, name)(*args, **kwargs)
        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=self.timeout, **kwargs)

    @contextmanager
    def _ranges(self, fs: Any, path: str, url: str, start: int) -> Iterator[_Answer]:
        """A file of a store that reads any range of it."""
        with self._asking(url):
            about = self._call(fs, "info", path)
            total = int(about["size"])
        start = start if start <= total else 0

        def blocks() -> Iterator[bytes]:
            for at in range(start, total, BLOCK):
                end = min(at + BLOCK, total)
                with self._asking(url):
                    block = self._call(fs, "cat_file", path, start=at, end=end)
                if len(block) != end - at:
                    raise _Retry(f"{len(block):,} bytes came for {at:,} to {end:,}")
                yield block

        yield _Answer(start, total, hashlib.sha256(str(about).encode()).hexdigest(), blocks())

    @contextmanager
    def _http(self, fs: Any, url: str, start: int) -> Iterator[_Answer]:
        """A file of a web server, in one request.

        Not through fsspec's own reads: they take what a server that ignores ranges sends for the
        range, and end a download after five minutes.
        """
        from aiohttp import ClientTimeout

        async def ask() -> Any:
            session = await fs.set_session()
            # A compressed body has neither the length nor the ranges of the file.
            headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            if start:
                headers["Range"] = f"bytes={start}-"
            timeout = ClientTimeout(sock_connect=self.timeout, sock_read=self.timeout)
            options = {**fs.kwargs, "headers": headers, "timeout": timeout}
            return await session.get(fs.encode_url(url), **options)

        async def some() -> bytes:
            parts, size, ends = [], 0, time.monotonic() + 1
            while size < BLOCK and time.monotonic() < ends:
                try:
                    part = await response.content.readany()
                except Exception:
                    if parts:  # keep them; the next call meets the failure again
                        break
                    raise
                if not part:
                    break
                parts.append(part)
                size += len(part)
            return b"".join(parts)

        def blocks() -> Iterator[bytes]:
            while True:
                with self._asking(url):
                    # aiohttp keeps the time; this one guards against its faults.
                    block = sync(fs.loop, some, timeout=2 * self.timeout + 1)
                if not block:
                    return
                yield block

        with self._asking(url):
            response: Any = sync(fs.loop, ask, timeout=self.timeout)
        try:
            at, total = _judge(response, url, start)
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
            whole = response.status == 416
            yield _Answer(at, total, tag, iter(()) if whole else blocks())
        finally:
            fs.loop.call_soon_threadsafe(response.close)


def _judge(response: Any, url: str, start: int) -> tuple[int, int | None]:
    """Where the bytes of a response start, and the size of the whole file."""
    status, spans = response.status, response.headers.get("Content-Range", "")
    said = " ".join(filter(None, (str(status), response.reason, spans)))
    encoding = response.headers.get("Content-Encoding", "identity")
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", spans)
    total = int(span[2]) if span and span[2] else None
    if status in (200, 206) and encoding != "identity":
        said = f"the server compresses it ({encoding})"
    elif status == 200:
        return 0, response.content_length
    elif (status == 206 and span and span[1] == str(start)) or (status == 416 and total == start):
        return start, total
    elif status in (206, 416):
        raise _StartOver if start else _Retry(said)
    elif status in _PASSING or status >= 500:
        raise _Retry(said)
    kind = _Missing if status in (403, 404, 410) else ShardError
    raise kind(f"cannot fetch {_without_secrets(url)}: {said}")


def _default_folder() -> Path:
    if named := os.environ.get("MAEPRETRAIN_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "maepretrain" / "shards"


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _reason(error: Exception) -> str:
    """One line without the secrets of the URLs in it (a redirect's too)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\w+://\S+", lambda url: _without_secrets(url[0]), text)[:300]


def _free(folder: Path) -> int:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_unshared(path: Path, flags: int = 0) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    _unshared.add(file)
    return file


def _close_unshared(file: int) -> None:
    _unshared.discard(file)
    os.close(file)


@contextmanager
def _alone(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock file; None where another process or thread holds it and `wait` is off."""
    while True:
        file = _open_unshared(path)
        try:
            try:
                flock(file, LOCK_EX | (0 if wait else LOCK_NB))
            except BlockingIOError:
                yield None
                return
            if os.fstat(file).st_nlink:  # else whoever held it has deleted it
                yield file
                return
        finally:
            flock(file, LOCK_UN)  # closing would not free it if a fork has just copied it
            _close_unshared(file)


def _pinned(path: Path) -> int | None:
    """A finished shard, opened, marked as used and safe from eviction; None where there is none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        flock(file, LOCK_SH)
        if os.fstat(file).st_nlink:  # else it was evicted since it was opened
            with suppress(PermissionError):  # another user fetched it
                os.utime(file)
            return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _delete(path: Path) -> bool:
    """Delete a shard that nobody has open, or a `.part` that nobody fetches."""
    try:
        if path.suffix == ".part":
            lock = path.with_suffix(".lock")
            with _alone(lock, wait=False) as held:
                if held is None:
                    return False
                try:
                    path.unlink()
                finally:
                    lock.unlink()
                return True
        file = os.open(path, os.O_RDWR)
        try:
            flock(file, LOCK_EX | LOCK_NB)
            path.unlink()
        finally:
            os.close(file)
        return True
    except OSError:
        return False


def _reserved(path: Path) -> int:
    """Bytes that a fetcher has announced for its `.part`."""
    if path.suffix == ".part":
        with suppress(OSError, ValueError):
            return int(path.with_suffix(".lock").read_bytes().partition(b" ")[0])
    return 0


def _tag(lock: int) -> str:
    """Which version of the shard the `.part` beside this lock is of."""
    return os.pread(lock, 1 << 16, 0).decode().partition(" ")[2]


class ReadAhead:
    """Fetches the shards that come next, in background threads that end with the process.

    Errors are dropped: whoever needs the shard meets them again.

    Args:
        cache: where the shards go.
        threads: how many are fetched at once.
    """

    def __init__(self, cache: ShardCache, threads: int = 2) -> None:
        self.cache = cache
        self.threads = threads
        self._start_anew()

    def want(self, shards: Sequence[tuple[str, int | None, str | None]]) -> None:
        """Fetch these (url, size, sha256), nearest first, in place of what was wanted before.

        What is there, or is being fetched, costs nothing, and is marked as used.
        """
        if self._process != os.getpid():  # threads and held locks do not survive a fork
            self._start_anew()
        with self._changed:
            self._queue = deque(dict.fromkeys(shards))
            self._closed = False
            for _ in range(self.threads - self._running):
                self._running += 1
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()
            self._changed.notify_all()

    def close(self) -> None:
        """Want nothing more; what is being fetched goes on to its end. `want` begins anew."""
        if self._process == os.getpid():
            with self._changed:
                self._queue.clear()
                self._closed = True
                self._changed.notify_all()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[tuple[str, int | None, str | None]] = deque()
        self._fetching: set[tuple[str, int | None, str | None]] = set()
        self._running = 0
        self._closed = False

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    self._running -= 1
                    return
                shard = self._queue.popleft()
                if shard in self._fetching:
                    continue
                self._fetching.add(shard)
            with suppress(Exception):
                self.cache.fetch(*shard)
            with self._changed:
                self._fetching.discard(shard)

    def __reduce__(self) -> tuple[type["ReadAhead"], tuple[ShardCache, int]]:
        """Threads do not travel to another process."""
        return ReadAhead, (self.cache, self.threads)
