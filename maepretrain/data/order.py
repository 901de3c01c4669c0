"""The order of samples, computed where it is asked.

A pure function of (seed, epoch, samples per shard, global batch, streams, block, tail). A run is
one endless sequence of positions 0, 1, 2, ...; position p is sample p % B of global step p // B.
Who reads a position (rank, worker, micro-batch) is decided elsewhere (`sampler`), so a run can go
on anywhere with any number of processes.

    epoch      shards permuted; their samples form one sequence of N
    streams    the first T*B samples (T steps of batch B) are cut into L equal ranges; a shard may
               straddle two
    batch      B / L consecutive samples of every stream
    blocks     inside a stream, samples are shuffled within blocks, so that a reader keeps to few
               shards at a time; blocks of different streams begin at different steps, so that new
               shards are wanted one after the other

With `tail="drop"` T = N // B and the last N - T*B samples of the permuted sequence are left out
(others in every epoch); with `tail="pad"` T = ceil(N / B) and the sequence is continued from its
start. With `tail="carry"` all N are cut into streams (stream l ends at (l+1)*N // L), what
T = N // B whole batches leave of them comes after, stream by stream, and the next epoch begins in
the same batch.

A mixture draws a fixed number of samples from each source in every batch, and each source goes
through its own epochs, which end where they end ("carry").
"""

from functools import lru_cache
from math import gcd
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from maepretrain.randomness import key, permutation


def count_streams(global_batch: int, streams: int | None, block: int) -> int:
    """The number of streams of an order, which needs no shards to be known.

    Raises:
        ValueError: streams that do not divide the batch, or a setting out of range.
    """
    if global_batch < 1 or block < 1:
        raise ValueError(f"global batch {global_batch} and block {block} must be at least 1")
    streams = gcd(global_batch, 16) if streams is None else streams
    if streams < 1 or global_batch % streams:
        raise ValueError(f"global batch {global_batch} is not divisible by {streams} streams")
    return streams


class EpochOrder:
    """Maps positions in the run to (shard, sample).

    Args:
        counts: samples in each shard, int64, empty shards allowed.
        global_batch: samples per optimizer step, over all processes.
        seed: the order's seed.
        streams: equal ranges read side by side; must divide `global_batch`. None takes
            gcd(global_batch, 16).
        block: samples that are shuffled together inside a stream.
        tail: what happens to the samples left over when an epoch is no whole number of batches:
            "drop" or "pad"; "carry" is for the sources of a mixture.

    Raises:
        ValueError: no whole batch in an epoch, streams that do not divide the batch, or a setting
            out of range.
    """

    def __init__(
        self,
        counts: Int64[Tensor, "shards"],
        global_batch: int,
        seed: int = 0,
        streams: int | None = None,
        block: int = 8192,
        tail: Literal["drop", "pad", "carry"] = "drop",
    ) -> None:
        self.streams = count_streams(global_batch, streams, block)
        if tail not in ("drop", "pad", "carry"):
            raise ValueError(f'tail "{tail}" must be "drop" or "pad"')
        self.counts, self.global_batch, self.seed, self.block = counts, global_batch, seed, block
        self.samples = int(counts.sum())
        if self.samples == 0:
            raise ValueError("the shards hold no samples")
        up = self.samples % global_batch > 0 and tail == "pad"
        whole = self.steps_per_epoch = self.samples // global_batch + up
        if whole == 0 and tail != "carry":
            raise ValueError(
                f"global batch {global_batch} is larger than the {self.samples} samples: take a "
                f'smaller batch or tail: "pad"'
            )
        self.length = self.samples if tail == "carry" else whole * global_batch
        stream = torch.arange(self.streams + 1)
        self._stream_ends = stream * self.length // self.streams
        self._left_ends = self._stream_ends - stream * whole * (global_batch // self.streams)
        self._remember()

    def _remember(self) -> None:
        self._shards = lru_cache(2)(self._permute_shards)
        self._block = lru_cache(2 * self.streams)(self._permute_block)

    def __getstate__(self) -> dict[str, Any]:
        """The caches do not travel to another process."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_shards", "_block")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def left_over(self) -> int:
        """Samples dropped (positive) or repeated (negative) in each epoch."""
        return self.samples - self.length

    def describe(self) -> str:
        """Samples that an epoch leaves out or repeats."""
        if self.left_over > 0:
            return f"{self.left_over} left out of each epoch (no whole batch)"
        if self.left_over < 0:
            return f"{-self.left_over} repeated in each epoch to fill the last batch"
        return ""

    def _permute_shards(self, epoch: int) -> tuple[Tensor, Tensor]:
        shards = permutation(self.seed, "shards", len(self.counts), epoch)
        return shards, self.counts[shards].cumsum(0)

    def _first_of_block(self, stream: int, block: int) -> int:
        """Where a block begins in its stream: stream l's first block is l/L of a block shorter."""
        return max(0, block * self.block - stream * self.block // self.streams)

    def _permute_block(self, epoch: int, stream: int, block: int) -> Tensor:
        begin, end = self._first_of_block(stream, block), self._first_of_block(stream, block + 1)
        stream_length = int(self._stream_ends[stream + 1] - self._stream_ends[stream])
        return permutation(
            self.seed, "block", min(end, stream_length) - begin, epoch, stream, block
        )

    def locate(
        self, positions: Int64[Tensor, "n"]
    ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """(shard, sample in the shard) of each position of the run."""
        epoch, i = positions // self.length, positions % self.length
        slot = self._shuffle(epoch, *self._stream_of(i))
        shard, sample = torch.empty_like(positions), torch.empty_like(positions)
        for e in epoch.unique().tolist():
            here = epoch == e
            shards, ends = self._shards(e)
            # Each epoch begins elsewhere, or the last samples of shards would be left out most.
            begin = key(self.seed, "begin", e) % self.samples
            turned = (slot[here] + begin) % self.samples
            nth = torch.searchsorted(ends, turned, right=True)
            shard[here] = shards[nth]
            sample[here] = turned - (ends[nth] - self.counts[shards[nth]])
        return shard, sample

    def _stream_of(self, i: Int64[Tensor, "n"]) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """(stream, slot in the stream) that the i-th position of an epoch reads."""
        per_stream = self.global_batch // self.streams
        step, in_batch = i // self.global_batch, i % self.global_batch
        stream, in_stream = in_batch // per_stream, step * per_stream + in_batch % per_stream
        left = i - self.steps_per_epoch * self.global_batch
        if (left >= 0).any():
            of = torch.searchsorted(self._left_ends[1:], left, right=True)
            after = self.steps_per_epoch * per_stream + left - self._left_ends[of]
            stream, in_stream = torch.where(
                left >= 0, torch.stack([of, after]), torch.stack([stream, in_stream])
            )
        return stream, in_stream

    def _shuffle(
        self, epoch: Int64[Tensor, "n"], stream: Int64[Tensor, "n"], in_stream: Int64[Tensor, "n"]
    ) -> Int64[Tensor, "n"]:
        """The slot in the epoch's sequence of shards that stands at `in_stream` of a stream."""
        blocks_per_stream = self.length // self.streams // self.block + 3
        block = (in_stream + stream * self.block // self.streams) // self.block
        slot = torch.empty_like(in_stream)
        # A micro-batch touches few blocks, so each of them is looked up once.
        names, which = ((epoch * self.streams + stream) * blocks_per_stream + block).unique(
            return_inverse=True
        )
        for k, name in enumerate(names.tolist()):
            epoch_and_stream, b = divmod(name, blocks_per_stream)
            e, l = divmod(epoch_and_stream, self.streams)  # noqa: E741
            here, first = which == k, self._first_of_block(l, b)
            order = self._block(e, l, b)
            slot[here] = self._stream_ends[l] + first + order[in_stream[here] - first]
        return slot


class Mixture:
    """Draws from several sources by weight, to (shard, sample); shards are numbered through all
    sources.

    A batch holds the same number of samples of a source every time, as near to its weight as whole
    numbers come. A source's n-th draw is the n-th sample of its own endless order: each of its
    samples once in each of its own epochs, however often it is gone through.

    Args:
        sources: samples in each shard of each source, int64.
        weights: of the sources, > 0; only their ratios matter.
        global_batch: samples per optimizer step.
        samples_per_epoch: draws that are called an epoch; default as many as there are samples.
        seed: the order's seed.
        streams: ranges of a source read side by side; default 16, or as many of them as divide its
            draws.
        block: samples that are shuffled together inside a stream.

    Raises:
        ValueError: a weight that is not positive or gives no sample in a batch, an empty source, or
            an epoch without a whole batch.
    """

    def __init__(
        self,
        sources: list[Int64[Tensor, "..."]],
        weights: list[float],
        global_batch: int,
        samples_per_epoch: int | None = None,
        seed: int = 0,
        streams: int | None = None,
        block: int = 8192,
    ) -> None:
        if len(weights) != len(sources) or (streams is not None and streams < 1):
            raise ValueError(
                f"{len(sources)} sources need as many weights, not {weights}, and "
                f"streams {streams} must be at least 1"
            )
        self.global_batch = global_batch
        self.draws = _share_out(weights, global_batch)
        samples = sum(int(counts.sum()) for counts in sources)
        draws_per_epoch = samples if samples_per_epoch is None else samples_per_epoch
        self.steps_per_epoch = draws_per_epoch // global_batch
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"an epoch of {draws_per_epoch} draws holds no batch of {global_batch}"
            )
        self.orders = [
            _source_order(counts, draws, key(seed, "source", s), streams or 16, block)
            for s, (counts, draws) in enumerate(zip(sources, self.draws, strict=True))
        ]
        numbers = torch.tensor([len(counts) for counts in sources])
        self._first_shard = (numbers.cumsum(0) - numbers).tolist()
        # The sources are spread evenly over the batch, so that every rank reads a part of each.
        of, nth = zip(*((s, n) for s, d in enumerate(self.draws) for n in range(d)), strict=True)
        source, draw = torch.tensor(of), torch.tensor(nth)
        spread = ((draw + 0.5) / torch.tensor(self.draws)[source]).argsort(stable=True)
        self._source, self._draw = source[spread], draw[spread]

    def describe(self) -> str:
        """Samples of a batch from each source."""
        parts = " + ".join(str(draws) for draws in self.draws)
        draws = self.steps_per_epoch * self.global_batch
        return f"a batch is {parts} of the sources, an epoch {draws:,} draws"

    def locate(
        self, positions: Int64[Tensor, "n"]
    ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """(shard, sample in the shard) of each position of the run."""
        step, i = positions // self.global_batch, positions % self.global_batch
        source, draw = self._source[i], self._draw[i]
        shard, sample = torch.empty_like(positions), torch.empty_like(positions)
        for s in source.unique().tolist():
            here = source == s
            in_source, sample[here] = self.orders[s].locate(step[here] * self.draws[s] + draw[here])
            shard[here] = in_source + self._first_shard[s]
        return shard, sample


Order = EpochOrder | Mixture


def _share_out(weights: list[float], total: int) -> list[int]:
    """Whole numbers in the ratio of the weights that sum to `total` (largest remainders)."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights {weights} of the sources must be positive numbers")
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: shares[s] - exact[s])
    for s in by_remainder[: total - sum(shares)]:
        shares[s] += 1
    if min(shares) < 1:
        raise ValueError(
            f"weight {weights[shares.index(min(shares))]} of {weights} gives no sample in a batch "
            f"of {total}: take a larger weight or batch"
        )
    return shares


def _source_order(
    counts: Int64[Tensor, "shards"], draws: int, seed: int, streams: int, block: int
) -> EpochOrder:
    """The endless order of one source of a mixture."""
    side_by_side = gcd(draws, streams)
    if 2 * side_by_side >= streams:
        return EpochOrder(counts, draws, seed, side_by_side, block, "carry")
    # Few streams would shuffle badly: the draws go round all streams instead, so that every rank
    # reads of each.
    return EpochOrder(counts, streams, seed, streams, block, "carry")
