"""Denoising autoencoders: they repair held-out images better than leaving them or a median filter
does, and their noise is the same on two real processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scipy.ndimage import median_filter
from small import digit_images, fit
from support.runs import assert_close_weights, column
from torch import Tensor

from maepretrain.models.autoencoders.coders import Convolutional, Dense
from maepretrain.models.autoencoders.corruption import Corruption, Kind
from maepretrain.models.autoencoders.denoising import Denoising


def mse(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().item()


def make_dense() -> Dense:
    return Dense(8, 1, [128, 64], likelihood="bernoulli")


def make_convolutional() -> Convolutional:
    return Convolutional(8, 1, [12, 12], code_activation="none", likelihood="bernoulli")


@pytest.mark.parametrize(
    ("coder", "corruption", "amount"),
    [
        (make_dense, "masking", 0.3),
        (make_dense, "masking", 0.5),
        (make_dense, "gaussian", 0.5),
        (make_dense, "salt_and_pepper", 0.4),
        (make_convolutional, "gaussian", 0.5),
    ],
)
def test_denoises_better_than_identity_and_median_filter(
    coder: Callable[[], Any], corruption: Any, amount: float
) -> None:
    torch.manual_seed(0)
    model = Denoising(coder(), corruption, amount)
    train, test = digit_images()
    fit(model, train, 150, 1e-2)
    # Noise that was not seen in training.
    noisy = model.corrupt(test, torch.arange(10**6, 10**6 + 360))
    filtered = [
        torch.from_numpy(median_filter(noisy.numpy(), (1, 1, side, side))) for side in (2, 3)
    ]
    repaired = mse(model.denoise(noisy), test)
    assert repaired < 0.5 * mse(noisy, test)
    assert repaired < 0.6 * min(mse(f, test) for f in filtered)
    # Not by the mean image, which needs no look at the input.
    assert repaired < 0.75 * mse(train.mean(0).expand_as(test), test)


@pytest.mark.parametrize("corruption", ["shuffle", "geometric", "colour"])
def test_repairs_what_is_done_to_images(corruption: Any) -> None:
    torch.manual_seed(0)
    model = Denoising(make_dense(), corruption, 0.4)
    train, test = digit_images()
    fit(model, train, 100, 1e-2)
    spoilt = model.corrupt(test, torch.arange(10**6, 10**6 + 360))
    assert mse(model.denoise(spoilt), test) < 0.85 * mse(spoilt, test)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_loss_is_of_the_clean_input(kind: Any) -> None:
    model = Denoising(Dense(8, 1, [12]), kind, 0.5, seed=7)
    x = digit_images()[1][:6]
    position = torch.arange(90, 96)
    noisy = Corruption(kind, 0.5, seed=7)(x, position)
    told = model({"input": x, "position": position})
    decoded = model.coder.mean(model.coder.encode(noisy))
    assert told["loss"].item() == pytest.approx(mse(decoded, x), rel=1e-5)
    assert told["corrupted_mse"].item() == pytest.approx(mse(noisy, x), rel=1e-5)
    told["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.encode(x), model.coder.encode(x))


def test_pictures_show_what_was_corrupted() -> None:
    model = Denoising(Dense(8, 1, [12]), "masking", 0.5)
    x = digit_images()[1][:6] + 0.1
    shown = model.reconstruct(x)
    assert shown._fields == ("original", "corrupted", "denoised", "reconstruction")
    assert torch.equal(shown.original, x)
    assert ((shown.corrupted == 0).flatten(1).sum(1) == 32).all()
    assert torch.equal(shown.denoised, model.denoise(shown.corrupted))
    assert torch.equal(shown.reconstruction, model.denoise(x))
    assert torch.equal(model.reconstruct(x).corrupted, shown.corrupted)
    assert model.summary()["corruption"] == "masking, 0.5"
    assert model.layers()[-1] == []


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, shards: Path, run_cli: Callable[..., int]) -> None:
    """Real DDP on gloo: a sample's noise does not depend on the process that has it."""
    options = [
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/denoising",
        "--data.train",
        f"{shards}/train-*.tar",
    ]
    options += ["--data.val", f"{shards}/test-*.tar", "--data.image_size", "16"]
    options += ["--data.global_batch", "24", "--trainer.log_every_n_steps", "1"]
    options += ["--optim.optimizer", "sgd", "--optim.base_lr", "1.0", "--trainer.max_steps", "9"]
    two = ["--run", str(tmp_path / "two"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "maepretrain", *options, *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "24 = 12 x 2 processes" in done.stdout
    assert run_cli(*options, "--run", tmp_path / "one") == 0
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    for name in ("loss", "corrupted_mse", "val_loss"):
        ours, theirs = (dict(column(tmp_path / run, name)) for run in ("two", "one"))
        assert ours == pytest.approx(theirs, rel=1e-5), name
