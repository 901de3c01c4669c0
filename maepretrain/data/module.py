"""The LightningDataModule: shards in, batches of uint8 images out, resumable at any step.

The whole run is one Lightning epoch over a stream of micro-batches; epochs are counted by
`EpochOrder`. That is what makes a resume exact: the position of the stream is the number of samples
that the training loop consumed, and nothing else.
"""

import zlib
from collections.abc import Iterator
from typing import Any, Literal, cast

import lightning as L
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maepretrain.data.images import UNIFORMS, Augment, CentreCrop, decode
from maepretrain.data.order import EpochOrder
from maepretrain.data.shards import Columns, Shard, open_shards, summary
from maepretrain.data.store import LocalStore
from maepretrain.randomness import uniform

Batch = dict[str, Tensor]

# Of so many shards a reader keeps the columns: more than the lanes of a batch touch at a time.
REMEMBERED_SHARDS = 256


class ShardIndex:
    """All samples of the shards, addressed by (shard, member) or by one number.

    Numbers go through the shards in their order. Columns are read when first needed.

    Args:
        shards: the shards in the order of their patterns.
        chosen: int64 numbers of the samples to keep (a labelled fraction, say); None keeps all.
            Kept samples are numbered anew: by shard, then in the order given.

    Raises:
        ValueError: a chosen number that no sample has.
    """

    def __init__(self, shards: list[Shard], chosen: Int64[Tensor, "n"] | None = None) -> None:
        self.shards = shards
        self._columns: dict[int, Columns] = {}
        counts = torch.tensor([shard.samples for shard in shards], dtype=torch.int64)
        self._first_of_all = counts.cumsum(0) - counts
        self._chosen: Tensor | None = None
        if chosen is not None:
            _check_range(chosen, int(counts.sum()))
            shard = torch.searchsorted(counts.cumsum(0), chosen, right=True)
            self._chosen = chosen[shard.argsort(stable=True)]
            counts = torch.bincount(shard, minlength=len(shards))
        self.counts = counts
        self._ends = counts.cumsum(0)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def choose(self, numbers: Int64[Tensor, "n"]) -> "ShardIndex":
        """An index of some of these samples only."""
        if self._chosen is not None:
            _check_range(numbers, len(self))
            numbers = self._chosen[numbers]
        return ShardIndex(self.shards, numbers)

    def columns(self, shard: int) -> Columns:
        """The columns of a shard; the last ones are remembered."""
        if shard not in self._columns:
            if len(self._columns) >= REMEMBERED_SHARDS:
                del self._columns[next(iter(self._columns))]
            self._columns[shard] = self.shards[shard].columns()
        return self._columns[shard]

    def rows(self, shard: Int64[Tensor, "n"], member: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
        """The row of each member in the columns of its shard."""
        if self._chosen is None:
            return member
        return self._chosen[(self._ends - self.counts)[shard] + member] - self._first_of_all[shard]

    def place(self, number: Int64[Tensor, "n"]) -> tuple[Tensor, Tensor]:
        """(shard, member) of samples numbered through all shards.

        Raises:
            IndexError: a number that no sample has.
        """
        if len(number) and not 0 <= int(number.min()) <= int(number.max()) < len(self):
            raise IndexError(f"sample {int(number.max())} is not one of {len(self)}")
        shard = torch.searchsorted(self._ends, number, right=True)
        return shard, number - (self._ends - self.counts)[shard]

    def labels(self) -> Int64[Tensor, "n"]:
        """The label of every sample in order, -1 where there is none."""
        labels = [torch.empty(0, dtype=torch.int64)]
        for s, count in enumerate(self.counts.tolist()):
            if count:
                column = torch.from_numpy(self.columns(s).label.astype("int64"))
                labels.append(column[self.rows(torch.full((count,), s), torch.arange(count))])
        return torch.cat(labels)


def _check_range(numbers: Int64[Tensor, "n"], samples: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < samples:
        raise ValueError(
            f"chosen samples {int(numbers.min())}..{int(numbers.max())} must be in 0..{samples - 1}"
        )


class Samples(Dataset[Batch]):
    """Position -> sample.

    With an order, positions of the run and random crops; without, plain numbers and centre crops.
    """

    def __init__(
        self,
        index: ShardIndex,
        channels: int,
        augment: Augment | CentreCrop,
        order: EpochOrder | None = None,
        seed: int = 0,
    ) -> None:
        self.index, self.channels, self.augment = index, channels, augment
        self.order, self.seed = order, seed
        self.store = LocalStore()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> Batch:
        """A whole batch.

        `input` uint8 (b, c, h, w), `position` int64 (b,), `label` int64 (b,), -1 without one.
        """
        position = torch.tensor(positions, dtype=torch.int64)
        numbers = uniform(self.seed, "crop", position, UNIFORMS).unbind()
        augment, images, labels = self.augment, [], []
        for (s, row), u in zip(self._locate(position), numbers, strict=True):
            columns, path = self.index.columns(s), self.index.shards[s].path
            data = self.store.read(path, int(columns.offset[row]), int(columns.size[row]))
            try:
                image = decode(data, self.channels)
            except ValueError as error:
                raise ValueError(f"{path}, sample {columns.keys[row]}: {error}") from error
            images.append(augment(image, u) if isinstance(augment, Augment) else augment(image))
            labels.append(int(columns.label[row]))
        return {"input": torch.stack(images), "position": position, "label": torch.tensor(labels)}

    def keys(self, positions: list[int]) -> list[str]:
        """The sample keys at these positions."""
        places = self._locate(torch.tensor(positions, dtype=torch.int64))
        return [self.index.columns(s).keys[row] for s, row in places]

    def _locate(self, position: Int64[Tensor, "n"]) -> list[tuple[int, int]]:
        """(shard, row in its columns) of each position."""
        locate = self.index.place if self.order is None else self.order.locate
        shard, member = locate(position)
        return list(zip(shard.tolist(), self.index.rows(shard, member).tolist(), strict=True))


class Stream(Sampler[list[int]]):
    """The micro-batches of one rank for the whole run, from the sample `start` on.

    Global step g holds positions g*B .. (g+1)*B - 1. Rank r owns the r-th of W equal parts of it,
    and its micro-batch m the m-th of A equal parts of that, so world size and accumulation change
    who reads what and never what a step reads.
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
            begin = (
                step * self.global_batch + (self.rank * self.accumulation + m) * self.micro_batch
            )
            yield list(range(begin, begin + self.micro_batch))


class Numbered(Sampler[list[int]]):
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


def _as_batch(batch: Batch) -> Batch:
    return batch


class ShardData(L.LightningDataModule):
    """Images from WebDataset shards for training and validation.

    Args:
        train: shard patterns: braces (`a-{000..011}.tar`), globs, files; one or a list.
        val: patterns of held-out shards, or null for no validation.
        global_batch: samples per optimizer step over all processes and accumulated micro-batches.
        image_size: side of the square images given to the model, or [height, width].
        channels: 1 (gray) or 3 (RGB).
        scale: area of the random crop as a share of the image; null resizes the whole image.
        ratio: aspect ratio of the random crop.
        flip: probability of a horizontal flip.
        val_share: side of the centre crop in validation as a share of the image's fitting side.
            Default .875 (256 then 224), or 1 where training sees whole images (scale null).
        mean: per channel, of pixels in 0..1, subtracted on the device.
        std: per channel, of pixels in 0..1, divided by on the device.
        seed: seed of order and crops.
        lanes: equal sample ranges read side by side; must divide global_batch. Default
            gcd(global_batch, 16).
        block: samples shuffled together inside a lane.
        tail: "drop" leaves out what is no whole batch at an epoch's end, "pad" repeats samples.
        num_workers: loader processes per rank; 0 loads in the training process.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        global_batch: int = 256,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        scale: tuple[float, float] | None = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        val_share: float | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        seed: int = 0,
        lanes: int | None = None,
        block: int = 8192,
        tail: Literal["drop", "pad"] = "drop",
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean {mean} and std {std} need one value for each of {channels} channels"
            )
        self.channels, self.mean, self.std, self.seed = channels, mean, std, seed
        self.num_workers, self.global_batch = num_workers, global_batch
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.augment = Augment(height, width, scale, ratio, flip)
        if val_share is None:
            val_share = 1.0 if scale is None else 0.875
        self.centre_crop = CentreCrop(height, width, val_share)
        self.index = ShardIndex(open_shards(train, max(1, num_workers)))
        self.val_index = ShardIndex(open_shards(val, max(1, num_workers))) if val else None
        self._order_arguments = (seed, lanes, block, tail)
        self.order = self._make_order()
        self.stream: Stream | None = None
        self._resume_from = 0

    def _make_order(self) -> EpochOrder:
        seed, lanes, block, tail = self._order_arguments
        return EpochOrder(self.index.counts, self.global_batch, seed, lanes, block, tail)

    def choose(self, chosen: Int64[Tensor, "n"]) -> None:
        """Train on these samples only (numbered through all training shards)."""
        self.index = self.index.choose(chosen)
        self.order = self._make_order()

    def plan(self, steps: int, world_size: int, accumulation: int) -> None:
        """Fix the length of the run and check that the processes divide the batch."""
        self.stream = Stream(self.global_batch, steps, world_size, 0, accumulation)

    def describe(self) -> str:
        """What is read, and what an epoch leaves out or repeats."""
        line = summary(self.index.shards)
        if len(self.index) != sum(shard.samples for shard in self.index.shards):
            line += f", {len(self.index):,} chosen"
        left = self.order.left_over
        if left > 0:
            line += f"; {left} left out of each epoch (no whole batch)"
        return line + (
            f"; {-left} repeated in each epoch to fill the last batch" if left < 0 else ""
        )

    def describe_held_out(self, world_size: int) -> str:
        """What validation reads, and what it leaves out so that all processes take equal steps."""
        if self.val_index is None:
            return "none"
        dropped = Numbered(len(self.val_index), 1, world_size).dropped
        return summary(self.val_index.shards) + (f"; {dropped} left out" if dropped else "")

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.stream is not None, "plan() comes first"
        self.stream.rank = self.trainer.global_rank if self.trainer else 0
        self.stream.start = self._resume_from
        samples = Samples(self.index, self.channels, self.augment, self.order, self.seed)
        return self._loader(samples, self.stream, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if self.val_index is None or self.stream is None:
            return []
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        batches = Numbered(len(self.val_index), self.stream.micro_batch, world_size, rank)
        return self._loader(self.evaluation(self.val_index), batches, min(1, self.num_workers))

    def evaluation(self, index: ShardIndex) -> Samples:
        """Samples of an index as evaluation sees them: in order, centre-cropped."""
        return Samples(index, self.channels, self.centre_crop, seed=self.seed)

    def _loader(
        self, samples: Samples, batches: Sampler[list[int]], workers: int
    ) -> DataLoader[Batch]:
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=cast(Any, _as_batch),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for the stream to go on as if never stopped."""
        seed, _, block, tail = self._order_arguments
        return {
            "global_batch": self.global_batch,
            "samples": len(self.index),
            "shards": len(self.index.shards),
            "fingerprint": self._fingerprint(),
            "seed": seed,
            "lanes": self.order.lanes,
            "block": block,
            "tail": tail,
        }

    def _fingerprint(self) -> int:
        """A checksum of the shards' names and counts: another order of patterns is another run."""
        names = "\n".join(shard.path.name for shard in self.index.shards)
        return zlib.crc32(names.encode() + self.index.counts.numpy().tobytes())

    def state_dict(self) -> dict[str, Any]:
        """Samples that the training loop consumed ("processed", not what workers prefetched), and
        what they depend on."""
        assert self.trainer is not None and self.stream is not None
        done = cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress.current.processed
        return {
            "consumed": done * self.stream.micro_batch * self.stream.world_size
        } | self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the consumed samples.

        Raises:
            ValueError: the stream would not be the one that was stopped.
        """
        for name, now in self._identity().items():
            if state_dict[name] != now:
                raise ValueError(
                    f"cannot resume: data {name} was {state_dict[name]} and is now {now}, "
                    "which would change "
                    f"the order of samples; start a new run instead"
                )
        self._resume_from = state_dict["consumed"]


def _quiet_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the training process decides when workers end."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
