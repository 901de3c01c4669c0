"""Tar shards and their sidecar index: what is in a shard, where its bytes lie, whose label it is.

A shard is any uncompressed tar that follows WebDataset's convention: consecutive files `KEY.EXT`
with one KEY are one sample. Beside `a.tar` lies `a.tar.idx`: a line of JSON (version, samples,
bytes, sha256, ...) and then zlib-compressed columns. It is made by `shards write` and `shards
index`, or on the fly where it is missing. Nothing here imports torch: worker processes start fast.
"""

import errno
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from maepretrain.data.errors import KINDS, ErrorRow, ShardError
from maepretrain.data.shards.parallel import in_processes, in_threads, progress
from maepretrain.data.shards.patterns import expand
from maepretrain.data.shards.tar import Columns, scan
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote, shown
from maepretrain.files import locked, replacing

INDEX_VERSION = 2
# Seconds for which the index of a remote shard is not asked for again: the ranks of a node start
# together, and one of them asks.
FRESH = 600


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file and the head of its index.

    Args:
        url: a local path or the address of a remote shard.
        sidecar: the index, on a local disk.
        samples: how many have an input.
        bytes: size of the tar.
        sha256: of the tar, where the index was made with it.
        errors: kind -> keys of the samples (of a damaged tar: what is wrong).
        further_inputs: images besides the first one of a sample.
        unreadable: what `shards write` had to leave out of the source.
    """

    url: str
    sidecar: Path
    samples: int
    bytes: int
    sha256: str | None
    errors: dict[str, list[str]]
    further_inputs: int
    unreadable: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The path of a local shard."""
        return Path(self.url)

    @property
    def name(self) -> str:
        """The file's name, without what a signed address carries."""
        return self.url.partition("?")[0].rpartition("/")[2]

    def error_rows(self) -> list[ErrorRow]:
        """Errors that its index lists, a row for each sample."""
        url = shown(self.url)
        return [ErrorRow(kind, url, key) for kind, keys in self.errors.items() for key in keys]

    def columns(self) -> Columns:
        """Read the index's columns."""
        try:
            with self.sidecar.open("rb") as file:
                file.readline()
                return Columns.unpacked(zlib.decompress(file.read()), self.samples)
        except (OSError, ValueError, zlib.error) as error:
            raise ShardError(f"{self.sidecar} is damaged; delete it: {error}") from error


def index_path(shard: Path) -> Path:
    """The sidecar of a shard: `a.tar.idx` beside `a.tar`."""
    return shard.with_name(shard.name + ".idx")


def open_shards(
    patterns: str | list[str], workers: int = 1, cache: ShardCache | None = None
) -> list[Shard]:
    """Shards of the patterns with their heads.

    A missing index is made: beside the shard, or in the cache folder where the shard's folder
    cannot be written. The index of a remote shard is the sidecar that lies beside it, or is made in
    one pass over the shard.

    Raises:
        ShardError: a pattern that names nothing, no tar, an index that belongs to other bytes, or
            a remote shard that cannot be fetched.
    """
    cache = cache or ShardCache()
    urls = expand(patterns, cache)
    remote = [url for url in urls if is_remote(url)]
    local = [url for url in urls if not is_remote(url)] if remote else urls
    opened = in_threads(open_local, local) + in_threads(partial(open_remote, cache), remote)
    missing = [Path(url) for url, shard in zip(local, opened, strict=False) if shard is None]
    known = {shard.url: shard for shard in (*opened, *make_indexes(missing, workers)) if shard}
    return [known[url] for url in urls]


def class_names(shards: list[Shard]) -> list[str]:
    """Names of the classes in the order of their numbers, as `shards write` left them beside local
    shards; empty where it did not."""
    if not shards or is_remote(shards[0].url):
        return []
    shard = Path(shards[0].url)
    try:
        content = json.loads(shard.with_name(f"{shard.stem.rpartition('-')[0]}.json").read_bytes())
        return [str(name) for name in content["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def make_indexes(paths: list[Path], workers: int = 1, checksum: bool = False) -> list[Shard]:
    """Write the sidecar of each shard, in parallel.

    `checksum` reads every byte; without it only tar headers are read.
    """
    if not paths:
        return []
    made = in_processes(_make_index, [(path, checksum) for path in paths], workers)
    return list(progress(made, "indexing shards", len(paths)))


def open_local(url: str) -> Shard | None:
    """A shard with its head; None where it has no index.

    Raises:
        ShardError: an index of another version or of other bytes.
    """
    about = os.stat(url)  # noqa: PTH116  a Path costs more than the question
    sidecar = Path(url + ".idx")
    head = _read_head(sidecar)
    if head is None:
        sidecar = _kept_index(os.path.realpath(url), ShardCache())
        with suppress(ShardError):  # it is ours, and can be made anew
            head = _read_head(sidecar)
        if head is None or sidecar.stat().st_mtime < about.st_mtime:
            return None
    shard = _shard(url, sidecar, head)
    if shard.bytes != about.st_size:
        raise ShardError(
            f"{sidecar} is stale: the shard has {about.st_size} bytes, its index says "
            f"{shard.bytes}; run `maepretrain shards index {url}`"
        )
    return shard


def open_remote(cache: ShardCache, url: str) -> Shard:
    """A shard with its head, which all processes of the node ask for once.

    Raises:
        ShardError: a shard that cannot be fetched, no tar, or an index of another version.
    """
    sidecar = _kept_index(url, cache)
    head = _fresh_head(sidecar)
    if head is None:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with locked(sidecar):  # the other processes of the node wait for the index
            head = _fresh_head(sidecar)
            if head is None:
                _fetch_index(url, sidecar, cache)
                head = _read_head(sidecar)
    assert head is not None, "it was just written"
    return _shard(url, sidecar, head)


def _fresh_head(sidecar: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        if time.time() - sidecar.stat().st_mtime < FRESH:
            return _read_head(sidecar)
    return None


def _fetch_index(url: str, sidecar: Path, cache: ShardCache) -> None:
    """The index that lies beside a remote shard, or one made in a pass over the shard."""
    address, mark, query = url.partition("?")
    beside = cache.small(f"{address}.idx{mark}{query}")
    if beside is not None:
        with replacing(sidecar) as file:
            file.write(beside)
        return
    if sidecar.exists():  # made in an earlier run; what does not fit it will be refused
        sidecar.touch()
        return
    pin, fetched = cache.open(url), cache.path(url)
    try:
        head, columns = scan(fetched)
        head["sha256"] = sha256_of(fetched)
        write_index(sidecar, head, columns)
        # From now on the shard is known by its checksum.
        cache.rename(fetched, cache.path(url, head["bytes"], head["sha256"]))
    finally:
        os.close(pin)


def _kept_index(url: str, cache: ShardCache) -> Path:
    """Where the index of a shard lies that cannot lie beside it."""
    return cache.folder / "index" / (hashlib.sha256(os.fsencode(url)).hexdigest()[:32] + ".idx")


def _make_index(job: tuple[Path, bool]) -> Shard:
    path, checksum = job
    head, columns = scan(path)
    sidecar = index_path(path)
    if checksum:
        head["sha256"] = sha256_of(path)
    try:  # what the writer left out of the source is no longer seen in the shard
        head["unreadable"] = (_read_head(sidecar) or {}).get("unreadable", ())
    except ShardError:
        head["unreadable"] = ()
    try:
        write_index(sidecar, head, columns)
    except OSError as error:
        if checksum or error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        sidecar = _kept_index(str(path.resolve()), ShardCache())
        write_index(sidecar, head, columns)
    return _shard(str(path), sidecar, head)


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard(url: str, sidecar: Path, head: dict[str, Any]) -> Shard:
    try:
        return Shard(
            url,
            sidecar,
            head["samples"],
            head["bytes"],
            head.get("sha256"),
            head["faults"],
            head["further_inputs"],
            tuple(head.get("unreadable", ())),
        )
    except KeyError as error:
        raise ShardError(f"{sidecar} is no shard index; delete it") from error


def read_head(path: Path) -> Shard:
    """The head of a local shard's index, checked against the shard's size.

    Raises:
        ShardError: a missing shard, an index that is missing, of another version or of other bytes.
    """
    if not path.is_file():
        raise ShardError(f"no such shard: {path}")
    shard = open_local(str(path))
    if shard is None:
        raise ShardError(f"{path} has no index; run `maepretrain shards index {path}`")
    return shard


def _read_head(sidecar: Path) -> dict[str, Any] | None:
    """The first line of an index; None where there is none."""
    try:
        file = os.open(sidecar, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        line = b""
        while b"\n" not in line and (more := os.read(file, 1 << 12)):
            line += more
    finally:
        os.close(file)
    try:
        head = json.loads(line.partition(b"\n")[0])
        version = head["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{sidecar} is no shard index; delete it") from error
    if version != INDEX_VERSION:
        raise ShardError(f"{sidecar} has version {version}, not {INDEX_VERSION}; delete it")
    return head


def write_index(sidecar: Path, head: dict[str, Any], columns: Columns) -> None:
    """Write a sidecar atomically: what `scan` found, and what else the head shall say."""
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    with replacing(sidecar) as file:
        file.write(json.dumps({"version": INDEX_VERSION} | head, sort_keys=True).encode() + b"\n")
        file.write(zlib.compress(columns.packed()))


def summary(shards: Iterable[Shard]) -> str:
    """One line for people: how many shards, samples, bytes, and what was passed over."""
    shards = list(shards)
    samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
    line = f"{samples:,} samples in {len(shards)} shards ({size / 1e6:,.1f} MB)"
    for kind in KINDS:
        times = sum(len(shard.errors.get(kind, ())) for shard in shards)
        line += f"; {times:,} x {kind}" if times else ""
    further = sum(s.further_inputs for s in shards)
    if further:
        line += f"; {further:,} further images of a sample (KEY.a.png, KEY.b.png) are passed over"
    return line
