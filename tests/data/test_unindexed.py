"""Plain streaming: what is read, what is refused, and what a run says of it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from maepretrain.data.errors import ErrorList, ShardError
from maepretrain.data.sampler import RunSampler
from maepretrain.data.samples import Pixels
from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.data.transforms import Augment
from maepretrain.data.unindexed import UnindexedBatches, UnindexedOrder, unindexed_sources

N, SIDE = 40, 8
# Each image is one level of gray, so that it can be told from its pixels.
LEVELS = np.arange(N) * 6
WHOLE = Augment(SIDE, SIDE, scale=None, flip=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 gray images in 4 shards of 10; the label is the image's number."""
    folder = tmp_path_factory.mktemp("plain")
    images = np.broadcast_to(LEVELS[:, None, None], (N, SIDE, SIDE)).astype(np.uint8)
    write_shards(Arrays(images, np.arange(N)), folder, samples_per_shard=10)
    return folder


def reading(
    patterns: str | list[str],
    errors: Path,
    sampler: RunSampler,
    seed: int = 0,
    crops: int = 1,
    augment: Augment = WHOLE,
    pipe: bool = False,
) -> UnindexedBatches:
    urls, listing = unindexed_sources(patterns, pipe), ErrorList(errors / "errors.csv", N, 0.0)
    return UnindexedBatches(urls, sampler, Pixels(1, augment), seed, crops, listing)


def numbers(sampler: UnindexedBatches, workers: int = 0) -> list[int]:
    """The images' numbers by their pixels, which the labels must agree with."""
    read = []
    for batch in DataLoader(sampler, batch_size=None, num_workers=workers):
        assert batch["input"].dtype == torch.uint8
        assert torch.equal(batch["input"].amax((1, 2, 3)), batch["input"].amin((1, 2, 3)))
        assert (batch["input"][:, 0, 0, 0] // 6).tolist() == batch["label"].tolist()
        assert not batch["error"].any()
        read += batch["label"].tolist()
    return read


@pytest.mark.parametrize("workers", [0, 2])
def test_one_reader_of_a_shard_gives_each_sample_once_a_pass(
    folder: Path, tmp_path: Path, workers: int
):
    """Two ranks share 4 shards out; both processes of a rank have equally many samples."""
    read = []
    for rank in range(2):
        sampler = RunSampler(10, 8, world_size=2, rank=rank, accumulation=1)
        read += numbers(reading(f"{folder}/train-*.tar", tmp_path, sampler), workers)
    assert Counter(read) == dict.fromkeys(range(N), 2)


def test_fewer_shards_than_readers_are_read_by_all(folder: Path, tmp_path: Path):
    sampler = RunSampler(20, 4, world_size=1, rank=0, accumulation=1)
    read = numbers(reading(f"{folder}/train-000000.tar", tmp_path, sampler), workers=2)
    assert Counter(read) == dict.fromkeys(read, 8) and len(set(read)) == 10


def test_positions_are_those_of_the_stream_and_seeds_shuffle(folder: Path, tmp_path: Path):
    sampler = RunSampler(20, 4, world_size=2, rank=1, accumulation=1)
    sampler.start = 20
    plain = reading(f"{folder}/train-*.tar", tmp_path, sampler)
    batches = list(DataLoader(plain, batch_size=None, num_workers=2))
    assert [batch["position"].tolist() for batch in batches] == list(sampler)
    orders = [
        numbers(reading(f"{folder}/train-*.tar", tmp_path, sampler, seed)) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_several_crops_come_from_one_image(folder: Path, tmp_path: Path):
    """Gray levels tell the image; the numbers of the position tell the crop."""
    sampler = RunSampler(12, 2, world_size=1, rank=0, accumulation=1)
    read = numbers(reading(f"{folder}/train-*.tar", tmp_path, sampler, crops=3))
    assert read[::3] == read[1::3] == read[2::3] and len(set(read[::3])) == 8


def test_a_command_needs_a_switch_and_then_runs(folder: Path, tmp_path: Path):
    pattern = f"pipe:cat {folder}/train-00000{{0..3}}.tar"
    with pytest.raises(
        ShardError, match=r"runs a command in a shell: allow it by --data.order.allow_p"
    ):
        unindexed_sources(pattern, allow_pipe=False)
    sampler = RunSampler(40, 1, world_size=1, rank=0, accumulation=1)
    read = numbers(reading(pattern, tmp_path, sampler, pipe=True))
    assert sorted(read) == list(range(N))


def test_an_address_is_never_given_to_a_shell(tmp_path: Path):
    """webdataset itself would call curl through one."""
    sampler = RunSampler(2, 1, world_size=1, rank=0, accumulation=1)
    url = f"http://127.0.0.1:9/$(touch {tmp_path}/ran)'; touch {tmp_path}/ran; '.tar"
    with pytest.raises(ShardError, match="no sample can be read from http"):
        next(iter(reading(url, tmp_path, sampler)))
    assert not (tmp_path / "ran").exists()
    assert "damaged shard" in (tmp_path / "errors.csv").read_text()


def test_a_damaged_shard_is_listed_and_left(folder: Path, tmp_path: Path):
    whole = (folder / "train-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "text.tar").write_bytes(b"no tar" * 500)
    shards = [f"{tmp_path}/cut.tar", f"{tmp_path}/text.tar", f"{folder}/train-000001.tar"]
    sampler = RunSampler(10, 6, world_size=1, rank=0, accumulation=1)
    read = numbers(reading(shards, tmp_path, sampler))
    listed = (tmp_path / "errors.csv").read_text()
    assert len(read) == 60 and set(Counter(read).values()) <= {3, 4, 5}
    assert listed.count("damaged shard") >= 2 and "cut.tar" in listed and "text.tar" in listed


def test_too_many_unreadable_images_end_it(tmp_path: Path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(12):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"wrong"))
    sampler = RunSampler(2, 1, world_size=1, rank=0, accumulation=1)
    with pytest.raises(ShardError, match="11 errors in 40 samples, more than the 10"):
        next(iter(reading(f"{tmp_path}/a.tar", tmp_path, sampler)))


def test_a_text_beside_an_image_is_its_caption(tmp_path: Path):
    """Also where it comes first in the tar."""
    import io
    import tarfile

    from PIL import Image

    picture = io.BytesIO()
    Image.new("L", (8, 8), 7).save(picture, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("a.txt", b"seven"),
            ("a.webp", picture.getvalue()),
            ("a.cls", b"1"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sampler = RunSampler(2, 1, world_size=1, rank=0, accumulation=1)
    assert numbers(reading(f"{tmp_path}/a.tar", tmp_path, sampler)) == [1, 1]


def test_an_epoch_is_a_number_of_draws():
    order = UnindexedOrder(16, 100)
    assert order.steps_per_epoch == 6 and "exact resume is off" in order.describe()
    with pytest.raises(ValueError, match="samples_per_epoch 15 holds no batch of 16"):
        UnindexedOrder(16, 15)


def test_pretraining_says_that_exact_resume_is_off(
    shards: Path,
    pretrain_tiny: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    pattern = f"pipe:cat {shards}/train-00000{{0..3}}.tar"
    plain = [
        "--data.train",
        pattern,
        "--data.order.exact",
        "false",
        "--data.order.samples_per_epoch",
        "72",
    ]
    run = tmp_path / "run"
    assert pretrain_tiny(run, *plain) == 2
    assert "--data.order.allow_pipe" in capsys.readouterr().err
    plain += ["--data.order.allow_pipe", "true"]
    assert pretrain_tiny(run, *plain, "--trainer.max_epochs", "2") == 0
    out = capsys.readouterr().out
    assert "72 draws by webdataset's pipeline; exact resume is off" in out
    assert "6 steps, 2 epochs of 3" in out
    assert pretrain_tiny(run, *plain, "--trainer.max_epochs", "3", "--resume") == 0
    assert len((run / "metrics.csv").read_text().splitlines()) >= 9
