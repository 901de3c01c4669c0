"""Who reads which positions: the batch samplers of one process."""

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler


class RunSampler(Sampler[list[int]]):
    """The micro-batches of one rank for the whole run, from the sample `start` on.

    Global step g holds positions g*B .. (g+1)*B - 1. Rank r owns the r-th of W equal parts of it,
    and its micro-batch m the m-th of A equal parts of that, so world size and accumulation change
    who reads what and never what a step reads. `announce(step)` is called before the batches of a
    step are given out.
    """

    def __init__(
        self, global_batch: int, steps: int, world_size: int, rank: int, accumulation: int
    ) -> None:
        if global_batch % (world_size * accumulation):
            raise ValueError(
                f"batch {global_batch} is not divisible by {world_size} processes x {accumulation} "
                f"accumulation steps"
            )
        self.global_batch, self.steps = global_batch, steps
        self.world_size, self.rank, self.accumulation = world_size, rank, accumulation
        self.start = 0
        self.announce: Callable[[int], None] | None = None

    @property
    def micro_batch(self) -> int:
        """Samples in one forward pass of one process."""
        return self.global_batch // (self.world_size * self.accumulation)

    def __len__(self) -> int:
        # The whole run, also after a resume: Lightning compares it with the batches done in all.
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start * self.accumulation // self.global_batch
        for micro_step in range(first, len(self)):
            step, m = divmod(micro_step, self.accumulation)
            if self.announce is not None and (m == 0 or micro_step == first):
                self.announce(step)
            begin = self.positions(step).start + m * self.micro_batch
            yield list(range(begin, begin + self.micro_batch))

    def positions(self, step: int) -> range:
        """The positions of a global step that this rank reads."""
        per_rank = self.global_batch // self.world_size
        begin = step * self.global_batch + self.rank * per_rank
        return range(begin, begin + per_rank)


class EvaluationSampler(Sampler[list[int]]):
    """Validation: samples 0..n-1 in order, an equal number of batches on every rank.

    What is left when n is no multiple of the world size (fewer samples than processes) is left out;
    `dropped` says how many.
    """

    def __init__(self, samples: int, batch: int, world_size: int = 1, rank: int = 0) -> None:
        self.per_rank, self.dropped = divmod(samples, world_size)
        self.batch, self.rank = batch, rank

    def __len__(self) -> int:
        return -(-self.per_rank // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.rank * self.per_rank
        for i in range(0, self.per_rank, self.batch):
            yield list(range(begin + i, begin + min(i + self.batch, self.per_rank)))
