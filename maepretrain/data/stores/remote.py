"""Stores of remote shards: https, s3, gs, hf, ..., all that fsspec knows.

What may pass is tried again, what cannot help is said at once, and no message holds the secrets of
an address. Nothing here imports torch: worker processes start fast.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from random import SystemRandom
from typing import Any, TypeVar

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from maepretrain.data.errors import ShardError

BLOCK = 8 << 20
BACKOFF = 1.0  # seconds before the second try; doubled up to BACKOFF_MOST
BACKOFF_MOST = 30.0

_T = TypeVar("_T")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_PASSING = {408, 425, 429}  # and all of 5xx: another try may help
_LASTING = (ImportError, ValueError, TypeError, NotImplementedError)
# A global generator would change what a seeded run draws; a copied one would repeat in workers.
_jitter = SystemRandom()

# Filesystems live on until the process ends. Were one that a forked worker inherited collected
# there, its finalizer would wait for a loop that no thread runs, and take the parent's connections
# out of the epoll that both share.
_filesystems: dict[int, Any] = {}


class Retry(Exception):
    """A failure that may pass."""


class StartOver(Exception):
    """The bytes that are already there are of no use."""


class _Missing(ShardError):
    """The store has no such file."""


def is_remote(url: str) -> bool:
    """True where `url` is fetched: `https://h/a.tar` yes, `/a.tar` and `file:///a.tar` no."""
    return bool(re.match(r"(?!file:)[a-z][a-z0-9+.-]*://", url, re.IGNORECASE))


def basename(url: str) -> str:
    """The last part of a URL's path, without its query."""
    return without_secrets(url).rstrip("/").rsplit("/", 1)[-1]


def without_secrets(url: str) -> str:
    """A URL without its query and user, as messages may name it."""
    return re.sub(r"://[^/]*@", "://", url.partition("?")[0])


def shown(url: str) -> str:
    """Name of a shard in messages and lists: a remote address without user, password and query."""
    return without_secrets(url) if is_remote(url) else url


@dataclass(frozen=True)
class Answer:
    """Answer of a store about a file, and its bytes from `start` on.

    `start` is 0 where the store cannot start later; `tag` differs between versions of the file, and
    is empty where the store does not say.
    """

    start: int
    total: int | None
    tag: str
    blocks: Iterator[bytes]


@dataclass(frozen=True)
class Remote:
    """Access to stores; pickles to workers and serves forked ones.

    Args:
        timeout: seconds without any byte from a store before a try counts as failed.
        attempts: tries in a row that may bring nothing before a file is given up.
        storage_options: arguments of fsspec's filesystem, such as `endpoint_url`.
    """

    timeout: float = 60.0
    attempts: int = 5
    storage_options: dict[str, Any] | None = None

    def small(self, url: str) -> bytes | None:
        """A small remote file, such as a shard's index; None where there is none.

        Forbidden counts as none: S3 says that of a missing file to whoever may not list a bucket.

        Raises:
            ShardError: any other failure, after `attempts` tries.
        """

        def read() -> bytes:
            with self.ask(url) as answer:
                return b"".join(answer.blocks)

        try:
            return self.persist(url, read)
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
                f"{without_secrets(pattern)}: http(s) cannot be listed: name shards with braces"
            )

        def found() -> list[str]:
            with self._asking(pattern):
                fs, path = self._filesystem(pattern)
                return self._call(fs, "glob", path)

        store = pattern.partition("://")[0]
        paths = sorted(self.persist(pattern, found))
        return [f"{store}://{path.lstrip('/')}" for path in paths if not path.endswith(".idx")]

    def persist(
        self, url: str, work: Callable[[], _T], progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """The result of `work`, tried again after `Retry` while the tries make progress.

        Raises:
            ShardError: `attempts` tries in a row made none.
        """
        failures, furthest = 0, progress()
        while True:
            try:
                return work()
            except Retry as error:
                # Starting over is no progress until it comes further than before.
                failures = 0 if progress() > furthest else failures + 1
                furthest = max(furthest, progress())
                if failures >= self.attempts:
                    raise _failed(url, f"{error} ({failures} tries)") from None
                wait = min(BACKOFF * 2 ** max(0, failures - 1), BACKOFF_MOST)
                time.sleep(wait * _jitter.uniform(0.5, 1))

    def ask(self, url: str, start: int = 0) -> AbstractContextManager[Answer]:
        """One try: a file's bytes from `start` on, which come while the answer is open.

        Raises:
            Retry: another try may help.
            StartOver: ask again from 0.
            ShardError: another try cannot help.
        """
        with self._asking(url):
            fs, path = self._filesystem(url)
        return self._http(fs, url, start) if _is_http(url) else self._ranges(fs, path, url, start)

    @contextmanager
    def _asking(self, url: str) -> Iterator[None]:
        """Errors of a store become `Retry`, or a ShardError where another try cannot help."""
        try:
            yield
        except (Retry, ShardError):
            raise
        except TimeoutError:
            raise Retry(f"nothing came for {self.timeout:g} seconds") from None
        except FileNotFoundError:
            raise _failed(url, "there is no such file", _Missing) from None
        except PermissionError as error:
            raise _failed(url, _reason(error), _Missing) from None
        except _LASTING as error:
            extra = isinstance(error, ImportError) and _EXTRAS.get(url.partition("://")[0])
            hint = f"pip install 'maepretrain[{extra}]'" if extra else _reason(error)
            raise _failed(url, hint) from None
        except Exception as error:
            raise Retry(_reason(error)) from None

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
    def _ranges(self, fs: Any, path: str, url: str, start: int) -> Iterator[Answer]:
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
                    raise Retry(f"{len(block):,} bytes came for {at:,} to {end:,}")
                yield block

        yield Answer(start, total, hashlib.sha256(str(about).encode()).hexdigest(), blocks())

    @contextmanager
    def _http(self, fs: Any, url: str, start: int) -> Iterator[Answer]:
        """A file of a web server, in one request.

        Not through fsspec's own reads: they take what a server that ignores ranges sends for the
        range, and end a download after five minutes.
        """

        def block() -> Any:
            with self._asking(url):
                # aiohttp keeps the time; this one guards against its bugs.
                return sync(fs.loop, _next_bytes, response, timeout=2 * self.timeout + 1)

        with self._asking(url):
            response: Any = sync(fs.loop, self._get, fs, url, start, timeout=self.timeout)
        try:
            at, total = _judge(response, url, start)
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
            whole = response.status == 416  # and its body says so in words
            yield Answer(at, total, tag, iter(()) if whole else iter(block, b""))
        finally:
            fs.loop.call_soon_threadsafe(response.close)

    async def _get(self, fs: Any, url: str, start: int) -> Any:
        from aiohttp import ClientTimeout

        session = await fs.set_session()
        # A compressed body has neither the length nor the ranges of the file.
        headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = ClientTimeout(sock_connect=self.timeout, sock_read=self.timeout)
        options = {**fs.kwargs, "headers": headers, "timeout": timeout}
        return await session.get(fs.encode_url(url), **options)


async def _next_bytes(response: Any) -> bytes:
    """What comes within a second, up to about BLOCK; at least one byte, but at the end none."""
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
        raise StartOver if start else Retry(said)
    elif status in _PASSING or status >= 500:
        raise Retry(said)
    raise _failed(url, said, _Missing if status in (403, 404, 410) else ShardError)


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _failed(url: str, reason: str, kind: type[ShardError] = ShardError) -> ShardError:
    return kind(f"cannot fetch {without_secrets(url)}: {reason}")


def _reason(error: Exception) -> str:
    """One line without the secrets of the URLs in it (a redirect's too)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\w+://\S+", lambda url: without_secrets(url[0]), text)[:300]
