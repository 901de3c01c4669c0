"""Who reads what: one stream of samples for any number of processes, and the files behind it."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from maepretrain.data import samples as samples_module
from maepretrain.data.images import UNIFORMS, Augment, CentreCrop
from maepretrain.data.order import EpochOrder
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.shards import open_shards
from maepretrain.data.stream import Numbered, Stream
from maepretrain.data.write import Arrays, write_shards
from maepretrain.randomness import uniform

N = 53
BATCH = 24
# Not too dark nor bright: where bicubic overshoots 0..255, PIL and torch clip in other places.
IMAGES = np.random.default_rng(0).integers(90, 166, (N, 9, 8, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(-1, 4, N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 coloured images in shards of 7; the key is the image's number."""
    folder = tmp_path_factory.mktemp("numbered")
    write_shards(Arrays(IMAGES, LABELS), folder, samples_per_shard=7)
    return folder


@pytest.fixture
def index(folder: Path) -> ShardIndex:
    return ShardIndex(open_shards(str(folder / "train-*.tar")))


@pytest.fixture
def numbers(index: ShardIndex) -> list[int]:
    """The image's number of every sample in the order of the shards."""
    return [int(key) for shard in index.shards for key in shard.columns().keys]


# The index.


def test_all_samples_with_their_labels(index: ShardIndex, numbers: list[int]):
    assert len(index) == N and index.counts.tolist() == [7] * 7 + [4]
    assert sorted(numbers) == list(range(N)) and numbers != sorted(numbers)
    assert index.labels().tolist() == LABELS[numbers].tolist()


def test_a_number_is_a_place(index: ShardIndex):
    shard, member = index.place(torch.arange(N))
    places = [(s, m) for s in range(8) for m in range(7 if s < 7 else 4)]
    assert list(zip(shard.tolist(), member.tolist(), strict=True)) == places
    for outside in (-1, N, N + 7):
        with pytest.raises(IndexError):
            index.place(torch.tensor([0, outside]))


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        [0],
        [52],
        [6, 7, 8],
        [51, 3, 3, 20, 19, 21],
        list(range(7, 14)),
        list(range(52, -1, -1)),
    ],
)
def test_chosen_samples(index: ShardIndex, numbers: list[int], chosen: list[int]):
    """Numbered by shard and then as given, each with its own label, image and key."""
    few = index.choose(torch.tensor(chosen, dtype=torch.int64))
    truth = [numbers[c] for c in sorted(chosen, key=lambda c: c // 7)]
    assert few.counts.tolist() == [sum(c // 7 == s for c in chosen) for s in range(8)]
    assert len(few) == len(chosen)
    assert few.labels().tolist() == LABELS[truth].tolist()
    samples = Samples(few, 3, CentreCrop(9, 8))
    assert keys_of(samples, list(range(len(chosen)))) == [f"{n:08d}" for n in truth]
    for i, number in enumerate(truth):
        np.testing.assert_array_equal(samples[i]["input"].permute(1, 2, 0), IMAGES[number])
    with pytest.raises(IndexError):
        samples[len(chosen)]


def test_a_choice_of_a_choice(index: ShardIndex, numbers: list[int]):
    """The second choice counts in the numbers that the first one gave."""
    few = index.choose(torch.tensor([30, 2, 51, 1, 16]))  # numbered 2, 1, 16, 30, 51
    fewer = few.choose(torch.tensor([4, 0, 2]))
    assert fewer.labels().tolist() == LABELS[[numbers[n] for n in (2, 16, 51)]].tolist()


@pytest.mark.parametrize("chosen", [[-1], [53], [0, 100]])
def test_a_choice_outside_is_refused(index: ShardIndex, chosen: list[int]):
    with pytest.raises(ValueError, match=r"must be in 0..52"):
        index.choose(torch.tensor(chosen))
    with pytest.raises(ValueError, match=r"must be in 0..2"):
        index.choose(torch.tensor([1, 2, 3])).choose(torch.tensor([3]))


def test_columns_of_few_shards_are_remembered(
    index: ShardIndex, numbers: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples_module, "REMEMBERED_SHARDS", 2)
    assert index.labels().tolist() == LABELS[numbers].tolist()
    assert len(index._columns) == 2
    samples = Samples(index, 3, CentreCrop(9, 8))
    for i in (52, 0, 20, 52, 1):
        assert keys_of(samples, [i]) == [f"{numbers[i]:08d}"]


# Samples.


def keys_of(samples: Samples, positions: list[int]) -> list[str]:
    return [key for _, key in samples.names(positions)]


def samples_of(index: ShardIndex, seed: int = 3) -> Samples:
    order = EpochOrder(index.counts, BATCH, seed, block=5)
    return Samples(index, 3, Augment(6, 6), order, seed)


def test_a_sample_is_its_image_cropped_by_its_position(index: ShardIndex, numbers: list[int]):
    """Crop and flip by PIL from the numbers of the position; which image, from the order."""
    samples = samples_of(index)
    assert samples.order is not None
    for position in (0, 5, 47, 48, 1000, 10**9):
        got = samples[position]
        shard, member = samples.order.locate(torch.tensor([position]))
        number = numbers[int(shard) * 7 + int(member)]
        assert keys_of(samples, [position]) == [f"{number:08d}"]
        assert int(got["label"]) == LABELS[number] and int(got["position"]) == position
        u = uniform(3, "crop", torch.tensor([position]), UNIFORMS)[0]
        top, left, height, width = Augment(6, 6).box(9, 8, u.tolist())
        crop = Image.fromarray(IMAGES[number]).crop((left, top, left + width, top + height))
        truth = np.asarray(crop.resize((6, 6), Image.Resampling.BICUBIC)).astype(int)
        truth = truth[:, ::-1] if u[-1] < 0.5 else truth
        assert np.abs(got["input"].permute(1, 2, 0).numpy() - truth).max() <= 1


def test_a_batch_is_its_samples(index: ShardIndex):
    samples, positions = samples_of(index), [0, 3, 60, 2, 10**7]
    batch = samples.__getitems__(positions)
    assert batch["input"].dtype == torch.uint8 and batch["input"].shape == (5, 3, 6, 6)
    assert batch["label"].dtype == batch["position"].dtype == torch.int64
    for i, position in enumerate(positions):
        one = samples[position]
        assert one.keys() == batch.keys()
        assert all(torch.equal(one[name], batch[name][i]) for name in one)


def test_samples_travel_to_processes_of_any_kind(index: ShardIndex):
    """Python 3.14 starts loader processes by pickling; also after reading, with open files."""
    samples, positions = samples_of(index), list(range(24))
    before = samples.__getitems__(positions)
    travelled = pickle.loads(pickle.dumps(samples))
    after = travelled.__getitems__(positions)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_sees_every_sample_in_order(index: ShardIndex, numbers: list[int]):
    samples = Samples(index, 3, CentreCrop(9, 8))
    batch = samples.__getitems__(list(range(N)))
    np.testing.assert_array_equal(batch["input"].permute(0, 2, 3, 1), IMAGES[numbers])
    assert batch["label"].tolist() == LABELS[numbers].tolist()
    assert len(samples) == N


def test_gray(index: ShardIndex, numbers: list[int]):
    image = Samples(index, 1, CentreCrop(9, 8))[0]["input"][0].numpy()
    truth = np.asarray(Image.fromarray(IMAGES[numbers[0]]).convert("L"))
    assert np.abs(image.astype(int) - truth).max() <= 1


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("folder/broken.jpg")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"wrong"))
    samples = Samples(ShardIndex(open_shards(str(tmp_path / "a.tar"))), 3, CentreCrop(4, 4))
    with pytest.raises(ValueError, match=r"a.tar, sample folder/broken: cannot decode the image"):
        samples[0]


# The stream.


def whole_run(
    index: ShardIndex, world_size: int, accumulation: int, start: int = 0
) -> dict[int, list[tuple[str, bytes]]]:
    """Global step -> (key, pixels) by rank, micro-batch and sample, for 3 epochs of 2 steps."""
    steps: dict[int, list[tuple[str, bytes]]] = {}
    for rank in range(world_size):
        samples = samples_of(index)
        stream = Stream(BATCH, 6, world_size, rank, accumulation)
        stream.start = start
        for i, positions in enumerate(stream):
            assert len(positions) == stream.micro_batch == BATCH // world_size // accumulation
            pixels = [image.numpy().tobytes() for image in samples.__getitems__(positions)["input"]]
            step = steps.setdefault(start // BATCH + i // accumulation, [])
            step += zip(keys_of(samples, positions), pixels, strict=True)
    return steps


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[int, list[tuple[str, bytes]]]:
    """The whole run, sample by sample."""
    samples = samples_of(ShardIndex(open_shards(str(folder / "train-*.tar"))))
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
    stream = Stream(BATCH, 6, world_size, 0, accumulation)
    stream.start = done * BATCH
    assert len(stream) == 6 * accumulation


def test_an_epoch_of_the_stream_holds_every_sample_but_the_tail(truth: dict[int, Any]):
    for epoch in range(3):
        keys = [key for step in (2 * epoch, 2 * epoch + 1) for key, _ in truth[step]]
        assert len(set(keys)) == len(keys) == 48


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch 12 is not divisible by 5 processes x 1"):
        Stream(12, 1, 5, 0, 1)
    with pytest.raises(ValueError, match="batch 12 is not divisible by 4 processes x 2"):
        Stream(12, 1, 4, 0, 2)


def test_a_loader_with_processes_gives_the_same_batches(index: ShardIndex):
    stream = Stream(BATCH, 3, 1, 0, 1)
    loader = DataLoader(
        samples_of(index), batch_sampler=stream, num_workers=2, collate_fn=lambda batch: batch
    )
    for batch, positions in zip(loader, stream, strict=True):
        truth = samples_of(index).__getitems__(positions)
        assert all(torch.equal(batch[name], truth[name]) for name in truth)


# Validation.


@pytest.mark.parametrize("samples", [0, 1, 7, 53])
@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_each_sample_once_in_equal_batches(
    samples: int, batch: int, world_size: int
):
    ranks = [list(Numbered(samples, batch, world_size, rank)) for rank in range(world_size)]
    read = [number for batches in ranks for numbers in batches for number in numbers]
    dropped = Numbered(samples, batch, world_size).dropped
    assert read == list(range(samples - dropped)) and dropped < world_size
    for rank, batches in enumerate(ranks):
        assert [len(b) for b in batches] == [len(b) for b in ranks[0]]
        assert all(len(b) <= batch for b in batches)
        assert len(Numbered(samples, batch, world_size, rank)) == len(batches)
