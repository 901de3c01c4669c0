"""The order of samples, computed where it is asked.

A pure function of (seed, epoch, samples per shard, global batch, lanes, block, tail). A run is one
endless stream of positions 0, 1, 2, ...; position p is sample p % B of global step p // B. Who
reads a position (rank, worker, micro-batch) is not this file's business, so a run can go on
anywhere with any number of processes.

    epoch      shards permuted; their samples form one sequence of N
    lanes      the first T*B samples (T steps of batch B) are cut into L equal ranges; a shard may
               straddle two
    batch      B / L consecutive samples of every lane
    blocks     inside a lane, samples are shuffled within blocks, so that a reader keeps to few
               shards at a time

With `tail="drop"` T = N // B and the last N - T*B samples of the permuted sequence are left out
(others in every epoch); with `tail="pad"` T = ceil(N / B) and the sequence is continued from its
start.
"""

from functools import lru_cache
from math import gcd
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from maepretrain.randomness import permutation


class EpochOrder:
    """Maps positions in the run to (shard, member).

    Args:
        counts: samples in each shard, int64, empty shards allowed.
        global_batch: samples per optimizer step, over all processes.
        seed: the order's seed.
        lanes: equal ranges read side by side; must divide `global_batch`. None takes
            gcd(global_batch, 16).
        block: samples that are shuffled together inside a lane.
        tail: what happens to the samples left over when an epoch is no whole number of batches.

    Raises:
        ValueError: no whole batch in an epoch, lanes that do not divide the batch, or a setting out
            of range.
    """

    def __init__(
        self,
        counts: Int64[Tensor, "shards"],
        global_batch: int,
        seed: int = 0,
        lanes: int | None = None,
        block: int = 8192,
        tail: Literal["drop", "pad"] = "drop",
    ) -> None:
        if global_batch < 1 or block < 1:
            raise ValueError(f"global batch {global_batch} and block {block} must be at least 1")
        if tail not in ("drop", "pad"):
            raise ValueError(f'tail "{tail}" must be "drop" or "pad"')
        self.counts, self.global_batch, self.seed, self.block = counts, global_batch, seed, block
        self.samples = int(counts.sum())
        self.lanes = gcd(global_batch, 16) if lanes is None else lanes
        if self.lanes < 1 or global_batch % self.lanes:
            raise ValueError(f"global batch {global_batch} is not divisible by {self.lanes} lanes")
        if self.samples == 0:
            raise ValueError("the shards hold no samples")
        whole = self.samples // global_batch if tail == "drop" else -(-self.samples // global_batch)
        if whole == 0:
            raise ValueError(
                f"global batch {global_batch} is larger than the {self.samples} samples: take a "
                f'smaller batch or tail: "pad"'
            )
        self.steps_per_epoch = whole
        self.lane_length = whole * global_batch // self.lanes
        self._remember()

    def _remember(self) -> None:
        self._shards = lru_cache(2)(self._permute_shards)
        self._block = lru_cache(2 * self.lanes)(self._permute_block)

    def __getstate__(self) -> dict[str, Any]:
        """What is remembered does not travel to another process."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_shards", "_block")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def left_over(self) -> int:
        """Samples dropped (positive) or repeated (negative) in each epoch."""
        return self.samples - self.steps_per_epoch * self.global_batch

    def _permute_shards(self, epoch: int) -> tuple[Tensor, Tensor]:
        shards = permutation(self.seed, "shards", len(self.counts), epoch)
        return shards, self.counts[shards].cumsum(0)

    def _permute_block(self, epoch: int, lane: int, block: int) -> Tensor:
        size = min(self.block, self.lane_length - block * self.block)
        return permutation(self.seed, "block", size, epoch, lane, block)

    def locate(
        self, positions: Int64[Tensor, "n"]
    ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]]:
        """(shard, member in the shard) of each position of the run."""
        global_step, i = positions // self.global_batch, positions % self.global_batch
        epoch, step = global_step // self.steps_per_epoch, global_step % self.steps_per_epoch
        per_lane = self.global_batch // self.lanes
        lane, in_lane = i // per_lane, step * per_lane + i % per_lane
        place = self._shuffle(epoch, lane, in_lane) % self.samples
        shard, member = torch.empty_like(positions), torch.empty_like(positions)
        for e in epoch.unique().tolist():
            here = epoch == e
            shards, ends = self._shards(e)
            nth = torch.searchsorted(ends, place[here], right=True)
            shard[here] = shards[nth]
            member[here] = place[here] - (ends[nth] - self.counts[shards[nth]])
        return shard, member

    def _shuffle(
        self, epoch: Int64[Tensor, "n"], lane: Int64[Tensor, "n"], in_lane: Int64[Tensor, "n"]
    ) -> Int64[Tensor, "n"]:
        """The place in the epoch's sequence of shards that stands at `in_lane` of a lane."""
        blocks_per_lane = -(-self.lane_length // self.block)
        block = in_lane // self.block
        place = torch.empty_like(in_lane)
        # A micro-batch touches few blocks, so each of them is looked up once.
        names, which = ((epoch * self.lanes + lane) * blocks_per_lane + block).unique(
            return_inverse=True
        )
        for k, name in enumerate(names.tolist()):
            epoch_and_lane, b = divmod(name, blocks_per_lane)
            e, l = divmod(epoch_and_lane, self.lanes)  # noqa: E741
            here = which == k
            order = self._block(e, l, b)
            place[here] = l * self.lane_length + b * self.block + order[in_lane[here] % self.block]
        return place
