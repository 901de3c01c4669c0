"""`maepretrain denoise`: files read back beside the model run by hand, figures beside
scikit-image's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from maepretrain.apply.denoise import denoise
from maepretrain.apply.inputs import parse_application
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.models.autoencoders.corruption import Corruption
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """A folder of four held-out digits with noise."""
    folder = tmp_path / "noisy"
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 60, (4, 8, 8))
    for i, pixels in enumerate((digits()[1].images[:4] + noise).clip(0, 255).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(
    "name",
    [
        "data/fashion_mnist+recipe/denoising",
        "data/fashion_mnist+recipe/variational",
        "data/fashion_mnist+recipe/stacked+model.layer=Denoising+model.layer.corruption=masking+model.layer.amount=0.25+model.likelihood=bernoulli+model.code_likelihood=bernoulli+data.mean=[0.0]+data.std=[1.0]",
    ],
)
def test_a_folder_of_clean_images(
    name: str,
    noisy: Path,
    applied: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A denoising autoencoder, one that is none, and one of several layers."""
    run, out = applied(name), tmp_path / "clean"
    capsys.readouterr()
    assert run_cli("denoise", "--encoder", run, "--out", out, "--images", noisy) == 0
    model: Any = load_encoder(str(run)).eval()
    seen = torch.from_numpy(pixels(noisy))[:, None] / 255
    with torch.no_grad():
        expected = (model.reconstruct(seen).reconstruction * 255).clamp(0, 255).round()
    assert sorted(path.name for path in out.iterdir()) == [f"{i}.png" for i in range(4)]
    assert np.abs(pixels(out).astype(int) - expected[:, 0].int().numpy()).max() <= 1
    assert ("is no denoiser" in capsys.readouterr().out) == (
        name != "data/fashion_mnist+recipe/denoising"
    )
    assert run_cli("denoise", "--encoder", run, "--out", out, "--images", noisy) == 2
    assert "0.png is there already: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "amount"), [("salt_and_pepper", 0.25), ("gaussian", 0.2)])
def test_known_corruption_and_how_much_of_it_is_undone(
    kind: Any, amount: float, applied: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = applied("data/fashion_mnist+recipe/denoising"), tmp_path / "out.png"
    for i in range(3):
        Image.fromarray(digits()[1].images[i]).save(tmp_path / f"{i}.png")
    words = ["--encoder", str(run), "--out", str(out), "--corrupt", kind, "--amount", str(amount)]
    words += ["--seed", "4", "--images", *(str(tmp_path / f"{i}.png") for i in range(3))]
    found = denoise(**parse_application("denoise", denoise, words))
    truth = torch.from_numpy(digits()[1].images[:3])[:, None] / 255
    corrupted = Corruption(kind, amount, 0.0, 1.0, seed=4)(truth, torch.arange(3))
    model: Any = load_encoder(str(run)).eval()
    for name, images in (("before", corrupted), ("after", model.denoise(corrupted))):
        pairs = zip(truth.numpy(), images.clamp(0, 1).numpy(), strict=True)
        theirs = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
        np.testing.assert_allclose(found[name].numpy(), theirs, rtol=1e-4)
    assert Image.open(out).width > 300


def test_salt_is_white_whatever_the_normalisation(
    applied: Callable[..., Path], tmp_path: Path
) -> None:
    """All of a black image turned into salt or pepper: half of it white, PSNR of 3 dB."""
    run = applied(
        "data/fashion_mnist+recipe/autoencoder", "--data.mean", "[0.3]", "--data.std", "[0.4]"
    )
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    words = ["--encoder", str(run), "--out", str(tmp_path / "o.png"), "--amount", "1"]
    words += ["--corrupt", "salt_and_pepper", "--images", str(tmp_path / "a.png")]
    before = denoise(**parse_application("denoise", denoise, words))["before"]
    share = Corruption("salt_and_pepper", 1.0)(torch.zeros(1, 1, 8, 8), torch.arange(1)).mean()
    assert float(before) == pytest.approx(-10 * float(share.log10()), abs=1e-3)


def test_what_cannot_be_done_is_one_line(
    noisy: Path,
    applied: Callable[..., Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = applied("data/digits+recipe/mae_digits", "--model.patch_size", 2)
    denoising = applied("data/fashion_mnist+recipe/denoising")
    twin = tmp_path / "twin"
    twin.mkdir()
    Image.new("L", (8, 8)).save(twin / "0.png")
    out = tmp_path / "o"
    for options, rule in (
        ([run, "--out", "a.png"], "MaskedAutoencoder cannot denoise: it lacks a code to decode"),
        ([denoising, "--out", "a.jpg"], "--out a.jpg must end in .png"),
        ([denoising, "--out", out, "--images", noisy, twin], "two images would both be"),
        ([denoising, "--out", out, "--corrupt", "masking", "--amount", 2], "must be in 0..1"),
    ):
        capsys.readouterr()
        assert run_cli("denoise", "--encoder", *options) == 2
        error = capsys.readouterr().err
        assert rule in error and error.count("\n") == 1
    assert not out.exists()
