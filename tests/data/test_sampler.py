"""Who reads what: one stream of positions for any number of processes, and validation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from maepretrain.data.order import EpochOrder
from maepretrain.data.sampler import EvaluationSampler, RunSampler
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.shards.index import open_shards
from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.data.transforms import Augment

N = 53
BATCH = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """53 images in shards of 7."""
    folder = tmp_path_factory.mktemp("stream")
    images = np.random.default_rng(0).integers(0, 256, (N, 9, 8, 3), dtype=np.uint8)
    write_shards(Arrays(images, np.zeros(N, dtype=int)), folder, samples_per_shard=7)
    return ShardIndex(open_shards(str(folder / "train-*.tar")))


def samples_of(index: ShardIndex) -> Samples:
    order = EpochOrder(index.counts, BATCH, 3, block=5)
    return Samples(index, 3, Augment(6, 6), order, 3)


def keys_of(samples: Samples, positions: list[int]) -> list[str]:
    return [key for _, key in samples.names(positions)]


def whole_run(
    index: ShardIndex, world_size: int, accumulation: int, start: int = 0
) -> dict[int, list[tuple[str, bytes]]]:
    """Global step -> (key, pixels) by rank, micro-batch and sample, for 3 epochs of 2 steps."""
    steps: dict[int, list[tuple[str, bytes]]] = {}
    for rank in range(world_size):
        samples = samples_of(index)
        sampler = RunSampler(BATCH, 6, world_size, rank, accumulation)
        sampler.start = start
        for i, positions in enumerate(sampler):
            assert len(positions) == sampler.micro_batch == BATCH // world_size // accumulation
            pixels = [image.numpy().tobytes() for image in samples.__getitems__(positions)["input"]]
            step = steps.setdefault(start // BATCH + i // accumulation, [])
            step += zip(keys_of(samples, positions), pixels, strict=True)
    return steps


@pytest.fixture(scope="module")
def truth(index: ShardIndex) -> dict[int, list[tuple[str, bytes]]]:
    """The whole run, sample by sample."""
    samples = samples_of(index)
    return {
        step: [
            (keys_of(samples, [position])[0], samples[position]["input"].numpy().tobytes())
            for position in range(step * BATCH, step * BATCH + BATCH)
        ]
        for step in range(6)
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_number_of_processes_reads_the_same_stream(
    index: ShardIndex, truth: dict[int, Any], world_size: int, accumulation: int
):
    """The same samples, in the same order within a step, with the same crops."""
    assert whole_run(index, world_size, accumulation) == truth


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (4, 2)])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_resumed_stream_is_the_rest(
    index: ShardIndex, truth: dict[int, Any], world_size: int, accumulation: int, done: int
):
    """On any number of processes, whatever it began on."""
    rest = whole_run(index, world_size, accumulation, start=done * BATCH)
    assert rest == {step: rows for step, rows in truth.items() if step >= done}
    # Lightning compares the length with the batches of the whole run.
    sampler = RunSampler(BATCH, 6, world_size, 0, accumulation)
    sampler.start = done * BATCH
    assert len(sampler) == 6 * accumulation


def test_an_epoch_of_the_stream_holds_every_sample_but_the_tail(truth: dict[int, Any]):
    for epoch in range(3):
        keys = [key for step in (2 * epoch, 2 * epoch + 1) for key, _ in truth[step]]
        assert len(set(keys)) == len(keys) == 48


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 3), (4, 1), (8, 3)])
def test_positions_of_a_step_are_cut_by_rank_and_then_by_micro_batch(
    world_size: int, accumulation: int
):
    samplers = [RunSampler(BATCH, 5, world_size, rank, accumulation) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    for step in range(5):
        read = []
        for sampler, of_rank in zip(samplers, batches, strict=True):
            mine = [p for b in of_rank[step * accumulation : (step + 1) * accumulation] for p in b]
            assert mine == list(sampler.positions(step))
            read += mine
        assert read == list(range(step * BATCH, (step + 1) * BATCH))


def steps_announced(sampler: RunSampler) -> list[tuple[int, int]]:
    """(step, batches given out before it) of every announcement."""
    said: list[tuple[int, int]] = []
    given = 0
    announce: Callable[[int], None] = lambda step: said.append((step, given))  # noqa: E731
    sampler.announce = announce
    for _ in sampler:
        given += 1
    return said


def test_each_step_is_announced_before_its_first_batch():
    sampler = RunSampler(BATCH, 4, 2, 1, 3)
    assert steps_announced(sampler) == [(0, 0), (1, 3), (2, 6), (3, 9)]
    sampler.start = 2 * BATCH
    assert steps_announced(sampler) == [(2, 0), (3, 3)]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch 12 is not divisible by 5 processes x 1"):
        RunSampler(12, 1, 5, 0, 1)
    with pytest.raises(ValueError, match="batch 12 is not divisible by 4 processes x 2"):
        RunSampler(12, 1, 4, 0, 2)


def test_a_loader_with_processes_gives_the_same_batches(index: ShardIndex):
    sampler = RunSampler(BATCH, 3, 1, 0, 1)
    loader = DataLoader(
        samples_of(index), batch_sampler=sampler, num_workers=2, collate_fn=lambda batch: batch
    )
    for batch, positions in zip(loader, sampler, strict=True):
        truth = samples_of(index).__getitems__(positions)
        assert all(torch.equal(batch[name], truth[name]) for name in truth)


# Validation.


@pytest.mark.parametrize("samples", [0, 1, 7, 53])
@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_each_sample_once_in_equal_batches(
    samples: int, batch: int, world_size: int
):
    ranks = [
        list(EvaluationSampler(samples, batch, world_size, rank)) for rank in range(world_size)
    ]
    read = [number for batches in ranks for numbers in batches for number in numbers]
    dropped = EvaluationSampler(samples, batch, world_size).dropped
    assert read == list(range(samples - dropped)) and dropped < world_size
    for rank, batches in enumerate(ranks):
        assert [len(b) for b in batches] == [len(b) for b in ranks[0]]
        assert all(len(b) <= batch for b in batches)
        assert len(EvaluationSampler(samples, batch, world_size, rank)) == len(batches)
