"""Errors in shards, found before a run meets them: behind `maepretrain shards check`.

Each shard is read anew by a worker process: its headers, its checksum, every input. What concerns
all shards (keys that come twice, labels, batch and processes) is put together afterwards; of a key
only a hash of 8 bytes is kept until then, so a billion samples take some 10 GB.
"""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maepretrain.data.check_shard import Criteria, ShardContents, check_shard
from maepretrain.data.errors import ErrorRow, printable
from maepretrain.data.shards.index import open_remote
from maepretrain.data.shards.parallel import in_processes, progress
from maepretrain.data.shards.patterns import expand
from maepretrain.data.shards.tar import scan
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote, shown

PARTLY_LABELLED = "shard with unlabelled samples"
KEY_TWICE_IN_SHARD = "key twice in a shard"
KEY_IN_TWO_SHARDS = "key in two shards"
MIXED_INPUTS = "inputs of several types"
BATCH = "batch and processes"
# So many classes without samples are named.
NAMED = 10


@dataclass
class Report:
    """The result of a check: errors, notes, and a line of totals."""

    errors: list[ErrorRow]
    notes: list[str]
    totals: str


def check_shards(
    patterns: list[str],
    criteria: Criteria,
    world_size: int = 1,
    num_workers: int = 1,
    global_batch: int | None = None,
    workers: int = 1,
    cache: ShardCache | None = None,
) -> Report:
    """Read all shards and report what a run would meet.

    Args:
        patterns: shards, as for `open_shards`.
        criteria: what to look for in a shard.
        world_size: processes of the run.
        num_workers: loader processes of each.
        global_batch: samples of the run's batch.
        workers: processes that check, side by side.
        cache: where remote shards are kept.

    Raises:
        ShardError: a pattern that names nothing.
        ValueError: a number below 1.
    """
    numbers = {
        "world_size": world_size,
        "global_batch": global_batch,
        "workers": workers,
        "channels": criteria.channels,
        "classes": criteria.classes,
        "length": criteria.length,
    }
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} {number} must be at least 1")
    begin = time.perf_counter()
    cache = cache or ShardCache()
    urls = expand(patterns, cache)
    checked = in_processes(partial(check_shard, criteria, cache), urls, workers)
    shards = list(progress(checked, "checking shards", len(urls)))
    samples = sum(shard.samples for shard in shards)
    errors = [error for shard in shards for error in shard.errors]
    errors += _partly_labelled(shards)
    errors += _mixed(shards)
    errors += _repeated_keys(shards, cache)
    errors += _batch_errors(samples, world_size, global_batch)
    notes = [
        *_first_reason(shards),
        *_missing_classes(shards, criteria.classes),
        *_notes_on_reading(shards, samples, world_size * max(1, num_workers), global_batch),
        *_notes_on_writing(shards),
    ]
    return Report(errors, notes, _totals(shards, samples, time.perf_counter() - begin))


def _partly_labelled(shards: list[ShardContents]) -> list[ErrorRow]:
    if not any(shard.labels for shard in shards):
        return []
    return [
        ErrorRow(
            PARTLY_LABELLED,
            shown(shard.url),
            f"{shard.unlabelled} of {shard.samples} have no label",
        )
        for shard in shards
        if shard.unlabelled
    ]


def _mixed(shards: list[ShardContents]) -> list[ErrorRow]:
    """uint8 is scaled to 0..1 on the device and float is not: a batch cannot hold both."""
    types = sum((shard.types for shard in shards), Counter())
    usual = types.most_common(1)[0][0] if types else ""
    return [
        ErrorRow(MIXED_INPUTS, shown(shard.url), f"{number} are {name}, most others {usual}")
        for shard in shards
        for name, number in shard.types.items()
        if name != usual
    ]


def _repeated_keys(shards: list[ShardContents], cache: ShardCache) -> list[ErrorRow]:
    """Each sample but the first of its key."""
    repeated = _repeated([shard.hashes for shard in shards])
    if not len(repeated):
        return []
    holders: dict[str, list[str]] = defaultdict(list)
    errors: dict[str, list[ErrorRow]] = defaultdict(list)
    for shard in shards:
        rows = np.flatnonzero(np.isin(np.frombuffer(shard.hashes, "<u8"), repeated))
        if not len(rows):
            continue
        keys = _keys(shard.url, cache)
        url = shown(shard.url)
        for key in (keys[row] for row in rows):
            if holders[key]:
                kind = KEY_TWICE_IN_SHARD if url in holders[key] else KEY_IN_TWO_SHARDS
                errors[key].append(ErrorRow(kind, url, key))
            holders[key].append(url)
    return [error for key in holders for error in errors[key]]


def _repeated(hashes: list[bytes]) -> np.ndarray:
    """The hashes that occur more than once, sorted; a part of them at a time, to save memory."""
    repeated = [np.empty(0, "<u8")]
    for part in range(16):
        of_part = [np.empty(0, "<u8")]
        for of_shard in hashes:
            numbers = np.frombuffer(of_shard, "<u8")
            of_part.append(numbers[(numbers >> 60) == part])
        ordered = np.sort(np.concatenate(of_part))
        repeated.append(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.unique(np.concatenate(repeated))


def _keys(url: str, cache: ShardCache) -> tuple[str, ...]:
    if not is_remote(url):
        return scan(Path(url))[1].keys
    shard = open_remote(cache, url)
    return scan(cache.fetch(url, shard.bytes, shard.sha256))[1].keys


def _batch_errors(samples: int, world_size: int, global_batch: int | None) -> list[ErrorRow]:
    sentences = []
    if global_batch is None:
        if samples < world_size:
            sentences.append(f"{samples} samples are too few for {world_size} processes")
    else:
        if global_batch > samples:
            sentences.append(f"global batch {global_batch} is larger than the {samples} samples")
        if global_batch % world_size:
            sentences.append(
                f"global batch {global_batch} is not divisible by {world_size} processes"
            )
    return [ErrorRow(BATCH, "", sentence) for sentence in sentences]


def _first_reason(shards: list[ShardContents]) -> list[str]:
    """Why the first input that cannot be decoded cannot."""
    return [shard.reason for shard in shards if shard.reason][:1]


def _missing_classes(shards: list[ShardContents], classes: int | None) -> list[str]:
    labels = {label for shard in shards for label in shard.labels}
    if not labels:
        return []
    number = classes or max(labels) + 1
    missing = number - sum(label < number for label in labels)
    if not missing:
        return []
    # A label may be any number up to 2**63: not all are gone through.
    without_sample = (str(label) for label in count() if label not in labels)
    named = ", ".join(islice(without_sample, min(missing, NAMED)))
    more = ", ..." if missing > NAMED else ""
    return [f"{missing:,} of {number:,} classes have no sample: {named}{more}"]


def _notes_on_reading(
    shards: list[ShardContents], samples: int, readers: int, global_batch: int | None
) -> list[str]:
    notes = []
    unindexed = sum(not shard.indexed for shard in shards)
    if unindexed:
        notes.append(f"{unindexed:,} shards have no index; `maepretrain shards index` makes it")
    if readers > len(shards):
        notes.append(
            f"{readers} readers share {len(shards)} shards: that is well, a batch is cut by samples"
        )
    if global_batch is not None and samples >= global_batch and samples % global_batch:
        notes.append(f'{samples % global_batch:,} samples are left out of each epoch (tail "drop")')
    return notes


def _notes_on_writing(shards: list[ShardContents]) -> list[str]:
    notes = []
    further = sum(shard.further_inputs for shard in shards)
    if further:
        notes.append(f"{further:,} further images of a sample are passed over (KEY.a.png)")
    left_out = sum(shard.left_out for shard in shards)
    if left_out:
        notes.append(f"{left_out:,} unreadable images were left out when the shards were written")
    return notes


def _totals(shards: list[ShardContents], samples: int, seconds: float) -> str:
    labels = {label for shard in shards for label in shard.labels}
    classes = (
        f"labels {min(labels)}..{max(labels)}, {len(labels):,} classes" if labels else "no labels"
    )
    size = sum(shard.size for shard in shards)
    return (
        f"{samples:,} samples in {len(shards):,} shards ({size / 1e6:,.1f} MB), {classes}, "
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
