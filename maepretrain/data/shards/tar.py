"""What a tar holds: its samples, where their bytes lie, whose label they are, and what is wrong.

Any plain tar that follows WebDataset's convention: consecutive members `KEY.EXT` with one KEY are
one sample.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from maepretrain.data.errors import (
    DAMAGED_SHARD,
    EMPTY_SHARD,
    MISSING_INPUT,
    SECOND_MEMBER,
    WRONG_LABEL_FAULT,
    ShardError,
)

INPUT_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "npy", "txt")
TEXT = INPUT_EXTENSIONS.index("txt")
NO_LABEL = -1
# The label of a sample whose label member is no integer >= 0.
WRONG_LABEL = -2
# A tar writes this many bytes about a member right before its bytes.
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
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The samples of one shard.

    Byte offset and size of the input member, crc32 of the tar header before it, label (-1: none,
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
        """What `packed` gave.

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
    """Read a tar's headers (and its small label members) into an index.

    The input of a sample is its first member with an image extension, in any case (`.JPEG`); an
    extension without dots goes before one with (`jpg` before `depth.png`). `.txt` is the input of
    shards that hold nothing else; beside images it is a caption and passed over. The label comes
    from `.cls` as text, else from `label` or `cls` in `.json`. Other members are passed over;
    further images of a sample are counted.

    What is wrong is listed in the head's `faults`, by kind, and the rest of the shard is used. A
    tar that ends early loses the sample at its end, of which more may have followed.

    Raises:
        ShardError: no tar at all.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    keys: list[str] = []
    faults: dict[str, list[str]] = {}
    further_inputs = 0
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            for key, members in _samples(file, faults) if end else ():
                found = _inputs(members)
                further_inputs += max(0, len(found) - 1)
                if not found:
                    faults.setdefault(MISSING_INPUT, []).append(key)
                    continue
                member = members[found[0]]
                label, place = label_of(partial(_content, members, file)), member.offset_data
                if label == WRONG_LABEL:
                    faults.setdefault(WRONG_LABEL_FAULT, []).append(key)
                header = zlib.crc32(os.pread(file.fileno(), TAR_HEADER, place - TAR_HEADER))
                extension = INPUT_EXTENSIONS.index(_suffix(found[0]))
                rows.append((place, member.size, header, label, extension))
                keys.append(key)
        except tarfile.TarError as error:
            faults.setdefault(DAMAGED_SHARD, []).append(str(error))
    captions = [row[-1] == TEXT for row in rows]
    if not all(captions) and any(captions):
        faults.setdefault(MISSING_INPUT, []).extend(compress(keys, captions))
        images = [not caption for caption in captions]
        rows, keys = list(compress(rows, images)), list(compress(keys, images))
    if not rows:
        faults.setdefault(EMPTY_SHARD, []).append("it holds no sample")
    head = {
        "samples": len(rows),
        "bytes": end,
        "faults": faults,
        "further_inputs": further_inputs,
    }
    numbers = np.array(rows, dtype="<i8").reshape(-1, 5).T
    columns = [column.astype(dtype) for column, (_, dtype) in zip(numbers, _LAYOUT, strict=True)]
    return head, Columns(*columns, key_bytes="\0".join(keys).encode(*_ENCODING))


def _suffix(extension: str) -> str:
    return extension.rsplit(".", 1)[-1]


def _inputs(members: dict[str, tarfile.TarInfo]) -> list[str]:
    """The extensions that hold an image, plain ones first, or else those of texts; a link holds no
    bytes to read."""
    found = [e for e, m in members.items() if _suffix(e) in INPUT_EXTENSIONS and m.isreg()]
    images = [extension for extension in found if _suffix(extension) != "txt"]
    return sorted(images or found, key=lambda extension: "." in extension)


def _samples(
    file: IO[bytes], faults: dict[str, list[str]]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
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
            faults.setdefault(SECOND_MEMBER, []).append(member.name)
        else:
            members[extension] = member
    if members:
        yield key, members


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, down to the zeros that close it.

    tarfile alone takes a tar that was cut between two members, or is damaged there, for whole.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closed below
    except tarfile.TarError as error:
        raise ShardError(f"{file.name} is not a whole, uncompressed tar: {error}") from error
    with tar:
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


def _content(members: dict[str, tarfile.TarInfo], file: IO[bytes], extension: str) -> bytes | None:
    member = members.get(extension)
    if member is None or not member.isreg():
        return None
    return os.pread(file.fileno(), member.size, member.offset_data)


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
