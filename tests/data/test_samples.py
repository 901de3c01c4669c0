"""From positions to pixels: which image, which crop, and what takes the place of a bad one."""

import io
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maepretrain.data import samples as samples_module
from maepretrain.data.batch import Batch
from maepretrain.data.errors import (
    CORRUPT_INPUT,
    CUT_OFF_INPUT,
    KINDS,
    WRONG_LABEL_ERROR,
    ErrorRow,
    ShardError,
    Unreadable,
)
from maepretrain.data.order import EpochOrder, Mixture
from maepretrain.data.samples import Samples, ShardIndex
from maepretrain.data.shards.index import Shard, open_shards
from maepretrain.data.shards.reader import Store
from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.tar import Columns
from maepretrain.data.shards.write import write_shards
from maepretrain.data.transforms import UNIFORMS, Augment, CentreCrop, SignalCrop
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
    shard, sample = index.locate(torch.arange(N))
    places = [(s, m) for s in range(8) for m in range(7 if s < 7 else 4)]
    assert list(zip(shard.tolist(), sample.tolist(), strict=True)) == places
    for outside in (-1, N, N + 7):
        with pytest.raises(IndexError):
            index.locate(torch.tensor([0, outside]))


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
        shard, sample = samples.order.locate(torch.tensor([position]))
        number = numbers[int(shard) * 7 + int(sample)]
        assert keys_of(samples, [position]) == [f"{number:08d}"]
        assert int(got["label"]) == LABELS[number] and int(got["position"]) == position
        u = uniform(3, "crop", torch.tensor([position]), UNIFORMS)[0]
        top, left, height, width = Augment(6, 6).box(9, 8, u.tolist())
        crop = Image.fromarray(IMAGES[number]).crop((left, top, left + width, top + height))
        truth = np.asarray(crop.resize((6, 6), Image.Resampling.BICUBIC)).astype(int)
        truth = truth[:, ::-1] if u[-1] < 0.5 else truth
        assert np.abs(got["input"].permute(1, 2, 0).numpy() - truth).max() <= 1


def test_early_positions_have_a_size_of_their_own(index: ShardIndex):
    """The same images, crops and flips, resized to less."""
    large, small = samples_of(index), Augment(4, 3)
    late = Samples(
        index, 3, large.pixels.augment, large.order, 3, low_resolution=small, low_until=48
    )
    early = Samples(index, 3, small, large.order, 3)
    for positions, truth in (([0, 46, 47], early), ([48, 49, 1000], large)):
        batch, expected = late.__getitems__(positions), truth.__getitems__(positions)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


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


# Several crops of an image.


class Counting(Store):
    """The store itself, with a list of what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int]] = []

    def read(self, shard: Shard, columns: Columns, row: int) -> bytes:
        self.reads.append((shard.url, row))
        return super().read(shard, columns, row)


@pytest.mark.parametrize("crops", [2, 3, 4])
def test_consecutive_positions_show_crops_of_one_image(index: ShardIndex, crops: int):
    """Each with the numbers of its own position; the image is read and decoded once."""
    order = EpochOrder(index.counts, BATCH // crops, 3, block=5)
    store = Counting()
    samples = Samples(index, 3, Augment(6, 6), order, 3, crops, store=store)
    alone = Samples(index, 3, Augment(6, 6), order, 3)
    batch = samples.__getitems__(list(range(BATCH)))
    assert len(store.reads) == len(set(store.reads)) == BATCH // crops
    assert keys_of(samples, list(range(BATCH))) == [
        key for key in keys_of(alone, list(range(BATCH // crops))) for _ in range(crops)
    ]
    whole = Samples(index, 3, CentreCrop(9, 8))
    number = {key: i for i, key in enumerate(keys_of(whole, list(range(N))))}
    u = uniform(3, "crop", torch.arange(BATCH), UNIFORMS)
    for position, key in enumerate(keys_of(samples, list(range(BATCH)))):
        image = whole[number[key]]["input"]
        assert torch.equal(batch["input"][position], Augment(6, 6)(image, u[position]))
    pairs = zip(batch["input"][::crops], batch["input"][1::crops], strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_an_epoch_shows_each_image_as_often_as_it_has_crops(index: ShardIndex):
    order = EpochOrder(index.counts, 8, 3, block=5)
    samples = Samples(index, 3, Augment(6, 6), order, 3, crops=3)
    keys = keys_of(samples, list(range(3 * 8 * order.steps_per_epoch)))
    assert all(keys.count(key) == 3 for key in keys) and len(set(keys)) == 48


# Arrays and signals.


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def jpg(number: int) -> bytes:
    """Constant gray: what is cut out of it says which image it was."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (number, number, number)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def opened(path: Path, files: dict[str, bytes]) -> ShardIndex:
    write_tar(path, files)
    return ShardIndex(open_shards(str(path)))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "uint16"])
def test_arrays_of_any_channels_travel_as_images_do(tmp_path: Path, dtype: str):
    random = np.random.default_rng(0)
    arrays = [(random.random((5, 9, 8)) * 200).astype(dtype) for _ in range(6)]
    index = opened(tmp_path / "a.tar", {f"{i}.npy": npy(a) for i, a in enumerate(arrays)})
    whole = Samples(index, 5, CentreCrop(9, 8)).__getitems__(list(range(6)))["input"]
    assert whole.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    np.testing.assert_array_equal(whole.numpy(), np.stack(arrays).astype(whole.numpy().dtype))
    order = EpochOrder(index.counts, 6, 1)
    samples = Samples(index, 5, Augment(4, 4), order, 1)
    batch, keys = samples.__getitems__(list(range(6))), keys_of(samples, list(range(6)))
    u = uniform(1, "crop", torch.arange(6), UNIFORMS)
    for i, key in enumerate(keys):
        assert torch.equal(batch["input"][i], Augment(4, 4)(whole[int(key)], u[i]))


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_signals(tmp_path: Path, dtype: str):
    """At random in training, the centre in evaluation; every step of it lies in the array."""
    arrays = [np.arange(40).astype(dtype) + 50 * i for i in range(4)]
    index = opened(tmp_path / "a.tar", {f"{i}.npy": npy(a) for i, a in enumerate(arrays)})
    centre = Samples(index, 1, SignalCrop(16)).__getitems__([0, 1, 2, 3])["input"]
    assert centre.shape == (4, 1, 16) and str(centre.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(centre[:, 0].numpy(), [a[12:28] for a in arrays])
    samples = Samples(index, 1, SignalCrop(16), EpochOrder(index.counts, 4, 1), 1)
    starts = set()
    for first in range(0, 40, 4):
        positions = list(range(first, first + 4))
        batch, keys = samples.__getitems__(positions), keys_of(samples, positions)
        for crop, key in zip(batch["input"], keys, strict=True):
            start = int(crop[0, 0]) - int(arrays[int(key)][0])
            assert crop[0].tolist() == arrays[int(key)][start : start + 16].tolist()
            starts.add(start)
    assert len(starts) > 10


def test_windows_of_texts_are_bytes_of_the_member(tmp_path: Path):
    """At random in training, the centre in evaluation; short texts end in padding."""
    texts = [bytes(random.Random(i).choices(range(256), k=n)) for i, n in enumerate((40, 16, 5, 1))]
    index = opened(tmp_path / "a.tar", {f"{i}.txt": text for i, text in enumerate(texts)})
    on_disk = (tmp_path / "a.tar").read_bytes()
    centre = Samples(index, 1, SignalCrop(16)).__getitems__([0, 1, 2, 3])["input"]
    assert centre.shape == (4, 1, 16) and centre.dtype == torch.int64
    assert bytes(centre[0, 0].tolist()) == texts[0][12:28]
    samples = Samples(index, 1, SignalCrop(16), EpochOrder(index.counts, 4, 1), 1)
    starts = set()
    for first in range(0, 80, 4):
        positions = list(range(first, first + 4))
        batch, keys = samples.__getitems__(positions), keys_of(samples, positions)
        u = uniform(1, "crop", torch.tensor(positions), UNIFORMS)
        for crop, key, numbers in zip(batch["input"], keys, u, strict=True):
            text = texts[int(key)]
            start = int(float(numbers[0]) * (max(len(text), 16) - 15))
            window = text[start : start + 16]
            assert crop[0].tolist() == [*window, *[256] * (16 - len(window))]
            assert window in on_disk
            starts.add((key, start))
    assert len(starts) > 10


def test_a_text_that_is_empty_or_no_text_is_an_error(tmp_path: Path):
    files = {"a.txt": b"", "b.txt": b"some text", "c.txt": b"", "d.txt": b"more"}
    samples = Samples(opened(tmp_path / "a.tar", files), 1, SignalCrop(4))
    batch = samples.__getitems__([0, 1, 2, 3])
    windows = [bytes(row[0].tolist()) for row in batch["input"]]
    assert windows == [b"me t", b"me t", b"more", b"more"]
    errors = samples.pop_errors(batch)
    assert [(f.kind, f.key, f.replaced_by) for f in errors] == [
        (CORRUPT_INPUT, "a", "b"),
        (CORRUPT_INPUT, "c", "d"),
    ]
    images = Samples(samples.index, 1, CentreCrop(4, 4))
    with pytest.raises(ShardError, match="none of its 4 samples can be read: unreadable input"):
        images[0]
    coloured = Samples(samples.index, 3, SignalCrop(4))
    with pytest.raises(ShardError, match="is no signal of 3 channels"):
        coloured[1]


def test_a_signal_that_is_too_short_or_an_image_is_an_error(tmp_path: Path):
    files = {
        "a.npy": npy(np.zeros((2, 15), dtype=np.float32)),
        "b.npy": npy(np.ones((2, 16), dtype=np.float32)),
        "c.jpg": jpg(3),
        "d.npy": npy(np.ones((3, 16), dtype=np.float32)),
    }
    samples = Samples(opened(tmp_path / "a.tar", files), 2, SignalCrop(16))
    batch = samples.__getitems__([0, 1, 2, 3])
    assert bool((batch["input"] == 1).all())
    errors = samples.pop_errors(batch)
    assert [(f.kind, f.key, f.replaced_by) for f in errors] == [
        (CORRUPT_INPUT, key, "b") for key in "acd"
    ]
    for row in (0, 2, 3):
        with pytest.raises(Unreadable, match=r"length 15 is below 16|1-D signals|no signal of 2"):
            samples._decode(samples.index.shards[0], samples.index.columns(0), row)


# What cannot be read.

SHARDS, MEMBERS = 3, 8


def good(number: int) -> dict[str, bytes]:
    return {f"{number:03d}.jpg": jpg(10 * number), f"{number:03d}.cls": b"%d" % number}


def bad(number: int, kind: str) -> dict[str, bytes]:
    files = good(number)
    name, label = files
    if kind == "noise":
        files[name] = b"\xff\xd8\xff" + np.random.default_rng(number).bytes(300)
    elif kind == "cut":
        files[name] = files[name][: len(files[name]) // 3]
    elif kind == "npy":
        files = {f"{number:03d}.npy": npy(np.zeros((4, 9, 8))), label: files[label]}
    elif kind == "label":
        files[label] = b"cat"
    return files


def faulty(folder: Path, wrong: dict[int, str]) -> ShardIndex:
    """24 images in 3 shards of 8; number n has gray 10n and label n."""
    folder.mkdir()
    for s in range(SHARDS):
        files: dict[str, bytes] = {}
        for number in range(s * MEMBERS, (s + 1) * MEMBERS):
            files |= bad(number, wrong[number]) if number in wrong else good(number)
        write_tar(folder / f"{s}.tar", files)
    return ShardIndex(open_shards(f"{folder}/*.tar"))


def stand_in(number: int, wrong: set[int], chosen: list[int]) -> int:
    """The next readable sample of the same shard, going round: by the rule, from lists alone."""
    shard = [n for n in chosen if n // MEMBERS == number // MEMBERS]
    begin = shard.index(number)
    return next(n for n in shard[begin:] + shard[:begin] if n not in wrong)


def epochs(index: ShardIndex, crops: int, labelled: bool) -> tuple[Samples, Batch]:
    """Two epochs, the tail dropped."""
    order = EpochOrder(index.counts, 4, 7, block=3)
    samples = Samples(index, 3, Augment(5, 5), order, 7, crops, labelled=labelled)
    return samples, samples.__getitems__(list(range(2 * 4 * crops * order.steps_per_epoch)))


FAULTY: dict[str, tuple[dict[int, str], list[int] | None]] = {
    "one": ({9: "noise"}, None),
    "cut": ({0: "cut", 23: "cut"}, None),
    "array": ({5: "npy"}, None),
    "wrong label": ({5: "label", 20: "noise"}, None),
    "in a row, round the end": ({14: "noise", 15: "cut", 8: "label", 9: "npy"}, None),
    "all but one of a shard": ({n: "noise" for n in range(16, 24) if n != 18}, None),
    "of a choice": ({2: "noise", 7: "label", 11: "cut"}, [0, 2, 3, 6, 7, 11, 12, 20, 21, 22]),
    "a choice in any order": ({6: "noise", 1: "cut"}, [6, 1, 4, 0, 17, 16, 9, 12]),
}


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("case", FAULTY.values(), ids=FAULTY.keys())
def test_what_cannot_be_read_is_replaced_and_nothing_else_moves(
    tmp_path: Path, case: tuple[dict[int, str], list[int] | None], crops: int
):
    """Bit for bit the epochs over intact shards, but where the bad samples were; there, the crop
    that the position's numbers choose from the next readable sample of the shard."""
    wrong, chosen = case
    whole, damaged = faulty(tmp_path / "whole", {}), faulty(tmp_path / "damaged", wrong)
    if chosen is not None:
        whole, damaged = (index.choose(torch.tensor(chosen)) for index in (whole, damaged))
    (before, intact), (samples, batch) = (epochs(i, crops, True) for i in (whole, damaged))
    # Chosen samples are numbered by shard, then as they were given.
    kept = sorted(chosen or range(24), key=lambda n: n // MEMBERS)
    keys = keys_of(before, intact["position"].tolist())
    assert keys_of(samples, batch["position"].tolist()) == keys
    expected, replaced = [], 0
    for p, key in enumerate(keys):
        number = int(key)
        instead = stand_in(number, set(wrong), kept)
        assert int(batch["label"][p]) == instead
        if number in wrong:
            replaced += 1
            kind = WRONG_LABEL_ERROR if wrong[number] == "label" else CORRUPT_INPUT
            shard = str(tmp_path / "damaged" / f"{number // MEMBERS}.tar")
            expected.append(ErrorRow(kind, shard, key, p, f"{instead:03d}"))
            assert KINDS[int(batch["error"][p, 0])] == kind
            assert bool((batch["input"][p] == 10 * instead).all())
        else:
            assert batch["error"][p, 0] == 0
            assert torch.equal(batch["input"][p], intact["input"][p])
    assert replaced >= crops
    assert samples.pop_errors(batch) == expected and "error" not in batch
    assert before.pop_errors(intact) == []


def test_the_stand_in_is_cropped_by_the_numbers_of_the_position(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    names = ("whole", "damaged")
    for name in names:
        (tmp_path / name).mkdir()
        files = {f"{i}.npy": npy(image) for i, image in enumerate(images)}
        write_tar(tmp_path / f"{name}.tar", files | ({"0.npy": b"x"} if name == "damaged" else {}))
    indexes = [ShardIndex(open_shards(f"{tmp_path}/{name}.tar")) for name in names]
    order = EpochOrder(indexes[0].counts, 2)
    damaged = Samples(indexes[1], 3, Augment(5, 5), order, 4).__getitems__([0, 1, 2, 3])
    u = uniform(4, "crop", torch.arange(4), UNIFORMS)
    image = torch.from_numpy(images[1]).permute(2, 0, 1)
    for p in range(4):
        assert torch.equal(damaged["input"][p], Augment(5, 5)(image, u[p]))


def test_a_member_that_the_shard_no_longer_holds_is_replaced(tmp_path: Path):
    """A disk that lost the end of a file after the run began."""
    index = faulty(tmp_path / "a", {})
    shard, columns = index.shards[1], index.columns(1)
    with shard.path.open("r+b") as file:
        file.truncate(int(columns.offset[6]) + 20)
    samples = Samples(index, 3, CentreCrop(5, 5))
    batch = samples.__getitems__(list(range(24)))
    assert batch["label"].tolist() == [*range(14), 8, 8, *range(16, 24)]
    assert samples.pop_errors(batch) == [
        ErrorRow(CUT_OFF_INPUT, shard.url, f"{n:03d}", n, "008") for n in (14, 15)
    ]


@pytest.mark.parametrize("chosen", [None, [0, 8, 9, 17]])
def test_a_shard_without_any_readable_sample_is_named(tmp_path: Path, chosen: list[int] | None):
    """With a choice: of those that were chosen."""
    wrong = {n: "noise" for n in (chosen or range(8, 16)) if 8 <= n < 16}
    index = faulty(tmp_path / "a", wrong)
    if chosen is not None:
        index = index.choose(torch.tensor(chosen))
    samples = Samples(index, 3, CentreCrop(5, 5))
    reason = rf"1.tar: none of its {len(wrong)} samples can be read: unreadable input, cannot"
    with pytest.raises(ShardError, match=reason) as caught:
        samples.__getitems__(list(range(len(index))))
    assert "\n" not in str(caught.value)


def test_labels_that_are_none_and_wrong(tmp_path: Path):
    files = {"a.jpg": jpg(1), "b.jpg": jpg(2), "b.cls": b"cat", "c.jpg": jpg(3), "c.cls": b"4"}
    index = opened(tmp_path / "a.tar", files)
    assert index.labels().tolist() == [-1, -2, 4]
    # Without labels a wrong one does no harm, and no model sees -2.
    samples = Samples(index, 3, CentreCrop(10, 10))
    batch = samples.__getitems__([0, 1, 2])
    assert batch["label"].tolist() == [-1, -1, 4] and samples.pop_errors(batch) == []
    labelled = Samples(index, 3, CentreCrop(10, 10), labelled=True).__getitems__([0, 1, 2])
    assert labelled["label"].tolist() == [-1, 4, 4]
    with pytest.raises(ValueError, match="a probe needs a label for every sample; some have none"):
        index.require_labels("a probe")
    assert index.choose(torch.tensor([1, 2])).require_labels("a probe").tolist() == [-2, 4]


def test_shards_of_other_bytes_are_no_errors_of_samples(tmp_path: Path):
    """The index is wrong for all of them: the run must not go on with what stands there now."""
    index = opened(tmp_path / "a.tar", {"a.jpg": jpg(1), "b.jpg": jpg(1)})
    write_tar(tmp_path / "a.tar", {"b.jpg": jpg(1), "a.jpg": jpg(1)})
    with pytest.raises(ShardError, match=r"a.tar was changed after its index was made"):
        Samples(index, 3, CentreCrop(5, 5)).__getitems__([0])


def test_shards_of_positions(index: ShardIndex):
    order = EpochOrder(index.counts, BATCH, 3, block=5)
    samples = Samples(index, 3, Augment(6, 6), order, 3)
    positions = torch.tensor([5, 0, 30, 5, 47])
    named = [shard for shard, _ in samples.names(positions.tolist())]
    assert [shard.url for shard in samples.shards(positions)] == list(dict.fromkeys(named))


def test_samples_of_a_mixture(tmp_path: Path, index: ShardIndex):
    """Shards are numbered through the sources."""
    other = opened(tmp_path / "other.tar", {f"x{i}.jpg": jpg(i) for i in range(5)})
    both = ShardIndex([*index.shards, *other.shards])
    order = Mixture([index.counts, other.counts], [3.0, 1.0], 8)
    samples = Samples(both, 3, Augment(6, 6), order)
    keys = keys_of(samples, list(range(80)))
    assert [sum(k.startswith("x") for k in keys[i : i + 8]) for i in range(0, 80, 8)] == [2] * 10
    drawn = [key for key in keys if key.startswith("x")]
    assert [sorted(drawn[i : i + 5]) for i in (0, 5, 10, 15)] == [[f"x{i}" for i in range(5)]] * 4


def test_batches_hold_what_is_promised(index: ShardIndex):
    samples = Samples(index, 3, CentreCrop(9, 8))
    batch = samples.__getitems__([0, 1])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "input": (torch.uint8, (2, 3, 9, 8)),
        "position": (torch.int64, (2,)),
        "label": (torch.int64, (2,)),
        "error": (torch.int64, (2, 2)),
    }
    assert all(isinstance(value, Tensor) for value in samples[0].values())
