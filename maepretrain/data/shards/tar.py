"""The content of a tar: its samples, where their bytes lie, their labels, and what is wrong.

Any uncompressed tar that follows WebDataset's convention: consecutive files `KEY.EXT` with one KEY
are one sample.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from maepretrain.data.errors import (
    DAMAGED_SHARD,
    EMPTY_SHARD,
    MISSING_INPUT,
    SECOND_FILE,
    WRONG_LABEL_ERROR,
    ShardError,
)

INPUT_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "npy", "txt")
TEXT = INPUT_EXTENSIONS.index("txt")
NO_LABEL = -1
# The label of a sample whose label file is no integer >= 0.
WRONG_LABEL = -2
# A tar writes this many bytes about a file right before its bytes.
TAR_HEADER = 512

_LAYOUT = (
    ("offset", "<i8"),
    ("size", "<i8"),
    ("header", "<u4"),
    ("label", "<i8"),
    ("extension", "u1"),
)
# File names hold any byte but zero: newlines and what is no UTF-8 too.
_ENCODING = ("utf-8", "surrogateescape")

# WebDataset's convention: the key ends at the first dot of the file name; folders may hold dots.
# Hidden files (macOS leaves `._a.jpg` in tars) have no key and are passed over.
_FILE_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The samples of one shard.

    Byte offset and size of the input file, crc32 of the tar header before it, label (-1: none,
    -2: wrong), extension and key.
    """

    offset: np.ndarray
    size: np.ndarray
    header: np.ndarray
    label: np.ndarray
    extension: np.ndarray
    key_bytes: bytes

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys, taken apart when first asked for: training never asks."""
        return tuple(self.key_bytes.decode(*_ENCODING).split("\0")) if len(self.offset) else ()

    def packed(self) -> bytes:
        """The columns one after the other, as a sidecar holds them."""
        parts = [getattr(self, name).astype(dtype).tobytes() for name, dtype in _LAYOUT]
        return b"".join(parts) + self.key_bytes

    @classmethod
    def unpacked(cls, data: bytes, samples: int) -> "Columns":
        """Columns from the bytes of `packed`.

        Raises:
            ValueError: bytes of another number of samples.
        """
        arrays, start = [], 0
        for _, dtype in _LAYOUT:
            arrays.append(np.frombuffer(data, dtype, samples, start))
            start += arrays[-1].nbytes
        keys = data[start:]
        if samples and keys.count(b"\0") != samples - 1:
            raise ValueError(f"it holds {keys.count(0) + 1} keys for {samples} samples")
        return cls(*arrays, key_bytes=keys)


def scan(path: Path) -> tuple[dict[str, Any], Columns]:
    """Read a tar's headers (and its small label files) into an index.

    The input of a sample is its first file with an image extension, in any case (`.JPEG`); an
    extension without dots goes before one with (`jpg` before `depth.png`). `.txt` is the input of
    shards that hold nothing else; beside images it is a caption and passed over. The label comes
    from `.cls` as text, else from `label` or `cls` in `.json`. Other files are passed over;
    further images of a sample are counted.

    What is wrong is listed in the head under `faults`, by kind, and the rest of the shard is used.
    A tar that ends early loses the sample at its end, of which more may have followed.

    Raises:
        ShardError: no tar at all.
    """
    errors: dict[str, list[str]] = {}
    rows: list[_Row] = []
    further_inputs = 0
    with path.open("rb") as tar:
        size = os.fstat(tar.fileno()).st_size
        try:
            for key, files in _samples(tar, errors) if size else ():
                inputs = _inputs(files)
                further_inputs += max(0, len(inputs) - 1)
                if not inputs:
                    errors.setdefault(MISSING_INPUT, []).append(key)
                    continue
                row = _row(key, files, inputs[0], tar)
                if row.label == WRONG_LABEL:
                    errors.setdefault(WRONG_LABEL_ERROR, []).append(key)
                rows.append(row)
        except tarfile.TarError as error:
            errors.setdefault(DAMAGED_SHARD, []).append(str(error))
    rows = _without_captions(rows, errors)
    if not rows:
        errors.setdefault(EMPTY_SHARD, []).append("it holds no sample")
    head = {
        "samples": len(rows),
        "bytes": size,
        "faults": errors,  # as index files have it on disk
        "further_inputs": further_inputs,
    }
    return head, _columns(rows)


class _Row(NamedTuple):
    """One sample: a value for each of the columns, and its key."""

    offset: int
    size: int
    header: int
    label: int
    extension: int
    key: str


def _row(key: str, files: dict[str, tarfile.TarInfo], extension: str, tar: IO[bytes]) -> _Row:
    file = files[extension]
    header = os.pread(tar.fileno(), TAR_HEADER, file.offset_data - TAR_HEADER)
    return _Row(
        offset=file.offset_data,
        size=file.size,
        header=zlib.crc32(header),
        label=label_of(partial(_content, files, tar)),
        extension=INPUT_EXTENSIONS.index(_suffix(extension)),
        key=key,
    )


def _without_captions(rows: list[_Row], errors: dict[str, list[str]]) -> list[_Row]:
    """The images, where there are any: samples of a text alone are then listed as errors."""
    captions = [row for row in rows if row.extension == TEXT]
    if not captions or len(captions) == len(rows):
        return rows
    errors.setdefault(MISSING_INPUT, []).extend(row.key for row in captions)
    return [row for row in rows if row.extension != TEXT]


def _columns(rows: list[_Row]) -> Columns:
    columns = {
        name: np.array([getattr(row, name) for row in rows], dtype=dtype) for name, dtype in _LAYOUT
    }
    return Columns(**columns, key_bytes="\0".join(row.key for row in rows).encode(*_ENCODING))


def _suffix(extension: str) -> str:
    return extension.rsplit(".", 1)[-1]


def _inputs(files: dict[str, tarfile.TarInfo]) -> list[str]:
    """The extensions that hold an image, those without dots first, or else those of texts; a link
    holds no bytes to read."""
    inputs = [e for e, file in files.items() if _suffix(e) in INPUT_EXTENSIONS and file.isreg()]
    images = [extension for extension in inputs if _suffix(extension) != "txt"]
    return sorted(images or inputs, key=lambda extension: "." in extension)


def _samples(
    tar: IO[bytes], errors: dict[str, list[str]]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {lower-case extension: file}) for each run of files with one key."""
    key = ""
    files: dict[str, tarfile.TarInfo] = {}
    for file in _files(tar):
        match = _FILE_NAME.fullmatch(file.name)
        if match is None or file.isdir():
            continue
        name, extension = match[1], match[2].lower()
        if name != key:
            if files:
                yield key, files
            key = name
            files = {}
        if extension in files:
            errors.setdefault(SECOND_FILE, []).append(file.name)
        else:
            files[extension] = file
    if files:
        yield key, files


def _files(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, down to the zeros that close it.

    tarfile alone takes a tar that was cut between two files, or is damaged there, for whole.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closed below
    except tarfile.TarError as error:
        raise ShardError(f"{file.name} is not a whole, uncompressed tar: {error}") from error
    with tar:
        for info in tar:
            if info.issparse():
                raise tarfile.ReadError(f"{info.name} has holes (tar --sparse)")
            if not 0 <= info.size <= end - info.offset_data:
                raise tarfile.ReadError(f"it ends inside {info.name}")
            yield info
            # tarfile keeps every header it saw; a shard can hold many.
            cast(Any, tar).members = []
        closes = tar.offset
    file.seek(closes)
    if closes == end:
        raise tarfile.ReadError("the zeros that close a tar are missing, so its end may be too")
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"no file starts at byte {closes}, and more follows")


def _content(files: dict[str, tarfile.TarInfo], tar: IO[bytes], extension: str) -> bytes | None:
    file = files.get(extension)
    if file is None or not file.isreg():
        return None
    return os.pread(tar.fileno(), file.size, file.offset_data)


def label_of(read: Callable[[str], bytes | None]) -> int:
    """The label of a sample, from what `read` returns for "cls" or "json": -1 where there is none,
    -2 where it is no integer >= 0."""
    for extension, parse in (("cls", int), ("json", _json_label)):
        text = read(extension)
        if text is None:
            continue
        try:
            value = parse(text)
        except (ValueError, RecursionError):
            return WRONG_LABEL
        if type(value) is not int or not NO_LABEL <= value < 1 << 63:
            return WRONG_LABEL
        if value != NO_LABEL:
            return value
    return NO_LABEL


def _json_label(text: bytes) -> Any:
    """`label`, else `cls`, of a JSON object; null and what is no object are no label."""
    content = json.loads(text)
    value = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    return NO_LABEL if value is None else value
