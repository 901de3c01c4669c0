"""The verbs `shards write` and `shards index`: their signatures are the command line."""

from pathlib import Path

from maepretrain.data.shards import expand, make_indexes, open_shards, summary
from maepretrain.data.write import find_source, write_shards


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
        src: a folder of images (class = first sub-folder), a folder of MNIST-style IDX files, or
            torchvision:NAME.
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
    make_indexes(expand(patterns), workers, checksum=True)
    print(summary(open_shards(patterns)))
    return 0
