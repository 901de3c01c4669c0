"""What is wrong with shards, found before a run meets it: behind `maepretrain shards check`.

Each shard is read anew by a worker process: its headers, its checksum, every input. What concerns
all shards (keys that come twice, labels, batch and processes) is put together afterwards; of a key
only a hash of 8 bytes is kept until then, so a billion samples take some 10 GB.
"""

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maepretrain.data.errors import CORRUPT_INPUT, ErrorRow, ShardError, Unreadable, printable
from maepretrain.data.shards.index import (
    Shard,
    expand,
    in_processes,
    open_local,
    open_remote,
    progress,
    sha256_of,
)
from maepretrain.data.shards.tar import INPUT_EXTENSIONS, NO_LABEL, Columns, scan
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote, shown

UNUSABLE_SHARD = "unusable shard"
STALE_INDEX = "stale index"
WRONG_CHECKSUM = "wrong checksum"
LABEL_RANGE = "label out of range"
PARTLY_LABELLED = "shard with unlabelled samples"
KEY_TWICE_IN_SHARD = "key twice in a shard"
KEY_IN_TWO_SHARDS = "key in two shards"
MIXED_INPUTS = "inputs of several types"
BATCH = "batch and processes"
# So many classes without samples are named.
NAMED = 10


@dataclass(frozen=True)
class Asked:
    """What a worker looks for.

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
class Found:
    """What one shard holds: the labels that occur, 8 bytes for each key, why the first input that
    cannot be decoded cannot."""

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


@dataclass
class Report:
    """All that was found: what is wrong, what is good to know, and a line of totals."""

    errors: list[ErrorRow]
    notes: list[str]
    totals: str


def check_shards(
    patterns: list[str],
    asked: Asked,
    world_size: int = 1,
    num_workers: int = 1,
    global_batch: int | None = None,
    workers: int = 1,
    cache: ShardCache | None = None,
) -> Report:
    """Read all shards and say what a run would meet.

    Args:
        patterns: shards, as for `open_shards`.
        asked: what to look for in a shard.
        world_size: processes of the run.
        num_workers: loader processes of each.
        global_batch: samples of the run's batch.
        workers: processes that check, side by side.
        cache: where remote shards are kept.

    Raises:
        ShardError: a pattern that names nothing.
        ValueError: a number below 1.
    """
    for name, number in (
        *(("world_size", world_size), ("global_batch", global_batch), ("workers", workers)),
        *(("channels", asked.channels), ("classes", asked.classes), ("length", asked.length)),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number} must be at least 1")
    begin, cache = time.perf_counter(), cache or ShardCache()
    urls = expand(patterns, cache)
    looked_at = in_processes(partial(_look_at, asked, cache), urls, workers)
    found = list(progress(looked_at, "checking shards", len(urls)))
    samples = sum(one.samples for one in found)
    errors = [error for one in found for error in one.errors]
    errors += _partly_labelled(found) + _mixed(found) + _repeated_keys(found, cache)
    errors += _batch_errors(samples, world_size, global_batch)
    notes = _notes(found, samples, world_size, num_workers, global_batch, asked.classes)
    return Report(errors, notes, _totals(found, samples, time.perf_counter() - begin))


# One shard.


def _look_at(asked: Asked, cache: ShardCache, url: str) -> Found:
    found = Found(url)
    try:
        if is_remote(url):
            shard = open_remote(cache, url)
            file = cache.open(url, shard.bytes, shard.sha256)
            try:  # it cannot be evicted while it is open
                _examine(found, cache.path(url, shard.bytes, shard.sha256), shard, asked)
            finally:
                os.close(file)
        else:
            _examine(found, Path(url), _indexed(found), asked)
    except (ShardError, OSError) as error:
        found.errors.append(ErrorRow(UNUSABLE_SHARD, url, str(error)))
    return found


def _indexed(found: Found) -> Shard | None:
    try:
        return open_local(found.url)
    except ShardError as error:
        found.errors.append(ErrorRow(STALE_INDEX, shown(found.url), str(error)))
        found.indexed = True
        return None


def _examine(found: Found, path: Path, shard: Shard | None, asked: Asked) -> None:
    head, columns = scan(path)
    found.samples, found.size = head["samples"], head["bytes"]
    found.further_inputs = head["further_inputs"]
    for kind, keys in head["faults"].items():
        found.errors += [ErrorRow(kind, shown(found.url), key) for key in keys]
    if shard is not None:
        found.indexed, found.left_out = True, len(shard.unreadable)
        found.errors += _compare(shard, path, columns)
    label = columns.label
    found.labels = tuple(np.unique(label[label > NO_LABEL]).tolist())
    found.unlabelled = int((label == NO_LABEL).sum())
    if asked.classes is not None:
        found.errors += [
            ErrorRow(LABEL_RANGE, shown(found.url), columns.keys[row])
            for row in np.flatnonzero(label >= asked.classes)
        ]
    if found.samples:
        keys = columns.key_bytes.split(b"\0")
        found.hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    if asked.decode:
        _decode_all(found, path, columns, asked)


def _compare(shard: Shard, path: Path, columns: Columns) -> list[ErrorRow]:
    """What the index says otherwise than the shard."""
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
        errors += [ErrorRow(STALE_INDEX, shown(shard.url), columns.keys[row]) for row in differ[:1]]
        if len(differ):
            break
    return errors


def _decode_all(found: Found, path: Path, columns: Columns, asked: Asked) -> None:
    decode = _decoder(asked)
    with path.open("rb") as file:
        for row in range(found.samples):
            data = os.pread(file.fileno(), int(columns.size[row]), int(columns.offset[row]))
            extension = INPUT_EXTENSIONS[columns.extension[row]]
            try:
                found.types[decode(data, extension)] += 1
            except Unreadable as error:
                key = columns.keys[row]
                found.reason = found.reason or f"{shown(found.url)}, {key}: {error}"
                found.errors.append(ErrorRow(CORRUPT_INPUT, shown(found.url), key))


def _decoder(asked: Asked) -> Callable[[bytes, str], str]:
    """(bytes, their extension) -> type of the pixels, as training decodes them."""
    # Seconds of import, for workers that decode only.
    from maepretrain.data.images import CentreCrop, SignalCrop
    from maepretrain.data.samples import Pixels

    image = Pixels(asked.channels, CentreCrop(1, 1))
    signal = Pixels(asked.channels, SignalCrop(asked.length or 1))

    def decode(data: bytes, extension: str) -> str:
        if asked.length is not None:
            return str(signal.decode(data, extension).dtype)
        try:
            return str(image.decode(data, extension).dtype)
        except Unreadable:
            if extension not in ("npy", "txt"):
                raise
            return str(signal.decode(data, extension).dtype)

    return decode


# All shards.


def _partly_labelled(found: list[Found]) -> list[ErrorRow]:
    if not any(one.labels for one in found):
        return []
    return [
        ErrorRow(
            PARTLY_LABELLED, shown(one.url), f"{one.unlabelled} of {one.samples} have no label"
        )
        for one in found
        if one.unlabelled
    ]


def _mixed(found: list[Found]) -> list[ErrorRow]:
    """uint8 is scaled to 0..1 on the device and float is not: a batch cannot hold both."""
    types = sum((one.types for one in found), Counter())
    usual = types.most_common(1)[0][0] if types else ""
    return [
        ErrorRow(MIXED_INPUTS, shown(one.url), f"{number} are {name}, most others {usual}")
        for one in found
        for name, number in one.types.items()
        if name != usual
    ]


def _repeated_keys(found: list[Found], cache: ShardCache) -> list[ErrorRow]:
    """Each sample but the first of its key."""
    twice = _repeated([one.hashes for one in found])
    if not len(twice):
        return []
    places = defaultdict(list)
    for one in found:
        rows = np.flatnonzero(np.isin(np.frombuffer(one.hashes, "<u8"), twice))
        if len(rows):
            keys = _keys(one.url, cache)
            for row in rows:
                places[keys[row]].append(shown(one.url))
    return [
        ErrorRow(KEY_TWICE_IN_SHARD if url in urls[:n] else KEY_IN_TWO_SHARDS, url, key)
        for key, urls in places.items()
        for n, url in enumerate(urls)
        if n
    ]


def _repeated(hashes: list[bytes]) -> np.ndarray:
    """The hashes that occur more than once, sorted; a part of them at a time, to save memory."""
    repeated = []
    for part in range(16):
        some = [np.frombuffer(of_shard, "<u8") for of_shard in hashes]
        some = np.concatenate([np.empty(0, "<u8"), *(h[(h >> 60) == part] for h in some)])
        some.sort()
        repeated.append(some[1:][some[1:] == some[:-1]])
    return np.unique(np.concatenate(repeated))


def _keys(url: str, cache: ShardCache) -> tuple[str, ...]:
    if not is_remote(url):
        return scan(Path(url))[1].keys
    shard = open_remote(cache, url)
    return scan(cache.fetch(url, shard.bytes, shard.sha256))[1].keys


def _batch_errors(samples: int, world_size: int, global_batch: int | None) -> list[ErrorRow]:
    said = []
    if global_batch is None:
        if samples < world_size:
            said.append(f"{samples} samples are too few for {world_size} processes")
    else:
        if global_batch > samples:
            said.append(f"global batch {global_batch} is larger than the {samples} samples")
        if global_batch % world_size:
            said.append(f"global batch {global_batch} is not divisible by {world_size} processes")
    return [ErrorRow(BATCH, "", sentence) for sentence in said]


def _notes(
    found: list[Found],
    samples: int,
    world_size: int,
    num_workers: int,
    global_batch: int | None,
    classes: int | None,
) -> list[str]:
    notes = [reason for reason in (one.reason for one in found) if reason][:1]
    labels = {label for one in found for label in one.labels}
    if labels:
        number = classes or max(labels) + 1
        missing = number - sum(label < number for label in labels)
        if missing:  # a label may be any number up to 2**63
            named = islice((str(c) for c in count() if c not in labels), min(missing, NAMED))
            more = ", ..." if missing > NAMED else ""
            notes.append(
                f"{missing:,} of {number:,} classes have no sample: {', '.join(named)}{more}"
            )
    unindexed = sum(not one.indexed for one in found)
    if unindexed:
        notes.append(f"{unindexed:,} shards have no index; `maepretrain shards index` makes it")
    readers = world_size * max(1, num_workers)
    if readers > len(found):
        notes.append(
            f"{readers} readers share {len(found)} shards: that is well, a batch is cut by samples"
        )
    if global_batch is not None and samples >= global_batch and samples % global_batch:
        notes.append(f'{samples % global_batch:,} samples are left out of each epoch (tail "drop")')
    further = sum(one.further_inputs for one in found)
    if further:
        notes.append(f"{further:,} further images of a sample are passed over (KEY.a.png)")
    left_out = sum(one.left_out for one in found)
    if left_out:
        notes.append(f"{left_out:,} unreadable images were left out when the shards were written")
    return notes


def _totals(found: list[Found], samples: int, seconds: float) -> str:
    labels = {label for one in found for label in one.labels}
    classes = (
        f"labels {min(labels)}..{max(labels)}, {len(labels):,} classes" if labels else "no labels"
    )
    size = sum(one.size for one in found)
    return (
        f"{samples:,} samples in {len(found):,} shards ({size / 1e6:,.1f} MB), {classes}, "
        f"checked in {seconds:.1f} s"
    )


def show(report: Report) -> None:
    """Print a row for each kind of error, the notes and the totals."""
    # Paths of shards are longer than the 80 columns that a pipe is taken to have.
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000
    kinds: dict[str, list[ErrorRow]] = defaultdict(list)
    for error in report.errors:
        kinds[error.kind].append(error)
    if kinds:
        table = Table("kind", "how many", "first shard", "first example")
        for kind, errors in kinds.items():
            first = (Text(printable(t), overflow="fold") for t in (errors[0].shard, errors[0].key))
            table.add_row(kind, f"{len(errors):,}", *first)
        console.print(table)
    for line in (*report.notes, report.totals):
        console.print(Text(printable(line)))
