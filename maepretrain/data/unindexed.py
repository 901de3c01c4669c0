"""Streaming by webdataset's own pipeline, for sources that cannot be indexed (`pipe:`).

Every reader (a loader process of a rank) goes through its share of the shards, in another order
each time, and shuffles samples in a buffer. No step waits for another reader and none ends early,
but a sample may come twice in an epoch or not at all, and a resume does not go on with the samples
that were due. Positions, and with them crops and masks, are those of the exact stream.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import fsspec
import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from maepretrain.data.batch import Batch
from maepretrain.data.errors import DAMAGED_SHARD, ErrorList, ErrorRow, ShardError, Unreadable
from maepretrain.data.sampler import RunSampler
from maepretrain.data.samples import Pixels
from maepretrain.data.shards.patterns import expand
from maepretrain.data.shards.tar import INPUT_EXTENSIONS, NO_LABEL, TAR_HEADER, label_of
from maepretrain.data.stores.remote import shown
from maepretrain.randomness import key, permutation

# Samples among which the next one is drawn.
BUFFER = 1000


def unindexed_sources(patterns: str | list[str], allow_pipe: bool) -> list[str]:
    """Addresses of shards, `pipe:` commands among them where they are allowed.

    Raises:
        ShardError: a command that was not allowed, or a pattern that names nothing.
    """
    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern.startswith("pipe:"):
            urls += expand(pattern)
        elif allow_pipe:
            urls += braceexpand(pattern)
        else:
            raise ShardError(
                f"{pattern} runs a command in a shell: allow it by --data.order.allow_pipe"
            )
    return urls


def _input_of(files: Iterable[str]) -> str:
    """The extension of a sample's input: beside an image a text is its caption."""
    inputs = [extension for extension in files if extension in INPUT_EXTENSIONS]
    for extension in inputs:
        if extension != "txt":
            return extension
    return inputs[0]


@dataclass(frozen=True)
class UnindexedOrder:
    """Stands for an order: an epoch is a number of draws."""

    global_batch: int
    samples_per_epoch: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} holds no batch of {self.global_batch}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a batch each."""
        return self.samples_per_epoch // self.global_batch

    def describe(self) -> str:
        """A line for the start of a run."""
        return (
            f"an epoch is {self.samples_per_epoch:,} draws by webdataset's pipeline; "
            "exact resume is off"
        )


class UnindexedBatches(IterableDataset[Batch]):
    """Batches of one rank, from the position on at which the stream starts.

    Args:
        urls: the shards, `pipe:` commands too.
        sampler: which positions this rank reads.
        pixels: from bytes to what the model is given.
        seed: of the order.
        crops: of each image, one after the other.
        errors: the run's list; a shard that cannot be read to its end is listed and left.
    """

    def __init__(
        self,
        urls: list[str],
        sampler: RunSampler,
        pixels: Pixels,
        seed: int,
        crops: int,
        errors: ErrorList,
    ) -> None:
        self.urls, self.sampler, self.pixels = urls, sampler, pixels
        self.seed, self.crops, self.errors = seed, crops, errors

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.sampler.rank * workers + number, self.sampler.world_size * workers
        samples = self._samples(reader, readers)
        for i, positions in enumerate(self.sampler):
            if i % workers == number:  # the loader takes its processes' batches in turn
                yield self._batch(samples, torch.tensor(positions, dtype=torch.int64))

    def _batch(self, samples: Iterator[tuple[Tensor, int]], position: Tensor) -> Batch:
        inputs, labels = [], []
        numbers = self.pixels.numbers(position)
        for i in range(0, len(numbers), self.crops):
            decoded, label = next(samples)
            inputs += [self.pixels.cut_out(decoded, u) for u in numbers[i : i + self.crops]]
            labels += [label] * self.crops
        return {
            "input": default_collate(inputs),  # in a loader process, straight to shared memory
            "position": position,
            "label": torch.tensor(labels),
            "error": torch.zeros(len(position), 2, dtype=torch.int64),
        }

    def _samples(self, reader: int, readers: int) -> Iterator[tuple[Tensor, int]]:
        """Decoded inputs and labels, pass after pass over the reader's shards."""
        share = slice(reader, None, readers) if len(self.urls) >= readers else slice(None)
        for turn in count():
            order = permutation(self.seed, "plain", len(self.urls), turn, self.sampler.start)
            place = key(self.seed, "plain", self.sampler.start, reader, turn)
            found = False
            for files in self._samples_of(order.tolist()[share], random.Random(place)):
                extension = _input_of(files)
                try:
                    decoded = self.pixels.decode(files[extension], extension)
                except Unreadable as error:
                    self._list(error.kind, files["__url__"], files["__key__"])
                    continue
                found = True
                yield decoded, max(NO_LABEL, label_of(files.get))
            if not found:
                raise ShardError(
                    f"no sample can be read from {shown(self.urls[0])} and what follows it"
                )

    def _samples_of(self, shards: list[int], numbers: random.Random) -> Iterator[dict[str, Any]]:
        """The samples of the shards that have an input, shuffled."""
        # webdataset takes two seconds to import, and only this way of reading needs it.
        from webdataset import filters, tariterators

        opened = self._open([self.urls[shard] for shard in shards])
        files = tariterators.tar_file_expander(opened, handler=self._give_up)
        samples = tariterators.group_by_keys(files, handler=self._give_up)
        with_input = (s for s in samples if any(e in s for e in INPUT_EXTENSIONS))
        yield from cast(Any, filters.shuffle(BUFFER, rng=numbers))(with_input)

    def _open(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        from webdataset.gopen import gopen

        for url in urls:
            try:
                # webdataset would hand remote addresses, too, to a shell.
                is_command = url.startswith("pipe:")
                opened = gopen(url) if is_command else cast(Any, fsspec.open(url)).open()
            except Exception as error:
                self._list(DAMAGED_SHARD, url, str(error))
                continue
            with cast(Any, opened):
                watched = _Watched(opened)
                yield {"url": url, "stream": watched}
                if watched.is_cut:
                    self._list(DAMAGED_SHARD, url, "the zeros that close a tar are missing")

    def _give_up(self, error: Exception) -> bool:
        url = next((a for a in error.args[::-1] if isinstance(a, str)), "")
        self._list(DAMAGED_SHARD, url, str(error.args[0] if error.args else error))
        return True

    def _list(self, kind: str, url: str, what: str) -> None:
        self.errors.add([ErrorRow(kind, shown(url), what)])


class _Watched:
    """A tar being read, of which tarfile takes a cut between two files for its end."""

    def __init__(self, file: Any) -> None:
        self.file, self.begin, self.end = file, b"", b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.begin = (self.begin + data[:TAR_HEADER])[:TAR_HEADER]
        self.end = (self.end + data)[-TAR_HEADER:]
        return data

    @property
    def is_cut(self) -> bool:
        """True where an uncompressed tar ended without zeros."""
        return self.begin[257:262] == b"ustar" and any(self.end)
