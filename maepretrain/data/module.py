"""The LightningDataModule: shards in, batches of uint8 images out, resumable at any step.

The whole run is one Lightning epoch over a stream of micro-batches; epochs are counted by the
order. That is what makes a resume exact: the position of the stream is the number of samples
that the training loop consumed, and nothing else.

Longer than other modules: half of it is the signature and its help, which are the section `data` of
every configuration.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader

from maepretrain.data import resume
from maepretrain.data.announce import Announcer
from maepretrain.data.batch import Batch
from maepretrain.data.errors import ErrorList, ErrorRow, ShardError, tolerated, too_many
from maepretrain.data.loader import make_loader
from maepretrain.data.order import EpochOrder, Mixture, Order, count_streams
from maepretrain.data.sampler import EvaluationSampler, RunSampler
from maepretrain.data.samples import Pixels, Samples, ShardIndex
from maepretrain.data.settings import (
    MOVED_OPTIONS,
    CacheSettings,
    Crop,
    LowResolution,
    OrderSettings,
    with_sections,
)
from maepretrain.data.shards.index import Shard, open_shards, summary
from maepretrain.data.shards.reader import Store
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.read_ahead import ReadAhead
from maepretrain.data.stores.remote import is_remote, shown
from maepretrain.data.transforms import Augment, CentreCrop, SignalCrop
from maepretrain.data.unindexed import UnindexedBatches, UnindexedOrder, unindexed_sources
from maepretrain.ranks import is_rank_zero


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
        mean: per channel, of pixels in 0..1, subtracted on the device.
        std: per channel, of pixels in 0..1, divided by on the device.
        exif: turn images as their orientation tag says.
        num_workers: loader processes per rank; 0 loads in the training process.
        max_errors: share of the samples that may be unreadable or wrongly labelled; more of them
            (and more than 10) end the run. Each is listed in RUN/errors.csv.
        crop: how an image is cut out.
        low_resolution: smaller and cheaper images at first.
        order: in which order samples are read.
        cache: where remote shards are kept.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float] | None,
        val: str | list[str] | None = None,
        global_batch: int = 256,
        image_size: int | list[int] = 224,
        channels: int = 3,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        exif: bool = False,
        num_workers: int = 1,
        max_errors: float = 0.001,
        crop: Crop = Crop(),
        low_resolution: LowResolution = LowResolution(),
        order: OrderSettings = OrderSettings(),
        cache: CacheSettings = CacheSettings(),
    ) -> None:
        super().__init__()
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean {mean} and std {std} need one value for each of {channels} channels"
            )
        _check_numbers(global_batch, crop.per_image, num_workers, max_errors, cache.gigabytes)
        self.channels = channels
        self.mean = mean
        self.std = std
        self.exif = exif
        self.global_batch = global_batch
        self.num_workers = num_workers
        self.max_errors = max_errors
        self.crops = crop.per_image
        self.seed = order.seed
        self._order_settings = order
        self._train = train
        self._val = val
        self.cache = ShardCache(cache.folder, int(cache.gigabytes * 1e9))
        self.labelled = False
        self.allow_reorder = False
        self._set_crops(image_size, crop)
        if order.exact and not isinstance(train, dict):  # a mixture has streams of each source
            count_streams(global_batch // self.crops, order.streams, order.block)
        self.unindexed: list[str] | None = None
        if train is not None and not order.exact:
            self.unindexed = self._unindexed_sources(train)
        elif order.samples_per_epoch is not None and not isinstance(train, dict):
            raise ValueError("samples_per_epoch is for mixtures: give the patterns weights")
        self.low_resolution: Augment | None = None
        self._low_epochs = low_resolution.epochs
        if low_resolution.image_size is not None or low_resolution.epochs:
            self.low_resolution = self._low_resolution(low_resolution)
        self.sampler: RunSampler | None = None
        self._resume_from = 0
        self._read_ahead: ReadAhead | None = None
        self._errors: ErrorList | None = None
        # Keys of the samples read instead, by position, in the last batch.
        self._replaced: dict[int | None, str] = {}

    # Shards are opened when they are first asked for: mistakes in a configuration are reported
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
        """Steps with images of `low_resolution.image_size`."""
        if self.low_resolution is None:
            return 0
        return round(self._low_epochs * self.order.steps_per_epoch)

    def _opened(self, patterns: str | list[str]) -> list[Shard]:
        return open_shards(patterns, max(1, self.num_workers), self.cache)

    def _unindexed_sources(self, train: str | list[str] | dict[str, float]) -> list[str]:
        if isinstance(train, dict):
            raise ValueError("mixtures are read exactly: leave out exact: false")
        if self._order_settings.samples_per_epoch is None:
            raise ValueError("exact: false needs samples_per_epoch, the draws that make an epoch")
        return unindexed_sources(train, allow_pipe=self._order_settings.allow_pipe)

    def _set_crops(self, image_size: int | list[int], crop: Crop) -> None:
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
        self.augment = Augment(
            height=height, width=width, scale=crop.scale, ratio=crop.ratio, flip=crop.flip
        )
        val_share = crop.val_share
        if val_share is None:
            val_share = 1.0 if crop.scale is None else 0.875
        self.centre_crop = CentreCrop(height, width, val_share)

    def _low_resolution(self, settings: LowResolution) -> Augment:
        size = settings.image_size
        if size is None or settings.epochs <= 0:
            raise ValueError(
                f"low_resolution.image_size {size} and low_resolution.epochs {settings.epochs} "
                "go together, the latter above 0"
            )
        sides = [size] * 2 if isinstance(size, int) else size
        if self.unindexed is not None or not isinstance(self.augment, Augment) or len(sides) != 2:
            raise ValueError("low_resolution is for images that are read exactly")
        height, width = sides
        full = (self.augment.height, self.augment.width)
        if height > full[0] or width > full[1]:
            raise ValueError(
                f"low_resolution.image_size {height}x{width} is above {full[0]}x{full[1]}"
            )
        return replace(self.augment, height=height, width=width)

    def shape_at(self, step: int) -> tuple[int, ...]:
        """Of one input in a step of the run: (c, h, w), or (c, t) of a signal."""
        if self.low_resolution is not None and step < self.low_steps:
            return self.channels, self.low_resolution.height, self.low_resolution.width
        return self.shape

    def _make_order(self) -> Order | UnindexedOrder:
        settings = self._order_settings
        images = self.global_batch // self.crops
        if self.unindexed is not None:
            return UnindexedOrder(images, settings.samples_per_epoch or 0)
        if isinstance(self._train, dict):
            return Mixture(
                list(self.index.counts.split([len(source) for source in self._sources])),
                list(self._train.values()),
                images,
                samples_per_epoch=settings.samples_per_epoch,
                seed=settings.seed,
                streams=settings.streams,
                block=settings.block,
            )
        return EpochOrder(
            self.index.counts,
            images,
            seed=settings.seed,
            streams=settings.streams,
            block=settings.block,
            tail=settings.tail,
        )

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
                "crop.per_image"
            )
        known = self._known_errors()
        samples = self._samples()
        limit = tolerated(samples, self.max_errors)
        if len(known) > limit:
            raise ShardError(f"{too_many(len(known), samples, limit)}; the first is {known[0]}")

    def _samples(self) -> int:
        """Samples that are trained on or held out."""
        if self.unindexed is not None:
            samples = self._order_settings.samples_per_epoch or 0
        else:
            samples = len(self.index)
        return samples + (len(self.val_index) if self.val_index is not None else 0)

    def _known_errors(self) -> list[ErrorRow]:
        """The errors that the indexes list."""
        shards = list(self.index.shards)
        if self.val_index is not None:
            shards += self.val_index.shards
        return [row for shard in shards for row in shard.error_rows()]

    def describe(self) -> str:
        """The training data in one line, and what an epoch leaves out or repeats."""
        if self.unindexed is not None:
            line = f"{len(self.unindexed)} sources"
        else:
            line = summary(self.index.shards)
        if len(self.index) != sum(shard.samples for shard in self.index.shards):
            line += f", {len(self.index):,} chosen"
        if self.crops > 1:
            line += f"; {self.crops} crops of each image in an epoch"
        if self.low_resolution is not None:
            height, width = self.low_resolution.height, self.low_resolution.width
            line += f"; {height}x{width} until step {self.low_steps:,}"
        epoch = self.order.describe()
        return line + (f"; {epoch}" if epoch else "")

    def describe_held_out(self, world_size: int) -> str:
        """The held-out data, and how many samples all processes leave out to take equal steps."""
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
            order=self.order,
            seed=self.seed,
            crops=self.crops,
            exif=self.exif,
            labelled=self.labelled,
            store=Store(self.cache),
            low_resolution=self.low_resolution,
            low_until=self.low_steps * self.global_batch,
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
            batches = UnindexedBatches(
                self.unindexed,
                self.sampler,
                Pixels(self.channels, self.augment, self.exif, self.seed),
                seed=self.seed,
                crops=self.crops,
                errors=self._error_list(),
            )
            return make_loader(batches, None, self.num_workers)
        samples = self.training()
        if any(is_remote(shard.url) for shard in self.index.shards):
            self._read_ahead = ReadAhead(self.cache)
            settings = self._order_settings
            self.sampler.announce = Announcer(
                samples, self.sampler, self._read_ahead, settings.block * (settings.streams or 16)
            )
        return make_loader(samples, self.sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if self.val_index is None or self.sampler is None:
            return []
        trainer = self.trainer
        batches = EvaluationSampler(
            len(self.val_index),
            self.sampler.micro_batch,
            world_size=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
        )
        return make_loader(self.evaluation(self.val_index), batches, min(1, self.num_workers))

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
        """Settings that must be equal for the order to go on, as checkpoints hold them."""
        settings = self._order_settings
        return {
            "global_batch": self.global_batch,
            "samples": len(self.index),
            "shards": len(self.index.shards),
            "fingerprint": resume.fingerprint(self.index),
            "seed": settings.seed,
            "streams": settings.streams,
            "block": settings.block,
            "tail": settings.tail,
            "exact": self.unindexed is None,
            "crops_per_image": self.crops,
            "weights": list(self._train.values()) if isinstance(self._train, dict) else None,
            "samples_per_epoch": settings.samples_per_epoch,
        }

    def state_dict(self) -> dict[str, Any]:
        """Samples that the training loop consumed ("processed", not what workers prefetched), and
        what they depend on."""
        assert self.trainer is not None and self.sampler is not None
        done = cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress.current.processed
        consumed = done * self.sampler.micro_batch * self.sampler.world_size
        return {"consumed": consumed} | self._identity()

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
        """Differences from the stopped run, and with it the order; empty where nothing does."""
        return resume.changes(state_dict, self._identity())


def shard_data(options: Mapping[str, Any]) -> ShardData:
    """The data of nested options, as a YAML file has them under `data`."""
    return ShardData(**with_sections(options))


def add_data(parser: Any, skip: set[str] | None = None) -> None:
    """The section `data` of a parser, which also says what its options of older versions are now.

    Args:
        parser: of jsonargparse; that of `maepretrain.parsing` uses the names.
        skip: arguments of `ShardData` that are no options here.
    """
    parser.add_class_arguments(ShardData, "data", skip=skip or set())
    parser.moved = {f"data.{old}": f"data.{new}" for old, new in MOVED_OPTIONS.items()}


def _check_numbers(
    global_batch: int, crops: int, workers: int, max_errors: float, gigabytes: float
) -> None:
    if global_batch < 1 or crops < 1 or global_batch % crops:
        raise ValueError(
            f"global batch {global_batch} is no multiple of {crops} crop.per_image, at least 1"
        )
    if workers < 0 or gigabytes <= 0 or not 0 <= max_errors <= 1:
        raise ValueError(
            f"num_workers {workers} must not be negative, cache.gigabytes {gigabytes} be above 0 "
            f"and max_errors {max_errors} a share, 0 to 1"
        )
