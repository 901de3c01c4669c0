"""How the input scales: images per second against workers and against the number of shards, and
the memory of loader workers over 10,000 batches.

Several processes work, so images per second are by the clock, which neighbours on the machine
disturb; CPU time of all of them per image stands beside. They take turns; medians. Memory is what
the system counts as resident in a worker, with what it shares with its parent (Linux only).
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.photographs import make_jpegs
from benchmarks.timing import entry, positive, progress, table, workers_seconds
from maepretrain.data.module import ShardData
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards

WORKERS, SHARDS = (0, 1, 2), (1, 8, 64)
FLAT = 0.02  # the last quarter's mean against the second quarter's
SAMPLES = 200  # of memory, over the run


def write(jpegs: Path, shards: Path, number: int) -> str:
    """The same images in so many shards; their pattern."""
    source = find_source(str(jpegs), None, "train")
    images = sum(1 for _ in jpegs.rglob("*.jpg"))
    with contextlib.redirect_stdout(sys.stderr):
        write_shards(source, shards, samples_per_shard=-(-images // number))
    return f"{shards}/train-*.tar"


def reading(
    pattern: str, workers: int, batch: int, side: int, steps: int
) -> Callable[[], tuple[float, float]]:
    """A call that reads batches and returns images per second and microseconds of CPU per image,
    the first few batches left out: in them workers start."""

    def spent() -> float:
        return time.process_time() + workers_seconds()

    def run() -> tuple[float, float]:
        data = ShardData(pattern, global_batch=batch, image_size=side, num_workers=workers)
        start = 2 * workers + 1
        # Batches more than are timed, so that workers are busy to the end.
        data.plan(steps + start + 2 * workers, 1, 1)
        begin = cpu = end = 0.0
        for number, _ in enumerate(data.train_dataloader()):
            if number + 1 == start:
                begin, cpu = time.perf_counter(), spent()
            if number + 1 == start + steps:  # workers are still there to be asked
                end, cpu = time.perf_counter(), spent() - cpu
        return steps * batch / (end - begin), 1e6 * cpu / (steps * batch)

    return run


def rates(
    calls: dict[str, Callable[[], tuple[float, float]]], rounds: int
) -> dict[str, list[float]]:
    """The medians of what each call returns; they take turns.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
        progress(f"round {number + 1} of {rounds}")
    return {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }


def rows_of(found: dict[str, list[float]]) -> list[list[str]]:
    """Lines of a table, against the first of them."""
    (alone, alone_cpu), *_ = found.values()
    return [
        [name, f"{rate:,.0f}", f"{rate / alone:.2f}", f"{cpu:,.0f}", f"{cpu / alone_cpu:.2f}"]
        for name, (rate, cpu) in found.items()
    ]


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def memory(pattern: str, workers: int, batch: int, side: int, steps: int) -> dict[int, list[float]]:
    """MiB of each worker, sampled over a run of so many batches."""
    data = ShardData(pattern, global_batch=batch, image_size=side, num_workers=workers)
    data.plan(steps, 1, 1)
    samples: dict[int, list[float]] = {}
    every = max(1, steps // SAMPLES)
    for number, _ in enumerate(data.train_dataloader()):
        if number % every == 0:
            for process in multiprocessing.active_children():
                if process.pid is not None:
                    samples.setdefault(process.pid, []).append(resident(process.pid))
        if number % (steps // 10 or 1) == 0:
            progress(f"batch {number:,} of {steps:,}")
    return samples


def quarters(samples: list[float]) -> tuple[float, float]:
    """Means of the second and of the last quarter.

    Raises:
        ValueError: fewer than four samples.
    """
    if len(samples) < 4:
        raise ValueError(f"{len(samples)} samples of memory are no four quarters: more steps")
    quarter = len(samples) // 4
    return statistics.mean(samples[quarter : 2 * quarter]), statistics.mean(samples[-quarter:])


def main(argv: list[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--images", type=positive, default=1024, help="JPEGs that are made")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=16, help="batches of each in a round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--batches", type=positive, default=10_000, help="of the run for memory")
    arguments = parser.parse_args(argv)
    if arguments.batches < 4:
        raise ValueError(f"batches {arguments.batches} are no four quarters")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        make_jpegs(folder / "jpeg", arguments.images)
        shards = {n: write(folder / "jpeg", folder / f"shards-{n}", n) for n in SHARDS}
        how = (arguments.batch, 224, arguments.steps)
        by_workers = {f"{n}": reading(shards[SHARDS[1]], n, *how) for n in WORKERS}
        by_shards = {f"{n}": reading(pattern, 0, *how) for n, pattern in shards.items()}
        with_workers = rates(by_workers, arguments.rounds)
        with_shards = rates(by_shards, arguments.rounds)
        make_jpegs(folder / "small", 2000, (32, 24))
        small = write(folder / "small", folder / "small-shards", 8)
        samples = memory(small, max(WORKERS), 8, 32, arguments.batches)
    print(
        f"Images per second by the clock, 500 x 375 JPEGs to 224, batch {arguments.batch}, "
        f"{arguments.rounds} rounds of {arguments.steps} batches; one thread each; the training "
        f"process does nothing else. Workers on {SHARDS[1]} shards:\n"
    )
    titles = ("images/s", "x", "CPU µs/image", "x")
    print(table(("workers", *titles), rows_of(with_workers)))
    print(f"\nThe same {arguments.images:,} images in more shards, no worker:\n")
    print(table(("shards", *titles), rows_of(with_shards)))
    means = [quarters(one) for one in samples.values()]
    rows = [
        (number + 1, f"{early:.1f}", f"{late:.1f}", f"{100 * (late / early - 1):+.2f} %")
        for number, (early, late) in enumerate(means)
    ]
    flat = all(abs(late / early - 1) < FLAT for early, late in means)
    print(
        f"\nMemory of each worker over {arguments.batches:,} batches of 8 small images (32 x 24), "
        f"MiB resident, means of the second and of the last quarter:\n"
    )
    print(table(("worker", "second quarter", "last quarter", "growth"), rows))
    print(f"\nGoal: flat within {100 * FLAT:.0f} %: {'met' if flat else 'missed'}.")


if __name__ == "__main__":
    entry(main)
