"""Features of every sample, once, in order: in memory, in files, from loader processes."""

import shutil
from pathlib import Path

import pytest
import torch

from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.evaluate.feature_files import feature_folder, write_features
from maepretrain.evaluate.feature_sets import pixels
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.processes import Processes
from maepretrain.workflows.quickstart import digits


@pytest.fixture
def data(shards: Path) -> ShardData:
    return ShardData(f"{shards}/train-*.tar", global_batch=24, image_size=8, channels=1,
                     mean=(0.0,), std=(1.0,), crop=Crop(scale=None, val_share=1.0))  # fmt: skip


def expected(data: ShardData) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels of the digits that were written; keys are their numbers."""
    train, _ = digits()
    names = data.evaluation(data.index).names(list(range(len(data.index))))
    numbers = [int(key) for _, key in names]
    assert sorted(numbers) == list(range(150))
    images = torch.from_numpy(train.images[numbers])
    return images.flatten(1).float() / 255, torch.from_numpy(train.labels[numbers])


@pytest.mark.parametrize("workers", [0, 2])
def test_embedding_keeps_order_and_takes_every_sample_once(data: ShardData, workers: int) -> None:
    state = torch.get_rng_state()
    features, labels = embed(pixels, data.evaluation(data.index), batch=32, workers=workers)
    right, truth = expected(data)
    assert torch.equal(features, right)
    assert torch.equal(labels, truth.long())
    assert torch.equal(torch.get_rng_state(), state)


class OneOf(Processes):
    """A rank of several that work one after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def all(self, value: object) -> list[object]:
        return [value]


@pytest.mark.parametrize("world_size", [1, 4, 160])
def test_files_hold_every_sample_once_whatever_the_processes(
    tmp_path: Path, data: ShardData, world_size: int
) -> None:
    right, truth = expected(data)
    widths = {"pixels": 64, "half": 32}
    samples, files = data.evaluation(data.index), None
    for rank in range(world_size):
        processes = OneOf(rank, world_size)
        if rank < world_size - 1:
            with pytest.raises(FileNotFoundError):  # the ranks after it have not been here
                write_features(views, widths, samples, tmp_path / "train", processes, 7)
        else:
            files = write_features(views, widths, samples, tmp_path / "train", processes, 7)
    assert files is not None
    assert len(files) == 150
    assert torch.equal(files.labels, truth.long())
    numbers = torch.randperm(150)
    assert torch.equal(files.rows(numbers, "pixels"), right[numbers].half().float())
    both = torch.cat([right, right[:, :32]], 1).half().float()
    assert torch.equal(files.rows(numbers), both[numbers])
    assert torch.equal(files.rows(numbers[:3], "half"), right[numbers[:3], :32].half().float())


def views(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"half": pixels(images)[:, :32], "pixels": pixels(images)}


def test_features_beyond_fp16_are_refused(tmp_path: Path, data: ShardData) -> None:
    with pytest.raises(ValueError, match="beyond the 65,504 that fp16 files hold"):
        write_features(
            lambda images: {"large": 1e6 * pixels(images)},
            {"large": 64},
            data.evaluation(data.index),
            tmp_path / "train",
            Processes(),
        )


def test_a_disk_too_small_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(ValueError, match=r"the features take [\d.]+ GB and .* GB free"),
        feature_folder(tmp_path, 2 * free, Processes()),
    ):
        pass
    with feature_folder(tmp_path / "cache", 3_000_000, Processes()) as folder:
        assert "3.0 MB" in capsys.readouterr().out
        (folder / "file").touch()
    assert list((tmp_path / "cache").iterdir()) == []
