"""Which remote shards a rank needs next: fetched before their samples are due."""

import torch

from maepretrain.data.sampler import RunSampler
from maepretrain.data.samples import Samples
from maepretrain.data.stores.read_ahead import ReadAhead
from maepretrain.data.stores.remote import is_remote


class Announcer:
    """Asks for the shards of the next quarter of a block, in the rank's own process.

    Args:
        samples: of the run.
        sampler: which positions this rank reads.
        ahead: fetches shards in the background.
        in_blocks: samples in one block of all streams together.
    """

    def __init__(
        self, samples: Samples, sampler: RunSampler, ahead: ReadAhead, in_blocks: int
    ) -> None:
        self.samples = samples
        self.sampler = sampler
        self.ahead = ahead
        self.horizon = max(2, in_blocks // (4 * sampler.global_batch))
        self.every = max(1, self.horizon // 4)
        self.last: int | None = None

    def __call__(self, step: int) -> None:
        """A step's batches are about to be given out."""
        if self.last is not None and step < self.last + self.every:
            return
        self.last = step
        positions: list[int] = []
        for coming in range(step, min(step + self.horizon, self.sampler.steps)):
            positions += self.sampler.positions(coming)[:: self.samples.crops]
        shards = self.samples.shards(torch.tensor(positions, dtype=torch.int64))
        remote = [shard for shard in shards if is_remote(shard.url)]
        self.ahead.want([(shard.url, shard.bytes, shard.sha256) for shard in remote])
