"""The LightningDataModule: shards in, batches of uint8 images out, resumable at any step.

The whole run is one Lightning epoch over a stream of micro-batches; epochs are counted by the
order. That is what makes a resume exact: the position of the stream is the number of samples
that the training loop consumed, and nothing else.
"""

import atexit
import multiprocessing
import multiprocessing.util
import signal
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maepretrain.data.batch import Batch
from maepretrain.data.errors import ErrorList, ErrorRow, ShardError, tolerated, too_many
from maepretrain.data.images import Augment, CentreCrop, SignalCrop
from maepretrain.data.order import EpochOrder, Mixture, Order, streams_of
from maepretrain.data.sampler import EvaluationSampler, RunSampler
from maepretrain.data.samples import Pixels, Samples, ShardIndex
from maepretrain.data.shards.index import Shard, open_shards, summary
from maepretrain.data.shards.reader import Store
from maepretrain.data.stores.cache import ReadAhead, ShardCache
from maepretrain.data.stores.remote import is_remote, shown
from maepretrain.data.unindexed import UnindexedBatches, UnindexedOrder, unindexed_sources
from maepretrain.ranks import is_rank_zero


def _as_batch(batch: Batch) -> Batch:
    return batch


class ShardData(L.LightningDataModule):
    """Images or 1-D signals from WebDataset shards for training and validation.

    Args:
        train: shard patterns: braces (`a-{000..011}.tar`), globs, files, addresses (`https://`,
            `s3://`, `gs://`, `hf://`); one, a list, or patterns with weights for a mixture. None
            (of applications, not of a config): only held-out images, or none.
        val: patterns of held-out shards, or null for no validation.
        global_batch: samples per optimizer step over all processes and accumulated micro-batches.
        image_size: side of the square images given to the model, [height, width], or [length] of
            1-D signals (`.npy`) and texts (`.txt`, whose bytes are tokens; short ones are padded).
        channels: 1 (gray), 2 (with alpha), 3 (RGB), 4 (with alpha); any number for
            `.npy`, 1 for `.txt`.
        low_image_size: size of the images in the first `low_epochs`, smaller and cheaper.
        low_epochs: epochs, or a part of one, after which images have `image_size`.
        scale: area of the random crop as a share of the image; null resizes the whole image.
        ratio: aspect ratio of the random crop.
        flip: probability of a horizontal flip.
        crops_per_image: crops of each image, from one decode. They count as samples of the batch
            and for the learning rate; an epoch shows each image that often.
        exif: turn images as their orientation tag says.
        val_share: side of the centre crop in validation as a share of the image's fitting side.
            Default .875 (256 then 224), or 1 where training sees whole images (scale null).
        mean: per channel, of pixels in 0..1, subtracted on the device.
        std: per channel, of pixels in 0..1, divided by on the device.
        seed: seed of order and crops.
        streams: equal sample ranges read side by side; must divide the images of a batch. Default
            their greatest common divisor with 16.
        block: samples shuffled together inside a stream.
        tail: "drop" leaves out what is no whole batch at an epoch's end, "pad" repeats samples.
        samples_per_epoch: draws that make an epoch of a mixture (default as many as it has
            samples), or with exact false.
        max_errors: share of the samples that may be unreadable or wrongly labelled; more of them
            (and more than 10) end the run. Each is listed in RUN/errors.csv.
        num_workers: loader processes per rank; 0 loads in the training process.
        cache: folder in which remote shards are kept; default $MAEPRETRAIN_CACHE or
            ~/.cache/maepretrain/shards. One per node, on its own disk.
        cache_gb: gigabytes that it may take; the least recently used shards go first.
        exact: false reads with webdataset's own pipeline: for sources without an index. Shuffling
            is approximate, and a resume does not go on with the samples that were due.
        allow_pipe: let `pipe:COMMAND` patterns run their command in a shell (with exact false).
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float] | None,
        val: str | list[str] | None = None,
        global_batch: int = 256,
        image_size: int | list[int] = 224,
        channels: int = 3,
        low_image_size: int | list[int] | None = None,
        low_epochs: float = 0.0,
        scale: tuple[float, float] | None = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        crops_per_image: int = 1,
        exif: bool = False,
        val_share: float | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        seed: int = 0,
        streams: int | None = None,
        block: int = 8192,
        tail: Literal["drop", "pad"] = "drop",
        samples_per_epoch: int | None = None,
        max_errors: float = 0.001,
        num_workers: int = 1,
        cache: Path | None = None,
        cache_gb: float = 100.0,
        exact: bool = True,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean {mean} and std {std} need one value for each of {channels} channels"
            )
        _check_numbers(global_batch, crops_per_image, num_workers, max_errors, cache_gb)
        self.channels, self.mean, self.std, self.seed = channels, mean, std, seed
        self.num_workers, self.global_batch = num_workers, global_batch
        self.crops, self.exif, self.max_errors = crops_per_image, exif, max_errors
        self._set_crops(image_size, scale, ratio, flip, val_share)
        self.cache = ShardCache(cache, int(cache_gb * 1e9))
        if exact and not isinstance(train, dict):  # a mixture has streams of each source
            streams_of(global_batch // crops_per_image, streams, block)
        self._order_arguments = (seed, streams, block, tail)
        self.samples_per_epoch = samples_per_epoch
        self.labelled = self.allow_reorder = False
        self._train, self._val = train, val
        self.weights = list(train.values()) if isinstance(train, dict) else None
        self.unindexed: list[str] | None = None
        if train is not None and not exact:
            self.unindexed = self._unindexed_sources(train, allow_pipe)
        elif samples_per_epoch is not None and self.weights is None:
            raise ValueError("samples_per_epoch is for mixtures: give the patterns weights")
        self.early: Augment | None = None
        self._low_epochs = low_epochs
        if low_image_size is not None or low_epochs:
            self.early = self._set_early(low_image_size, low_epochs)
        self.sampler: RunSampler | None = None
        self._resume_from = 0
        self._read_ahead: ReadAhead | None = None
        self._errors: ErrorList | None = None
        # What was read instead, by position, in the last batch.
        self._replaced: dict[int | None, str] = {}

    # Shards are opened when they are first asked for: what is wrong with a configuration is said
    # before anything is read.

    @cached_property
    def _sources(self) -> list[list[Shard]]:
        """Training shards of each source."""
        if self._train is None or self.unindexed is not None:
            return []
        sources = list(self._train) if isinstance(self._train, dict) else [self._train]
        return [self._opened(source) for source in sources]

    @cached_property
    def index(self) -> ShardIndex:
        """Training samples; of a stream without an index, or of held-out images only, none."""
        return ShardIndex([shard for source in self._sources for shard in source])

    @cached_property
    def val_index(self) -> ShardIndex | None:
        """Held-out samples."""
        return ShardIndex(self._opened(self._val)) if self._val else None

    @cached_property
    def order(self) -> Order | UnindexedOrder:
        """Which sample each position of the run holds."""
        return self._make_order()

    @property
    def low_steps(self) -> int:
        """Steps with images of `low_image_size`."""
        if self.early is None:
            return 0
        return round(self._low_epochs * self.order.steps_per_epoch)

    def _opened(self, patterns: str | list[str]) -> list[Shard]:
        return open_shards(patterns, max(1, self.num_workers), self.cache)

    def _unindexed_sources(
        self, train: str | list[str] | dict[str, float], allow_pipe: bool
    ) -> list[str]:
        if isinstance(train, dict):
            raise ValueError("mixtures are read exactly: leave out exact: false")
        if self.samples_per_epoch is None:
            raise ValueError("exact: false needs samples_per_epoch, the draws that make an epoch")
        return unindexed_sources(train, allow_pipe)

    def _set_crops(
        self,
        image_size: int | list[int],
        scale: tuple[float, float] | None,
        ratio: tuple[float, float],
        flip: float,
        val_share: float | None,
    ) -> None:
        size = [image_size] * 2 if isinstance(image_size, int) else image_size
        # Of one input as the model gets it: (c, h, w), or (c, t) of a signal.
        self.shape = (self.channels, *size)
        self.augment: Augment | SignalCrop
        self.centre_crop: CentreCrop | SignalCrop
        if len(size) == 1:
            self.augment = self.centre_crop = SignalCrop(size[0])
            return
        if len(size) != 2:
            raise ValueError(f"image_size {image_size} must be a side, [height, width] or [length]")
        height, width = size
        self.augment = Augment(height, width, scale, ratio, flip)
        if val_share is None:
            val_share = 1.0 if scale is None else 0.875
        self.centre_crop = CentreCrop(height, width, val_share)

    def _set_early(self, size: int | list[int] | None, epochs: float) -> Augment:
        if size is None or epochs <= 0:
            raise ValueError(
                f"low_image_size {size} and low_epochs {epochs} go together, the latter above 0"
            )
        sides = [size] * 2 if isinstance(size, int) else size
        if self.unindexed is not None or not isinstance(self.augment, Augment) or len(sides) != 2:
            raise ValueError("low_image_size is for images that are read exactly")
        height, width = sides
        full = (self.augment.height, self.augment.width)
        if height > full[0] or width > full[1]:
            raise ValueError(f"low_image_size {height}x{width} is above {full[0]}x{full[1]}")
        return replace(self.augment, height=height, width=width)

    def shape_at(self, step: int) -> tuple[int, ...]:
        """Of one input in a step of the run: (c, h, w), or (c, t) of a signal."""
        if self.early is not None and step < self.low_steps:
            return self.channels, self.early.height, self.early.width
        return self.shape

    def _make_order(self) -> Order | UnindexedOrder:
        seed, streams, block, tail = self._order_arguments
        images = self.global_batch // self.crops
        if self.unindexed is not None:
            return UnindexedOrder(images, self.samples_per_epoch or 0)
        if self.weights is None:
            return EpochOrder(self.index.counts, images, seed, streams, block, tail)
        sources = list(self.index.counts.split([len(source) for source in self._sources]))
        return Mixture(sources, self.weights, images, self.samples_per_epoch, seed, streams, block)

    def choose(self, chosen: Int64[Tensor, "n"]) -> None:
        """Train on these samples only (numbered through all training shards)."""
        self.index = self.index.choose(chosen)
        self.order = self._make_order()

    def plan(self, steps: int, world_size: int, accumulation: int) -> None:
        """Fix the length of the run and check what can be checked before it.

        Raises:
            ValueError: processes and crops that do not divide the batch, or more errors in the
                shards than are tolerated.
        """
        self.sampler = RunSampler(self.global_batch, steps, world_size, 0, accumulation)
        if self.sampler.micro_batch % self.crops:
            raise ValueError(
                f"a micro-batch of {self.sampler.micro_batch} is no multiple of {self.crops} "
                "crops_per_image"
            )
        known, samples = self._known_errors(), self._samples()
        most = tolerated(samples, self.max_errors)
        if len(known) > most:
            raise ShardError(f"{too_many(len(known), samples, most)}; the first is {known[0]}")

    def _samples(self) -> int:
        train = self.samples_per_epoch if self.unindexed is not None else len(self.index)
        return (train or 0) + (len(self.val_index) if self.val_index is not None else 0)

    def _known_errors(self) -> list[ErrorRow]:
        """What the indexes say."""
        indexes = [index for index in (self.index, self.val_index) if index is not None]
        return [
            ErrorRow(kind, shown(shard.url), key)
            for index in indexes
            for shard in index.shards
            for kind, keys in shard.errors.items()
            for key in keys
        ]

    def describe(self) -> str:
        """What is read, and what an epoch leaves out or repeats."""
        if self.unindexed is not None:
            line = f"{len(self.unindexed)} sources"
        else:
            line = summary(self.index.shards)
        if len(self.index) != sum(shard.samples for shard in self.index.shards):
            line += f", {len(self.index):,} chosen"
        if self.crops > 1:
            line += f"; {self.crops} crops of each image in an epoch"
        if self.early is not None:
            line += f"; {self.early.height}x{self.early.width} until step {self.low_steps:,}"
        epoch = self.order.describe()
        return line + (f"; {epoch}" if epoch else "")

    def describe_held_out(self, world_size: int) -> str:
        """What validation reads, and what it leaves out so that all processes take equal steps."""
        if self.val_index is None:
            return "none"
        dropped = EvaluationSampler(len(self.val_index), 1, world_size).dropped
        return summary(self.val_index.shards) + (f"; {dropped} left out" if dropped else "")

    def training(self) -> Samples:
        """Samples at the positions of the run, with random crops."""
        assert not isinstance(self.order, UnindexedOrder)
        return Samples(
            self.index,
            self.channels,
            self.augment,
            self.order,
            self.seed,
            self.crops,
            self.exif,
            self.labelled,
            Store(self.cache),
            self.early,
            self.low_steps * self.global_batch,
        )

    def evaluation(self, index: ShardIndex, labelled: bool = False) -> Samples:
        """Samples of an index as evaluation sees them: in order, centre-cropped."""
        return Samples(
            index,
            self.channels,
            self.centre_crop,
            exif=self.exif,
            labelled=labelled or self.labelled,
            store=Store(self.cache),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.sampler is not None, "plan() comes first"
        self.sampler.rank = self.trainer.global_rank if self.trainer else 0
        self.sampler.start = self._resume_from
        if self.unindexed is not None:
            pixels = Pixels(self.channels, self.augment, self.exif, self.seed)
            errors = self._error_list()
            batches = UnindexedBatches(
                self.unindexed, self.sampler, pixels, self.seed, self.crops, errors
            )
            return self._loader(batches, None, self.num_workers)
        samples = self.training()
        if any(is_remote(shard.url) for shard in self.index.shards):
            self.sampler.announce = self._look_ahead(samples, self.sampler)
        return self._loader(samples, self.sampler, self.num_workers)

    def _look_ahead(self, samples: Samples, sampler: RunSampler) -> Callable[[int], None]:
        """Fetches, in this rank's process, the shards of the next quarter of a block."""
        ahead = self._read_ahead = ReadAhead(self.cache)
        _, streams, block, _ = self._order_arguments
        horizon = max(2, block * (streams or 16) // (4 * sampler.global_batch))
        every, last = max(1, horizon // 4), None

        def announce(step: int) -> None:
            nonlocal last
            if last is not None and step < last + every:
                return
            last = step
            steps = range(step, min(step + horizon, sampler.steps))
            positions = [p for s in steps for p in sampler.positions(s)[:: samples.crops]]
            shards = samples.shards(torch.tensor(positions, dtype=torch.int64))
            remote = [shard for shard in shards if is_remote(shard.url)]
            ahead.want([(shard.url, shard.bytes, shard.sha256) for shard in remote])

        return announce

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if self.val_index is None or self.sampler is None:
            return []
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        batches = EvaluationSampler(len(self.val_index), self.sampler.micro_batch, world_size, rank)
        return self._loader(self.evaluation(self.val_index), batches, min(1, self.num_workers))

    def _loader(
        self, samples: Dataset[Batch], batches: Sampler[list[int]] | None, workers: int
    ) -> DataLoader[Batch]:
        return DataLoader(
            samples,
            batch_sampler=batches,
            batch_size=None if batches is None else 1,
            num_workers=workers,
            collate_fn=cast(Any, _as_batch),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator().manual_seed(0),  # leaves the global generator alone
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """List what was replaced in a batch that is about to be used; models never see it."""
        if self._errors is None:
            self._errors = self._error_list()
            if is_rank_zero():
                self._errors.add(self._known_errors())
        self._replaced = {}
        if batch["error"][:, 0].any():
            trains = self.trainer is not None and self.trainer.training
            samples = self.training() if trains else self.evaluation(cast(Any, self.val_index))
            errors = samples.pop_errors(batch)
            self._replaced = {error.position: error.replaced_by for error in errors}
            self._errors.add(errors)
        return {name: value for name, value in batch.items() if name != "error"}

    def names(self, positions: list[int]) -> list[tuple[str, str]]:
        """(sample key, shard) of what the last training batch holds at these positions of the run;
        empty for a stream without an index."""
        if self.unindexed is not None:
            return [("", "")] * len(positions)
        names = zip(positions, self.training().names(positions), strict=True)
        return [(self._replaced.get(p, key), shown(url)) for p, (url, key) in names]

    def _error_list(self) -> ErrorList:
        folder = Path(self.trainer.default_root_dir) if self.trainer else Path()
        return ErrorList(folder / "errors.csv", self._samples(), self.max_errors)

    def teardown(self, stage: str) -> None:
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _identity(self) -> dict[str, Any]:
        """What must be equal for the stream to go on as if never stopped."""
        seed, streams, block, tail = self._order_arguments
        return {
            "global_batch": self.global_batch,
            "samples": len(self.index),
            "shards": len(self.index.shards),
            "fingerprint": self._fingerprint(),
            "seed": seed,
            "streams": streams,
            "block": block,
            "tail": tail,
            "exact": self.unindexed is None,
            "crops_per_image": self.crops,
            "weights": self.weights,
            "samples_per_epoch": self.samples_per_epoch,
        }

    def _fingerprint(self) -> int:
        """A checksum of the shards' names and counts: another order of patterns is another run."""
        names = "\n".join(shard.name for shard in self.index.shards)
        return zlib.crc32(
            names.encode(errors="surrogateescape") + self.index.counts.numpy().tobytes()
        )

    def state_dict(self) -> dict[str, Any]:
        """Samples that the training loop consumed ("processed", not what workers prefetched), and
        what they depend on."""
        assert self.trainer is not None and self.sampler is not None
        done = cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress.current.processed
        return {
            "consumed": done * self.sampler.micro_batch * self.sampler.world_size
        } | self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the consumed samples."""
        self._resume_from = self.resumes_at(state_dict)

    def resumes_at(self, state_dict: dict[str, Any]) -> int:
        """The position at which a run of this state goes on.

        Raises:
            ValueError: the stream would not be the one that was stopped, and `allow_reorder` is
                not set.
        """
        changes = self.changes(state_dict)
        if changes and not self.allow_reorder:
            raise ValueError(
                f"cannot resume: data {changes}, which would change the order of samples; start a "
                "new run, or add --allow_reorder to go on in another order"
            )
        return -(-state_dict["consumed"] // self.global_batch) * self.global_batch

    def changes(self, state_dict: dict[str, Any]) -> str:
        """What differs from the stopped run, and with it the order; empty where nothing does."""
        # Checkpoints of older versions have another name for the streams.
        before = {"streams": state_dict.get("lanes")} | state_dict
        changed = [
            f"{name} was {before.get(name)} and is {now}"
            for name, now in self._identity().items()
            if before.get(name) != now
        ]
        return ", ".join(changed)


def _check_numbers(
    global_batch: int, crops: int, workers: int, max_errors: float, cache_gb: float
) -> None:
    if global_batch < 1 or crops < 1 or global_batch % crops:
        raise ValueError(
            f"global batch {global_batch} is no multiple of {crops} crops_per_image, at least 1"
        )
    if workers < 0 or cache_gb <= 0 or not 0 <= max_errors <= 1:
        raise ValueError(
            f"num_workers {workers} must not be negative, cache_gb {cache_gb} be above 0 and "
            f"max_errors {max_errors} a share, 0 to 1"
        )


def _end_workers() -> None:
    """At the end of the process, whatever the end: multiprocessing sends loader processes SIGTERM,
    which they ignore, and would wait for ever."""
    # torch's handler would call their death an error.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# Before multiprocessing's own, which was registered before.
atexit.register(_end_workers)


def _quiet_worker(_: int) -> None:
    """Ctrl-C, and the signals of SLURM, reach the whole process group: the training process, which
    needs batches until its next step ends, decides when workers end. Without it they end by
    themselves: torch's loop looks for its parent every few seconds."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
