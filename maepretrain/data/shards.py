"""Tar shards and their sidecar index: what is in a shard, where its bytes lie, whose label it is.

A shard is any plain tar that follows WebDataset's convention: consecutive members `KEY.EXT` with
one KEY are one sample. Beside `a.tar` lies `a.tar.idx`: a line of JSON (version, samples, bytes,
sha256, ...) and then zlib-compressed columns. It is made by `shards write` and `shards index`, or
on the fly where it is missing. Nothing here imports torch: worker processes start fast.
"""

import errno
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
from typing import IO, Any, cast

import numpy as np
from braceexpand import braceexpand
from rich.progress import track

from maepretrain.data.faults import ShardError
from maepretrain.files import replacing

INDEX_VERSION = 1
INPUT_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "npy")
NO_LABEL = -1


# WebDataset's convention: the key ends at the first dot of the file name; folders may hold dots.
# Hidden files (macOS leaves `._a.jpg` in tars) have no key and are passed over.
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The samples of one shard.

    Byte offset and size of the input member, label (-1: none), extension and key.
    """

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
    further_inputs: int = 0

    def columns(self) -> Columns:
        """Read the index's columns (made on the fly where there is no sidecar)."""
        sidecar = index_path(self.path)
        if not sidecar.exists():
            return scan(self.path)[1]
        try:
            with sidecar.open("rb") as file:
                file.readline()
                return _unpack(zlib.decompress(file.read()), self.samples)
        except (ValueError, zlib.error) as error:
            raise ShardError(f"{sidecar} is damaged; delete it: {error}") from error


def index_path(shard: Path) -> Path:
    """The sidecar of a shard: `a.tar.idx` beside `a.tar`."""
    return shard.with_name(shard.name + ".idx")


def expand(patterns: str | list[str]) -> list[Path]:
    """Shard paths of one or several patterns: braces (`a-{000..011}.tar`), globs, plain files.

    In the order of the patterns; sorted within a glob.

    Raises:
        ShardError: a pattern that matches no file, or a remote address.
    """
    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths += _expand_one(pattern)
    if not paths:
        raise ShardError(f"no shards are named: the patterns are {patterns}")
    doubled = len(paths) - len(set(paths))
    if doubled:
        raise ShardError(f"{doubled} shards are named more than once by {patterns}")
    return paths


def _expand_one(pattern: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ShardError(f"{pattern}: only local shards can be read so far; copy them to a disk")
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ShardError(f"{pattern} is a folder; name its shards: {path / '*.tar'}")
    if path.is_file():  # also a name that holds a brace or a bracket
        return [path]
    try:
        urls = list(braceexpand(pattern))
    except ValueError:
        raise ShardError(f"{pattern}: a brace is not closed or not opened") from None
    return [path for url in urls for path in _existing(url, pattern)]


def _existing(url: str, pattern: str) -> list[Path]:
    path = Path(url).expanduser()
    found = [path] if path.is_file() else []
    if not found and any(character in url for character in "*?["):
        # Path.glob would take hidden files too.
        matches = (Path(match) for match in sorted(glob(str(path))))  # noqa: PTH207
        found = [match for match in matches if match.is_file() and match.suffix != ".idx"]
    if not found:
        raise ShardError(f"no shard matches {url}" + (f" of {pattern}" if url != pattern else ""))
    return found


def open_shards(patterns: str | list[str], workers: int = 1) -> list[Shard]:
    """Shards of the patterns with their heads.

    A missing index is made, and kept where the folder can be written.
    """
    paths = expand(patterns)
    made = make_indexes([path for path in paths if not index_path(path).exists()], workers)
    fresh = {shard.path: shard for shard in made}
    return [fresh.get(path) or read_head(path) for path in paths]


def make_indexes(paths: list[Path], workers: int = 1, checksum: bool = False) -> list[Shard]:
    """Write the sidecar of each shard, in parallel.

    `checksum` reads every byte; without it only tar headers are read, and a folder that cannot be
    written is no error.
    """
    if not paths:
        return []
    jobs = [(path, checksum) for path in paths]
    made = in_processes(_make_index, jobs, workers)
    return list(track(made, "indexing shards", len(jobs), transient=True))


def in_processes(function: Any, jobs: list[Any], workers: int) -> Iterator[Any]:
    """`function(job)` for each job in worker processes, results in order.

    In this process when there is nothing to share out.
    """
    if min(workers, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    # "spawn": the parent may hold threads (torch, rich), which must not be forked.
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        try:
            yield from pool.map(function, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


def _make_index(job: tuple[Path, bool]) -> Shard:
    path, checksum = job
    head, columns = scan(path)
    if checksum:
        with path.open("rb") as file:
            head["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        write_index(path, head, columns)
    except OSError as error:
        if checksum or error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
    return _shard(path, head)


def _shard(path: Path, head: dict[str, Any]) -> Shard:
    return Shard(
        path,
        head["samples"],
        head["bytes"],
        head.get("sha256"),
        head["without_input"],
        tuple(head.get("unreadable", ())),
        head.get("further_inputs", 0),
    )


def read_head(path: Path) -> Shard:
    """The head of a shard's index, checked against the shard's size.

    Raises:
        ShardError: a missing shard, an index of another version or that belongs to other bytes.
    """
    sidecar = index_path(path)
    if not path.is_file():
        raise ShardError(f"no such shard: {path}")
    if not sidecar.exists():
        return _shard(path, scan(path)[0])
    try:
        with sidecar.open("rb") as file:
            head = json.loads(file.readline())
        version = head["version"]
        shard = _shard(path, head) if version == INDEX_VERSION else None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{sidecar} is no shard index; delete it") from error
    if shard is None:
        raise ShardError(f"{sidecar} has version {version}, not {INDEX_VERSION}; delete it")
    if shard.bytes != path.stat().st_size:
        raise ShardError(
            f"{sidecar} is stale: the shard has {path.stat().st_size} bytes, its index says "
            f"{shard.bytes}; run `maepretrain shards index {path}`"
        )
    return shard


def write_index(path: Path, head: dict[str, Any], columns: Columns) -> None:
    """Write the sidecar atomically."""
    with replacing(index_path(path)) as file:
        file.write(json.dumps(head, sort_keys=True).encode() + b"\n")
        file.write(zlib.compress(_pack(columns)))


_LAYOUT = (("offset", "<i8"), ("size", "<i8"), ("label", "<i8"), ("extension", "u1"))
# File names hold any byte but zero: newlines and what is no UTF-8 too.
_ENCODING = ("utf-8", "surrogateescape")


def _pack(columns: Columns) -> bytes:
    parts = [getattr(columns, name).astype(dtype).tobytes() for name, dtype in _LAYOUT]
    return b"".join(parts) + "\0".join(columns.keys).encode(*_ENCODING)


def _unpack(data: bytes, samples: int) -> Columns:
    arrays, start = [], 0
    for _, dtype in _LAYOUT:
        arrays.append(np.frombuffer(data, dtype, samples, start))
        start += arrays[-1].nbytes
    keys = tuple(data[start:].decode(*_ENCODING).split("\0")) if samples else ()
    if len(keys) != samples:
        raise ValueError(f"{len(keys)} keys for {samples} samples")
    return Columns(*arrays, keys=keys)


def scan(path: Path) -> tuple[dict[str, Any], Columns]:
    """Read a tar's headers (and its small label members) into an index.

    The input of a sample is its first member with an image extension, in any case (`.JPEG`); an
    extension without dots goes before one with (`jpg` before `depth.png`). The label comes from
    `.cls` as text, else from `label` or `cls` in `.json`. Other members are passed over; further
    images of a sample are counted, and so are samples without one.

    Raises:
        ShardError: no tar, a tar that ends early, two members of one name, or a label that is no
            integer >= 0.
    """
    rows: list[tuple[int, int, int, int, str]] = []
    without_input = further_inputs = 0
    try:
        with path.open("rb") as file:
            for key, members in _samples(path, file):
                found = _inputs(members)
                further_inputs += max(0, len(found) - 1)
                if not found:
                    without_input += 1
                    continue
                member, label = members[found[0]], _label(path, members, file)
                extension = INPUT_EXTENSIONS.index(_suffix(found[0]))
                rows.append((member.offset_data, member.size, label, extension, key))
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    head = {
        "version": INDEX_VERSION,
        "samples": len(rows),
        "bytes": path.stat().st_size,
        "without_input": without_input,
        "further_inputs": further_inputs,
    }
    return head, _columns(rows)


def _columns(rows: list[tuple[int, int, int, int, str]]) -> Columns:
    numbers = np.array([row[:4] for row in rows], dtype="<i8").reshape(-1, 4)
    offset, size, label, extension = numbers.T
    return Columns(offset, size, label, extension.astype("u1"), tuple(row[4] for row in rows))


def _suffix(extension: str) -> str:
    return extension.rsplit(".", 1)[-1]


def _inputs(members: dict[str, tarfile.TarInfo]) -> list[str]:
    """The extensions that hold an image, plain ones first; a link holds no bytes to read."""
    found = [e for e, m in members.items() if _suffix(e) in INPUT_EXTENSIONS and m.isreg()]
    return sorted(found, key=lambda extension: "." in extension)


def _samples(path: Path, file: IO[bytes]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {lower-case extension: member}) for each run of members with one key."""
    key, members = "", {}
    for member in _members(file):
        match = _MEMBER.fullmatch(member.name)
        if match is None or member.isdir():
            continue
        name, extension = match[1], match[2].lower()
        if name != key:
            if members:
                yield key, members
            key, members = name, {}
        if extension in members:
            raise ShardError(
                f"{path}: {member.name} is a second .{extension} of one sample; rename or remove it"
            )
        members[extension] = member
    if members:
        yield key, members


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, down to the zeros that close it.

    tarfile alone takes a tar that was cut between two members, or is damaged there, for whole.
    """
    end = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.issparse():
                raise tarfile.ReadError(f"member {member.name} has holes (tar --sparse)")
            if not 0 <= member.size <= end - member.offset_data:
                raise tarfile.ReadError(f"it ends inside member {member.name}")
            yield member
            # tarfile keeps every header it saw; a shard can hold many.
            cast(Any, tar).members = []
        closes = tar.offset
    file.seek(closes)
    if closes == end:
        raise tarfile.ReadError("the zeros that close a tar are missing, so its end may be too")
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"no member starts at byte {closes}, and more follows")


def _label(path: Path, members: dict[str, tarfile.TarInfo], file: IO[bytes]) -> int:
    for extension, parse in (("cls", int), ("json", _json_label)):
        member = members.get(extension)
        if member is None or not member.isreg():
            continue
        text = os.pread(file.fileno(), member.size, member.offset_data)
        try:
            value = parse(text)
        except (ValueError, RecursionError):
            value = text
        if type(value) is not int or not NO_LABEL <= value < 1 << 63:
            raise ShardError(f"{path}: label {value!r:.60} in {member.name} is not an integer >= 0")
        if value != NO_LABEL:
            return value
    return NO_LABEL


def _json_label(text: bytes) -> Any:
    """`label`, else `cls`, of a JSON object; null and what is no object are no label."""
    content = json.loads(text)
    value = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    return NO_LABEL if value is None else value


def summary(shards: Iterable[Shard]) -> str:
    """One line for people: how many shards, samples, bytes, and what was passed over."""
    shards = list(shards)
    samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
    line = f"{samples:,} samples in {len(shards)} shards ({size / 1e6:,.1f} MB)"
    skipped = sum(s.without_input for s in shards)
    further = sum(s.further_inputs for s in shards)
    if skipped:
        line += f"; {skipped:,} samples without an image are passed over"
    if further:
        line += f"; {further:,} further images of a sample (KEY.a.png, KEY.b.png) are passed over"
    return line
