"""Tar shards and their sidecar index: what is in a shard, where its bytes lie, and which label belongs to them.

A shard is any plain tar that follows WebDataset's convention: consecutive members `KEY.EXT` with one KEY are one sample. Beside
`a.tar` lies `a.tar.idx`: a line of JSON (version, samples, bytes, sha256, ...) and then zlib-compressed columns. It is made by
`shards write` and `shards index`, or on the fly where it is missing. Nothing here imports torch: worker processes start fast.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from glob import glob
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand
from rich.progress import track

INDEX_VERSION = 1
INPUT_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "npy")
NO_LABEL = -1


# WebDataset's convention: the key ends at the first dot of the file name; folders may hold dots.
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")


class ShardError(ValueError):
    """A shard or its index that cannot be used, named with the reason."""


@dataclass(frozen=True)
class Columns:
    """The samples of one shard: byte offset and size of the input member, its label (-1: none), extension and key."""

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    extension: np.ndarray
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One tar file and the head of its index."""

    path: Path
    samples: int
    bytes: int
    sha256: str | None
    without_input: int
    unreadable: tuple[str, ...]

    def columns(self) -> Columns:
        """Read the index's columns (made on the fly where there is no sidecar)."""
        sidecar = index_path(self.path)
        if not sidecar.exists():
            return scan(self.path)[1]
        with sidecar.open("rb") as file:
            file.readline()
            return _unpack(zlib.decompress(file.read()), self.samples)


def index_path(shard: Path) -> Path:
    """The sidecar of a shard: `a.tar.idx` beside `a.tar`."""
    return shard.with_name(shard.name + ".idx")


def expand(patterns: str | list[str]) -> list[Path]:
    """Shard paths of one or several patterns: braces (`a-{000..011}.tar`), globs, plain files; sorted within a glob.

    Raises:
        ShardError: a pattern that matches no file, or a remote address.
    """
    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise ShardError(
                f"{pattern}: only local shards can be read so far; copy them to a disk"
            )
        try:
            found = [path for url in braceexpand(pattern) for path in _existing(url)]
        except UnbalancedBracesError:
            raise ShardError(f"{pattern}: a brace is never closed") from None
        if not found:
            raise ShardError(f"no shard matches {pattern}")
        paths += found
    doubled = len(paths) - len(set(paths))
    if doubled:
        raise ShardError(f"{doubled} shards are named more than once by {patterns}")
    return paths


def _existing(url: str) -> list[Path]:
    if any(character in url for character in "*?["):
        return [Path(path) for path in sorted(glob(url))]
    if not Path(url).is_file():
        raise ShardError(f"no shard matches {url}")
    return [Path(url)]


def open_shards(patterns: str | list[str], workers: int = 1) -> list[Shard]:
    """Shards of the patterns with their heads; a missing index is made, and kept where the folder can be written."""
    paths = expand(patterns)
    missing = [path for path in paths if not index_path(path).exists()]
    if missing:
        make_indexes(missing, workers)
    return [read_head(path) for path in paths]


def make_indexes(paths: list[Path], workers: int = 1, checksum: bool = False) -> None:
    """Write the sidecar of each shard, in parallel. `checksum` reads every byte; without it only tar headers are read."""
    jobs = [(path, checksum) for path in paths]
    for _ in track(
        in_processes(_make_index, jobs, workers), "indexing shards", len(jobs), transient=True
    ):
        pass


def in_processes(function: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    """`function(job)` for each job in worker processes, results in order; in this process when there is nothing to share out."""
    if min(workers, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    # "spawn": the parent may hold threads (torch, rich), which must not be forked.
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        try:
            yield from pool.map(function, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


def _make_index(job: tuple[Path, bool]) -> None:
    path, checksum = job
    head, columns = scan(path)
    if checksum:
        with path.open("rb") as file:
            head["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if os.access(path.parent, os.W_OK):
        write_index(path, head, columns)


def read_head(path: Path) -> Shard:
    """The head of a shard's index, checked against the shard's size.

    Raises:
        ShardError: a missing shard, an index of another version, or one that belongs to other bytes.
    """
    sidecar = index_path(path)
    if not path.is_file():
        raise ShardError(f"no such shard: {path}")
    if sidecar.exists():
        with sidecar.open("rb") as file:
            try:
                head = json.loads(file.readline())
            except ValueError as error:
                raise ShardError(f"{sidecar} is no shard index; delete it: {error}") from error
    else:
        head = scan(path)[0]
    if head.get("version") != INDEX_VERSION:
        raise ShardError(
            f"{sidecar} has version {head.get('version')}, not {INDEX_VERSION}; delete it"
        )
    if head["bytes"] != path.stat().st_size:
        raise ShardError(
            f"{sidecar} is stale: the shard has {path.stat().st_size} bytes, its index says "
            f"{head['bytes']}; run `maepretrain shards index {path}`"
        )
    return Shard(
        path,
        head["samples"],
        head["bytes"],
        head.get("sha256"),
        head["without_input"],
        tuple(head.get("unreadable", ())),
    )


def write_index(path: Path, head: dict[str, Any], columns: Columns) -> None:
    """Write the sidecar atomically."""
    temporary = index_path(path).with_suffix(f".idx.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(json.dumps(head, sort_keys=True).encode() + b"\n")
        file.write(zlib.compress(_pack(columns)))
    temporary.replace(index_path(path))


_LAYOUT = (("offset", "<i8"), ("size", "<i8"), ("label", "<i8"), ("extension", "u1"))


def _pack(columns: Columns) -> bytes:
    parts = [getattr(columns, name).astype(dtype).tobytes() for name, dtype in _LAYOUT]
    return b"".join(parts) + "\n".join(columns.keys).encode()


def _unpack(data: bytes, samples: int) -> Columns:
    arrays, start = [], 0
    for _, dtype in _LAYOUT:
        arrays.append(np.frombuffer(data, dtype, samples, start))
        start += arrays[-1].nbytes
    keys = data[start:].decode()
    return Columns(*arrays, keys=tuple(keys.split("\n")) if keys else ())


def scan(path: Path) -> tuple[dict[str, Any], Columns]:
    """Read a tar's headers (and its small label members) into an index.

    The input of a sample is its first member with an image extension, in any case (`.JPEG`). The label comes from `.cls` as text,
    else from `label` or `cls` in `.json`. Other members are passed over.

    Raises:
        ShardError: no tar, a tar that ends early, or a label that is no integer >= 0.
    """
    rows: list[tuple[int, int, int, int, str]] = []
    without_input = 0
    try:
        with path.open("rb") as file:
            for key, members in _samples(path, file):
                found = next((e for e in members if _suffix(e) in INPUT_EXTENSIONS), None)
                if found is None:
                    without_input += 1
                    continue
                member = members[found]
                label = _label(path, key, members, file)
                extension = INPUT_EXTENSIONS.index(_suffix(found))
                rows.append((member.offset_data, member.size, label, extension, key))
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole tar file: {error}") from error
    offset, size, label, extension, keys = zip(*rows, strict=True) if rows else ([],) * 5
    head = {
        "version": INDEX_VERSION,
        "samples": len(rows),
        "bytes": path.stat().st_size,
        "without_input": without_input,
    }
    integers = (np.array(column, dtype="<i8") for column in (offset, size, label))
    return head, Columns(*integers, np.array(extension, dtype="u1"), tuple(keys))


def _suffix(extension: str) -> str:
    return extension.rsplit(".", 1)[-1].lower()


def _samples(path: Path, file: IO[bytes]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {extension: member}) for each run of members with one key."""
    key, members = None, {}
    end = path.stat().st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"it ends inside member {member.name}")
            match = _MEMBER.fullmatch(member.name)
            if not member.isreg() or match is None:
                continue
            name, extension = match.groups()
            if name != key:
                if members:
                    yield str(key), members
                key, members = name, {}
            members[extension] = member
            tar.members = []  # tarfile keeps every header it saw; a shard can hold many
    if members:
        yield str(key), members


def _label(path: Path, key: str, members: dict[str, tarfile.TarInfo], file: IO[bytes]) -> int:
    for extension in ("cls", "json"):
        member = members.get(extension)
        if member is None:
            continue
        text = os.pread(file.fileno(), member.size, member.offset_data)
        try:
            value = json.loads(text)
            if isinstance(value, dict):
                value = value.get("label", value.get("cls", NO_LABEL))
            if isinstance(value, bool) or not isinstance(value, int) or value < NO_LABEL:
                raise ValueError
        except ValueError:
            raise ShardError(
                f"{path}: label {text[:40]!r} in {member.name} is not an integer >= 0"
            ) from None
        if value != NO_LABEL:
            return value
    return NO_LABEL


def summary(shards: Iterable[Shard]) -> str:
    """One line for people: how many shards, samples, bytes, and what was passed over."""
    shards = list(shards)
    samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
    line = f"{samples:,} samples in {len(shards)} shards ({size / 1e6:,.1f} MB)"
    skipped = sum(s.without_input for s in shards)
    return line + (f"; {skipped:,} samples without an image are passed over" if skipped else "")
