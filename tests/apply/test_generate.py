"""`maepretrain generate`: pictures read back beside the models run by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maepretrain.apply.generate import interpolate, sample, traverse
from maepretrain.apply.inputs import parse_application
from maepretrain.checkpoints.encoders import load_encoder
from maepretrain.parsing.moved_configs import MOVED_CONFIGS
from maepretrain.plots.images import tiles
from maepretrain.workflows.quickstart import digits

Run = Callable[..., int]


def call(function: Callable[..., Any], *words: object) -> Any:
    argv = [str(word) for word in words]
    measures = function is traverse
    return function(**parse_application("generate", function, argv, measures=measures))


def loaded(run: Path) -> Any:
    return load_encoder(str(run)).eval()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two held-out digits."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, pixels in zip(paths, digits()[1].images, strict=False):
        Image.fromarray(pixels).save(path)
    return paths


GENERATIVE = ["variational", "adversarial", "generative_stochastic", "helmholtz"]


@pytest.mark.parametrize("name", [*GENERATIVE, "adversarial_conditional"])
def test_the_picture_holds_the_models_samples(
    name: str, applied: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = applied(MOVED_CONFIGS[f"ae/{name}"]), tmp_path / "out.png"
    drawn = call(sample, "--encoder", run, "--out", out, "--n", 20, "--seed", 3)
    theirs = loaded(run).sample(20, seed=3).clamp(0, 1).detach()
    torch.testing.assert_close(drawn, theirs, atol=1e-6, rtol=0)
    other = loaded(run).sample(20, seed=4).detach()
    assert theirs.shape == (20, 1, 8, 8) and not torch.equal(theirs, other.clamp(0, 1))
    # Each pixel is a square of 8, with two white pixels between the images.
    picture, columns = np.asarray(Image.open(out)), 10 if "conditional" in name else 4
    for i, image in enumerate((theirs[:, 0] * 255).round().numpy()):
        top, left = (2 + 66 * place for place in divmod(i, columns))
        tile = picture[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(tile[..., 0], np.kron(image, np.ones((8, 8))))
    assert (picture[:2] == 255).all() and (picture[66:68] == 255).all()


def test_classes_are_the_columns(applied: Callable[..., Path]) -> None:
    model = loaded(
        applied(
            "data/fashion_mnist+recipe/adversarial+model.classes=10+model.coder.widths=[512,256,18]"
        )
    )
    drawn = model.sample(12, seed=1)
    code = model.draw(torch.arange(12), 1)
    one_hot = torch.eye(10)[torch.arange(12) % 10]
    theirs = model.coder.mean(torch.cat([code, one_hot], 1))
    torch.testing.assert_close(drawn, theirs)


def test_helmholtz_samples_are_of_its_distribution(applied: Callable[..., Path]) -> None:
    """The mean of many samples is the mean of many dreams, whose pixels are drawn."""
    model = loaded(applied("data/fashion_mnist+recipe/helmholtz"))
    samples = model.sample(4000, seed=1).flatten(1).detach()
    dreams = model.dream(torch.arange(4000))[0]
    assert set(dreams.unique().tolist()) == {0.0, 1.0}
    assert (samples.mean(0) - dreams.mean(0)).abs().max() < 0.05
    assert samples.unique().numel() > 10


def test_tiles_of_many_channels_and_of_large_images(tmp_path: Path) -> None:
    images = torch.rand(3, 4, 80, 70, generator=torch.Generator().manual_seed(0))
    picture = np.asarray(tiles(images, 8, tmp_path / "deeper/a.png"))
    assert picture.shape == (84, 3 * 72 + 2, 3)
    theirs = (images[2, :3] * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(picture[2:82, 146:216], theirs)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deeper/a.png")), picture)


@pytest.mark.parametrize("name", ["variational", "denoising", "stacked", "helmholtz"])
def test_a_way_goes_between_reconstructions(
    name: str, applied: Callable[..., Path], tmp_path: Path, files: list[Path]
) -> None:
    run, out = applied(MOVED_CONFIGS[f"ae/{name}"]), tmp_path / "out.png"
    words = ["--encoder", run, "--out", out, "--images", *files, "--steps", 5]
    along, blended = call(interpolate, *words)
    ends = torch.from_numpy(digits()[1].images[:2])[:, None] / 255
    model = loaded(run)
    with torch.no_grad():
        theirs = model.reconstruct(ends).reconstruction.clamp(0, 1)
        middle = model.decode(model.encode(ends).mean(0, keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(along[[0, -1]], theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(along[2:3], middle, atol=1e-5, rtol=0)
    torch.testing.assert_close(blended[[0, -1]], ends, atol=1e-6, rtol=0)
    torch.testing.assert_close(blended[2], ends.mean(0), atol=1e-6, rtol=0)
    assert Image.open(out).width > 500


def test_a_traversal_goes_as_far_as_held_out_codes_do(
    applied: Callable[..., Path], tmp_path: Path, files: list[Path], shards: Path
) -> None:
    run, out = applied("data/fashion_mnist+recipe/variational"), tmp_path / "out.png"
    words = ["--encoder", run, "--out", out, "--images", files[0], "--span", 2, "--steps", 3]
    drawn = call(traverse, *words, "--dimensions", 7, 3)
    held_out = torch.from_numpy(digits()[1].images[:50])[:, None] / 255
    model = loaded(run)
    codes = model.encode(held_out).detach()
    mean, std = codes.mean(0), codes.std(0)
    for row, d in zip(drawn, (7, 3), strict=True):
        for image, away in zip(row, (-2, 0, 2), strict=True):
            code = codes[:1].clone()
            code[0, d] = mean[d] + away * std[d]
            expected = model.decode(code)[0].detach()
            torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    # Without --dimensions: the eight that vary most, the most first.
    varied = call(traverse, *words)
    assert len(varied) == 8
    most = call(traverse, *words, "--dimensions", int(std.argmax()))
    torch.testing.assert_close(varied[:1], most)


def test_what_cannot_be_done_is_one_line(
    applied: Callable[..., Path],
    files: list[Path],
    tmp_path: Path,
    run_cli: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = (
        "data/digits+recipe/mae_digits",
        "data/fashion_mnist+recipe/denoising",
        "data/fashion_mnist+recipe/adversarial+model.classes=10+model.coder.widths=[512,256,18]",
        "data/fashion_mnist+recipe/variational",
    )
    mae, denoising, conditional, variational = (
        applied(
            name, *(("--model.patch_size", 2) if name == "data/digits+recipe/mae_digits" else ())
        )
        for name in names
    )
    out = tmp_path / "out.png"
    for options, rule in (
        (["sample", mae], "MaskedAutoencoder cannot be sampled: it lacks a distribution to draw"),
        (["sample", denoising], "Denoising cannot be sampled: it lacks a distribution"),
        (["interpolate", mae], "MaskedAutoencoder lacks decode()"),
        (["traverse", mae], "MaskedAutoencoder lacks decode()"),
        (["interpolate", conditional], "needs one of 10 classes beside it"),
        (["sample", variational, "--n", 0], "n 0 must be at least 1"),
        (["interpolate", variational, "--images", files[0]], "--images names 1"),
        (["interpolate", variational, "--steps", 1], "2 steps or more"),
        (["traverse", variational, "--images", *files], "--images names 2"),
        (["traverse", variational, "--dimensions", 32], "dimension 32 must be 0 to 31"),
        (["traverse", variational, "--span", 0], "span 0.0 above 0"),
        (["traverse", variational, "--data.val", "null", "--images", files[0]], "--data.val"),
    ):
        kind, run, *rest = options
        capsys.readouterr()
        assert run_cli("generate", kind, "--encoder", run, "--out", out, *rest) == 2
        error = capsys.readouterr().err
        assert rule in error and error.count("\n") == 1, error
    assert not out.exists()
    assert run_cli("generate", "draw") == 2
    assert "needs one of: sample, interpolate, traverse" in capsys.readouterr().err
