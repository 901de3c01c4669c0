"""The check of one shard: its headers, its checksum, every input."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maepretrain.data.errors import CORRUPT_INPUT, ErrorRow, ShardError, Unreadable
from maepretrain.data.shards.index import Shard, open_local, open_remote, sha256_of
from maepretrain.data.shards.tar import INPUT_EXTENSIONS, NO_LABEL, Columns, scan
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote, shown

UNUSABLE_SHARD = "unusable shard"
STALE_INDEX = "stale index"
WRONG_CHECKSUM = "wrong checksum"
LABEL_RANGE = "label out of range"


@dataclass(frozen=True)
class Criteria:
    """The settings of a check.

    Args:
        channels: of images and signals.
        classes: labels must be below this number; None takes any.
        length: of the crops of 1-D signals; None takes `.npy` for images or signals.
        decode: decode every input.
    """

    channels: int = 3
    classes: int | None = None
    length: int | None = None
    decode: bool = True


@dataclass
class ShardContents:
    """The contents of one shard and its errors.

    `labels` are those that occur, `hashes` 8 bytes for each key, and `reason` says why the first
    input that cannot be decoded cannot.
    """

    url: str
    samples: int = 0
    size: int = 0
    errors: list[ErrorRow] = field(default_factory=list)
    labels: tuple[int, ...] = ()
    unlabelled: int = 0
    hashes: bytes = b""
    types: Counter[str] = field(default_factory=Counter)
    indexed: bool = False
    further_inputs: int = 0
    left_out: int = 0
    reason: str = ""


def check_shard(criteria: Criteria, cache: ShardCache, url: str) -> ShardContents:
    """Read one shard anew and compare it with its index."""
    contents = ShardContents(url)
    try:
        if is_remote(url):
            shard = open_remote(cache, url)
            file = cache.open(url, shard.bytes, shard.sha256)
            try:  # it cannot be evicted while it is open
                _examine(contents, cache.path(url, shard.bytes, shard.sha256), shard, criteria)
            finally:
                os.close(file)
        else:
            _examine(contents, Path(url), _indexed(contents), criteria)
    except (ShardError, OSError) as error:
        contents.errors.append(ErrorRow(UNUSABLE_SHARD, url, str(error)))
    return contents


def _indexed(contents: ShardContents) -> Shard | None:
    try:
        return open_local(contents.url)
    except ShardError as error:
        contents.errors.append(ErrorRow(STALE_INDEX, shown(contents.url), str(error)))
        contents.indexed = True
        return None


def _examine(contents: ShardContents, path: Path, shard: Shard | None, criteria: Criteria) -> None:
    head, columns = scan(path)
    contents.samples = head["samples"]
    contents.size = head["bytes"]
    contents.further_inputs = head["further_inputs"]
    for kind, keys in head["faults"].items():
        contents.errors += [ErrorRow(kind, shown(contents.url), key) for key in keys]
    if shard is not None:
        contents.indexed = True
        contents.left_out = len(shard.unreadable)
        contents.errors += _compare(shard, path, columns)
    label = columns.label
    contents.labels = tuple(np.unique(label[label > NO_LABEL]).tolist())
    contents.unlabelled = int((label == NO_LABEL).sum())
    if criteria.classes is not None:
        contents.errors += [
            ErrorRow(LABEL_RANGE, shown(contents.url), columns.keys[row])
            for row in np.flatnonzero(label >= criteria.classes)
        ]
    if contents.samples:
        keys = columns.key_bytes.split(b"\0")
        contents.hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    if criteria.decode:
        _decode_all(contents, path, columns, criteria)


def _compare(shard: Shard, path: Path, columns: Columns) -> list[ErrorRow]:
    """The differences between an index and its shard."""
    errors = []
    if shard.sha256 is not None and sha256_of(path) != shard.sha256:
        errors.append(ErrorRow(WRONG_CHECKSUM, shown(shard.url), f"its index says {shard.sha256}"))
    try:
        indexed = shard.columns()
    except ShardError as error:
        return [*errors, ErrorRow(STALE_INDEX, shown(shard.url), str(error))]
    if len(indexed.offset) != len(columns.offset) or indexed.key_bytes != columns.key_bytes:
        wrong = f"it lists {len(indexed.offset)} samples, the shard holds {len(columns.offset)}"
        return [*errors, ErrorRow(STALE_INDEX, shown(shard.url), f"{wrong}, or their keys differ")]
    for name in ("offset", "size", "header", "label", "extension"):
        differ = np.flatnonzero(getattr(indexed, name) != getattr(columns, name))
        if len(differ):
            return [*errors, ErrorRow(STALE_INDEX, shown(shard.url), columns.keys[differ[0]])]
    return errors


def _decode_all(contents: ShardContents, path: Path, columns: Columns, criteria: Criteria) -> None:
    decode = _decoder(criteria)
    with path.open("rb") as file:
        for row in range(contents.samples):
            data = os.pread(file.fileno(), int(columns.size[row]), int(columns.offset[row]))
            extension = INPUT_EXTENSIONS[columns.extension[row]]
            try:
                contents.types[decode(data, extension)] += 1
            except Unreadable as error:
                key = columns.keys[row]
                contents.reason = contents.reason or f"{shown(contents.url)}, {key}: {error}"
                contents.errors.append(ErrorRow(CORRUPT_INPUT, shown(contents.url), key))


def _decoder(criteria: Criteria) -> Callable[[bytes, str], str]:
    """(bytes, their extension) -> type of the pixels, as training decodes them."""
    # Seconds of import, for workers that decode only.
    from maepretrain.data.samples import Pixels
    from maepretrain.data.transforms import CentreCrop, SignalCrop

    image = Pixels(criteria.channels, CentreCrop(1, 1))
    signal = Pixels(criteria.channels, SignalCrop(criteria.length or 1))

    def decode(data: bytes, extension: str) -> str:
        if criteria.length is not None:
            return str(signal.decode(data, extension).dtype)
        try:
            return str(image.decode(data, extension).dtype)
        except Unreadable:
            if extension not in ("npy", "txt"):
                raise
            return str(signal.decode(data, extension).dtype)

    return decode
