"""`maepretrain reconstruct`: its figures beside scikit-image's, of reconstructions made by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from maepretrain.apply.reconstruct import psnr
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.randomness import uniform
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]
MAE = ("--model.patch_size", 2, "--data.mean", "[0.3]", "--data.std", "[0.4]")
MAE += ("--model.encoder_width", 32, "--model.encoder_heads", 2, "--model.encoder_depth", 1)


def saved(tmp_path: Path, numbers: range) -> list[Path]:
    """Held-out digits as files."""
    paths = [tmp_path / f"digit-{number}.png" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        Image.fromarray(digits()[1].images[number]).save(path)
    return paths


def mean_psnr(drawn: torch.Tensor, truth: torch.Tensor) -> float:
    pairs = zip(truth.numpy(), drawn.clamp(0, 1).numpy(), strict=True)
    return float(np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]))


def test_psnr_is_scikit_images() -> None:
    a, b = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = [
        peak_signal_noise_ratio(*pair, data_range=1)
        for pair in zip(a.numpy(), b.numpy(), strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b).numpy(), theirs, rtol=1e-5)


def test_figures_and_picture_of_given_images(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = applied("data/fashion_mnist+recipe/variational"), tmp_path / "pictures/out.png"
    assert (
        run_cli(
            "reconstruct", "--encoder", run, "--out", out, "--images", *saved(tmp_path, range(5))
        )
        == 0
    )
    model: Any = load_encoder(str(run)).eval()
    truth = torch.from_numpy(digits()[1].images[:5])[:, None] / 255
    with torch.no_grad():
        theirs = mean_psnr(model.coder.mean(model.coder.encode(truth)), truth)
    said = capsys.readouterr().out
    assert f"PSNR          of the reconstruction {theirs:.2f} dB, mean of 5 images" in said
    assert f"picture       {out}" in said
    assert Image.open(out).size == (610, 300)  # five columns of 100 and the names, three rows


def test_mask_ratio_and_seed_of_a_masked_autoencoder(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = applied("data/digits+recipe/mae_digits", *MAE)
    command = ["reconstruct", "--encoder", run, "--out", tmp_path / "out.png", "--seed", 5]
    command += ["--mask_ratio", 0.5, "--images", *saved(tmp_path, range(4))]
    assert run_cli(*command) == 0
    model: Any = load_encoder(str(run)).eval()
    truth = torch.from_numpy(digits()[1].images[:4])[:, None] / 255
    model.masking.ratio = 0.5
    with torch.no_grad():
        shown = model.reconstruct((truth - 0.3) / 0.4, uniform(5, "mask", torch.arange(4), 16))
    said = capsys.readouterr().out
    for name in ("reconstruction", "pasted"):
        theirs = mean_psnr(getattr(shown, name) * 0.4 + 0.3, truth)
        assert f"of the {name} {theirs:.2f} dB" in said
    hidden = (shown.masked == 0).flatten(1).float().mean(1)
    assert (hidden >= 0.5).all()


def test_a_fine_tuned_run_names_the_pretraining_run(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tuned"
    shutil.copytree(applied("data/fashion_mnist+recipe/variational"), run)
    before, _, after = (run / "config.yaml").read_text().partition("model:")
    rest = "data:" + after.partition("\ndata:")[2]
    (run / "config.yaml").write_text(f"{before}\nencoder: runs/first\n{rest}")
    assert run_cli("reconstruct", "--encoder", run, "--out", tmp_path / "a.png") == 2
    error = capsys.readouterr().err
    assert "has no decoder of its own: name the pretraining run (runs/first)" in error


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--out", "a.jpg"], "--out a.jpg must end in .png"),
        (["--out", "a.png", "--n", "0"], "n 0 must be at least 1"),
        (["--out", "a.png", "--mask_ratio", "0.5"], "Variational hides none"),
        (["--out", "a.png", "--data.image_size", "9"], "inputs of size [8, 8], not [9, 9]"),
        (["--out", "a.png", "--encoder", "timm:resnet10t"], "is an encoder alone"),
        (["--out", "a.png", "--encoder", "nowhere"], "nowhere is no run folder"),
        ([], "required: out"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    rule: str,
    applied: Callable[..., Path],
    run_cli: Run,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = applied("data/fashion_mnist+recipe/variational")
    capsys.readouterr()
    assert run_cli("reconstruct", "--encoder", run, *options) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1


def test_a_mask_that_hides_everything_is_refused(
    applied: Callable[..., Path], tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = applied("data/digits+recipe/mae_digits", *MAE)
    command = ["reconstruct", "--encoder", run, "--out", tmp_path / "out.png", "--mask_ratio", 1]
    assert run_cli(*command) == 2
    assert "leaves 0 of 16 patches visible" in capsys.readouterr().err
