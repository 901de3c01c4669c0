"""Images that applications are given: beside PIL, NumPy and the arrays that the shards were made
of."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maepretrain.apply.inputs import read_images
from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]


def shown(channels: int = 1, size: int | list[int] = 8, val: str | None = None) -> ShardData:
    flat = ((0.0,) * channels, (1.0,) * channels)
    return ShardData(None, val, 1, size, channels, mean=flat[0], std=flat[1], crop=Crop(scale=None))


def test_a_file_is_decoded_cropped_and_resized_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smooth = np.add.outer(np.arange(40), np.arange(60))[..., None] * np.array([2, 1, 0.5])
    picture = Image.fromarray(smooth.astype(np.uint8))
    picture.save(tmp_path / "a.png")
    inputs = read_images([str(tmp_path / "a.png")], shown())
    theirs = picture.convert("L").crop((10, 0, 50, 40)).resize((8, 8), Image.Resampling.BICUBIC)
    assert inputs.names == ["a"]
    apart = inputs.values[0, 0].int() - torch.from_numpy(np.asarray(theirs).astype(np.int32))
    assert int(apart.abs().max()) <= 1
    said = "images        1 of 40x60 RGB: taken as gray, the centre of it resized to 8x8\n"
    assert capsys.readouterr().out == said


def test_files_that_fit_are_given_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    (tmp_path / "deeper").mkdir()
    for name, image in zip(("b.png", "a.png", "deeper/c.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    inputs = read_images([str(tmp_path)], shown())
    assert inputs.names == ["a", "b", "c"]
    assert np.array_equal(inputs.values[:, 0].numpy(), pixels[[1, 0, 2]])
    assert capsys.readouterr().out == ""
    assert read_images([str(tmp_path)], shown(), 2).names == ["a", "b"]
    assert "the first 2 of 3" in capsys.readouterr().out


def test_signals_and_arrays(tmp_path: Path) -> None:
    signal = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)
    np.save(tmp_path / "a.npy", signal)
    inputs = read_images([str(tmp_path / "a.npy")], shown(2, [10]))
    assert np.array_equal(inputs.values[0].numpy(), signal[:, 5:15])
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    np.save(tmp_path / "c.npy", np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match="one kind"):
        read_images([str(tmp_path / "b.png"), str(tmp_path / "c.npy")], shown())


def test_held_out_samples_by_key_or_the_first(shards: Path) -> None:
    data = shown(val=f"{shards}/test-*.tar")
    first = read_images([], data, 45)
    truth = digits()[1].images[[int(name) for name in first.names]]
    assert np.array_equal(first.values[:, 0].numpy(), truth)
    # One of each shard, the later first.
    keys = [first.names[44], first.names[3]]
    named = read_images(keys, data)
    assert named.names == keys
    assert np.array_equal(named.values[:, 0].numpy(), truth[[44, 3]])


def test_a_run_without_its_shards_takes_files(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(applied("data/fashion_mnist+recipe/variational"), run)
    config = (run / "config.yaml").read_text()
    there = config.partition("train: ")[2].partition("/train-")[0]
    (run / "config.yaml").write_text(config.replace(there, "/nowhere"))
    Image.fromarray(digits()[1].images[0]).save(tmp_path / "a.png")
    options = ["reconstruct", "--encoder", run, "--out", tmp_path / "out.png"]
    assert run_cli(*options, "--images", tmp_path / "a.png") == 0
    assert run_cli(*options) == 2
    assert "/nowhere/test-*.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        (["nothing.png"], "image nothing.png: no file, no folder, no held-out key of that name"),
        (["damaged.png"], "damaged.png: cannot decode the image"),
        (["empty"], "the folder empty holds no images"),
    ],
)
def test_mistakes_are_one_line(
    named: list[str],
    rule: str,
    applied: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = applied("data/fashion_mnist+recipe/variational")
    monkeypatch.chdir(tmp_path)
    Path("damaged.png").write_bytes(b"\x89PNG and no more")
    Path("empty").mkdir()
    assert run_cli("reconstruct", "--encoder", run, "--out", "a.png", "--images", *named) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1
    assert not Path("a.png").exists()


def test_without_held_out_shards_images_are_named() -> None:
    with pytest.raises(ValueError, match="name files with --images"):
        read_images([], shown())
    with pytest.raises(ValueError, match="n 0 must be at least 1"):
        read_images([], shown(), 0)
