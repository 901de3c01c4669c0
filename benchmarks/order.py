"""How well the order of an epoch mixes, and what it costs to start on a huge data set.

The worst case: samples lie sorted by class. Each row compares batches with those of a full
permutation of all samples, drawn by numpy, which would have every shard open all the time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from maepretrain.data.order import EpochOrder
from maepretrain.data.samples import ShardIndex
from maepretrain.data.shards.index import INDEX_VERSION, open_shards

# (shards, samples in each, classes, batch, streams, block); 1281 x 1000 is ImageNet.
SETTINGS = [
    (1281, 1000, 1000, 4096, 16, 8192),
    (1281, 1000, 1000, 4096, 16, 32768),
    (1281, 1000, 1000, 4096, 64, 8192),
    (1281, 1000, 1000, 256, 16, 8192),
    (1281, 1000, 1000, 256, 16, 2048),
    (1281, 1000, 1000, 256, 16, 32768),
    (1281, 1000, 1000, 256, 4, 8192),
    (1281, 1000, 1000, 256, 64, 8192),
    (1281, 1000, 1000, 256, 1, 256),
    (256, 5000, 1000, 256, 16, 8192),
    (128, 10_000, 1000, 256, 16, 8192),
]
STEPS = 100
RANKS = 8
HUGE_SHARDS, HUGE_SAMPLES = 200_000, 10_000


def entropy(classes: np.ndarray, number: int) -> float:
    """Of the classes in a batch, in bits."""
    share = np.bincount(classes, minlength=number) / len(classes)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def quality(batches: np.ndarray, samples: int, classes: int) -> tuple[float, float, float]:
    """Distinct classes and entropy of a batch, and how far the samples at one place of consecutive
    batches lie apart in the data set, as a share of it."""
    of_class = batches * classes // samples
    distinct = np.mean([len(np.unique(batch)) for batch in of_class])
    bits = np.mean([entropy(batch, classes) for batch in of_class])
    apart = np.abs(np.diff(batches, axis=0)).mean() / samples
    return float(distinct), float(bits), float(apart)


def row(
    shards: int, per_shard: int, classes: int, batch: int, streams: int, block: int
) -> tuple[str, ...]:
    """A line of the table: of steps in the middle of an epoch."""
    samples = shards * per_shard
    order = EpochOrder(torch.full((shards,), per_shard), batch, 0, streams, block)
    steps = min(STEPS, order.steps_per_epoch)
    first = (order.steps_per_epoch - steps) // 2 * batch
    shard, sample = order.locate(torch.arange(first, first + steps * batch))
    ours = (shard * per_shard + sample).numpy().reshape(steps, batch)
    full = np.random.default_rng(0).permutation(samples)[: steps * batch].reshape(steps, batch)
    mine, best = quality(ours, samples, classes), quality(full, samples, classes)
    ranks = (ours // per_shard).reshape(steps, RANKS, batch // RANKS)
    opened = np.mean([len(np.unique(ranks[:, rank])) for rank in range(RANKS)])
    cells = [f"{a:.4g} ({a / b:.3f})" for a, b in zip(mine, best, strict=True)]
    return (
        *(f"{shards:,} x {per_shard:,}", f"{batch}", f"{streams}", f"{block}"),
        *(*cells, f"{opened:.0f}"),
    )


def huge() -> None:
    """Open many shards by their indexes, and ask the order and the index for a batch."""
    with tempfile.TemporaryDirectory() as name:
        _make_files(Path(name))
        begin, before = time.perf_counter(), _peak()
        shards = open_shards(f"{name}/*.tar")
        opened = time.perf_counter()
        index = ShardIndex(shards)
        order = EpochOrder(index.counts, 4096)
        for step in (0, order.steps_per_epoch - 1):
            shard, sample = order.locate(torch.arange(step * 4096, step * 4096 + 4096))
            index.rows(shard, sample)
        ended = time.perf_counter()
    print(
        f"{len(index):,} samples in {len(shards):,} shards: indexes read in {opened - begin:.1f} s,"
        f" order and two batches in {ended - opened:.2f} s, peak memory {_peak():.0f} MB "
        f"({before:.0f} MB of it before)"
    )


def _peak() -> float:
    """Megabytes; Linux only. getrusage would count the parent's before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def _make_files(folder: Path) -> None:
    """Sparse shards and indexes that hold a head only; 50,000 names share a file (hard links)."""
    size = 1 << 30
    head = (
        f'{{"version": {INDEX_VERSION}, "samples": {HUGE_SAMPLES}, "bytes": {size}, '
        f'"sha256": "{"0" * 64}", "faults": {{}}, "further_inputs": 0}}\n'
    )
    at = os.open(folder, os.O_RDONLY)
    for i in range(HUGE_SHARDS):
        new, first = f"a-{i:06d}.tar", f"a-{i - i % 50_000:06d}.tar"
        if new == first:
            (folder / new).touch()
            os.truncate(folder / new, size)
            (folder / f"{new}.idx").write_text(head)
        else:
            os.link(first, new, src_dir_fd=at, dst_dir_fd=at)
            os.link(f"{first}.idx", f"{new}.idx", src_dir_fd=at, dst_dir_fd=at)
    os.close(at)


def main(argv: list[str]) -> None:
    """Print the table, then the start in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks order", description=__doc__)
    parser.add_argument("part", nargs="?", choices=["huge"], help="the start alone")
    if parser.parse_args(argv).part:
        huge()
        return
    torch.set_num_threads(1)
    print(f"Means over {STEPS} steps; in brackets the ratio to a full permutation.\n")
    titles = ("shards", "batch", "streams", "block", "classes in a batch", "bits", "apart")
    titles = (*titles, f"shards that one of {RANKS} ranks opens in {STEPS} steps")
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    for setting in SETTINGS:
        print("| " + " | ".join(row(*setting)) + " |", flush=True)
    print(flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.order", "huge"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
