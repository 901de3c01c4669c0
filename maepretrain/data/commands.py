"""The verbs `shards write`, `index`, `order` and `check`: signatures are the command line."""

from pathlib import Path
from typing import Literal

from maepretrain.data.check import check_shards, show
from maepretrain.data.check_shard import Criteria
from maepretrain.data.errors import ErrorRow, ShardError, as_csv, printable
from maepretrain.data.settings import Crop, OrderSettings
from maepretrain.data.shards.index import make_indexes, summary
from maepretrain.data.shards.patterns import expand
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.data.stores.remote import is_remote
from maepretrain.files import replacing


def write(
    src: str,
    dst: Path,
    split: str = "train",
    root: str | None = None,
    samples_per_shard: int = 5000,
    short_side: int | None = None,
    quality: int = 92,
    seed: int = 0,
    workers: int = 2,
) -> int:
    """Make tar shards in WebDataset's conventions, with their indexes; goes on where an earlier
    call stopped.

    Args:
        src: a folder of images, .npy arrays or else .txt files (class = first sub-folder), a folder
            of MNIST-style IDX files, or torchvision:NAME.
        dst: the folder that gets SPLIT-000000.tar, ...
        split: name of the shards; also the part of an IDX or torchvision set that is read (train or
            test).
        root: where a torchvision data set lies.
        samples_per_shard: images in each shard.
        short_side: make larger images smaller, to this short side (JPEG is encoded anew); default
            copies every byte.
        quality: JPEG quality, with short_side.
        seed: seed of the order in which samples are written.
        workers: processes side by side.
    """
    source = find_source(src, root, split)
    unreadable = write_shards(
        source, dst, split, samples_per_shard, short_side, quality, seed, workers
    )
    if unreadable:
        print(
            f"{len(unreadable)} images cannot be read and were left out; "
            f"{dst}/{split}.unreadable.txt "
            f"lists them"
        )
    return 1 if unreadable else 0


def index(patterns: list[str], workers: int = 2) -> int:
    """Make the index beside each shard anew, with its checksum (reads every byte once).

    Args:
        patterns: shards: braces (a-{000..011}.tar), globs or files.
        workers: processes side by side.
    """
    urls = expand(patterns)
    remote = next((url for url in urls if is_remote(url)), None)
    if remote is not None:
        raise ShardError(
            f"{remote}: make the index where the shards are written and copy the .idx files beside "
            "them; without, each node makes one in a pass over the shard"
        )
    print(summary(make_indexes([Path(url) for url in urls], workers, checksum=True)))
    return 0


def order(
    patterns: list[str],
    global_batch: int,
    epoch: int = 0,
    step: int | None = None,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
    streams: int | None = None,
    block: int = 8192,
    tail: Literal["drop", "pad"] = "drop",
    crops_per_image: int = 1,
) -> int:
    """Print what a rank will read, a line for each sample: step in the epoch, position in the run,
    shard and key, separated by tabs.

    Args:
        patterns: shards, as in data.train.
        global_batch: samples per optimizer step over all processes.
        epoch: counted from 0.
        step: only this step of the epoch, counted from 0; default all of them.
        world_size: processes.
        rank: one of them.
        seed: as the run's.
        streams: as data.order.streams.
        block: as data.order.block.
        tail: as data.order.tail.
        crops_per_image: as data.crop.per_image.
    """
    from maepretrain.data.module import ShardData

    mean = (0.5,) * 3
    data = ShardData(
        patterns,
        global_batch=global_batch,
        mean=mean,
        std=mean,
        crop=Crop(per_image=crops_per_image),
        order=OrderSettings(seed=seed, streams=streams, block=block, tail=tail),
    )
    steps = data.order.steps_per_epoch
    if not 0 <= rank < world_size:
        raise ShardError(f"rank {rank} must be 0 to {world_size - 1}")
    if epoch < 0 or (step is not None and not 0 <= step < steps):
        raise ShardError(f"epoch {epoch}, step {step}: an epoch has steps 0 to {steps - 1}")
    data.plan((epoch + 1) * steps, world_size, 1)
    assert data.sampler is not None
    data.sampler.rank = rank
    samples = data.training()
    for s in range(steps) if step is None else (step,):
        positions = list(data.sampler.positions(epoch * steps + s))
        for position, (shard, key) in zip(positions, samples.names(positions), strict=True):
            print(s, position, printable(shard), printable(key), sep="\t")
    return 0


def check(
    patterns: list[str],
    world_size: int = 1,
    num_workers: int = 1,
    global_batch: int | None = None,
    channels: int = 3,
    classes: int | None = None,
    length: int | None = None,
    workers: int = 2,
    decode: bool = True,
    list: Path | None = None,
) -> int:
    """Read shards and find what a run would meet: damaged or empty shards, stale indexes, wrong
    checksums, unreadable inputs, missing or wrong labels, keys that come twice, too few samples.

    Ends with 1 where anything is wrong.

    Args:
        patterns: shards, as in data.train.
        world_size: processes of the run.
        num_workers: loader processes of each.
        global_batch: samples per optimizer step of the run.
        channels: as data.channels.
        classes: labels must be below this number; default takes any.
        length: of 1-D signals and texts, as the one number in data.image_size.
        workers: processes that check, side by side.
        decode: decode every input; without, headers and checksums only.
        list: a CSV file that gets every error.
    """
    criteria = Criteria(channels, classes, length, decode)
    report = check_shards(patterns, criteria, world_size, num_workers, global_batch, workers)
    if list is not None:
        with replacing(list) as file:
            file.write(as_csv([ErrorRow._fields, *report.errors]))
    show(report)
    return 1 if report.errors else 0
