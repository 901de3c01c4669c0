"""What a run logs of its own speed, and images that are small at first: through the command line,
against the model's FLOPs and against runs that were not stopped."""

import csv
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import SGD, assert_same_weights, column, cut_back, pretrain_tiny_model

from maepretrain.models.flops import peak_here, peak_of
from maepretrain.models.mae.model import MaskedAutoencoder

Run = Callable[..., int]
SIXTEEN = ["--data.low_resolution.image_size", 8, "--data.low_resolution.epochs", 0.5]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def header(text: str) -> tuple[list[float], float]:
    """GFLOPs of a sample, at full size and at first, and the peak in TFLOP/s, as a run says."""
    line = next(line for line in text.splitlines() if line.startswith("FLOPs"))
    words = line.replace("(", " ").replace(";", " ").split()
    costs = [float(word) for word, unit in pairwise(words) if unit == "G"]
    return costs, float(words[words.index("peak") + 1])


def test_mfu_is_the_models_flops_over_the_peak(
    tmp_path: Path, pretrain_tiny: Run, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain_tiny(run, "--trainer.max_steps", 12, *SIXTEEN) == 0
    (full, low), peak = header(capsys.readouterr().out)
    assert full > 2 * low > 0
    logged = [row for row in rows(run) if row["mfu"]]
    assert [int(row["step"]) for row in logged] == list(range(12))
    for row in logged:
        cost = (low if int(row["step"]) < 3 else full) * 1e9
        expected = float(row["img_per_s"]) * cost / (peak * 1e12)
        assert float(row["mfu"]) == pytest.approx(expected, rel=2e-3)
    # What judges the encoder sees images of full size.
    assert run_cli("knn", "--encoder", run) == 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.1 < float(logged[0]["memory_gb"]) <= float(logged[-1]["memory_gb"]) <= most


def test_the_peak_is_a_rate_of_real_products() -> None:
    """No product is faster than the fastest; a data sheet's names are found."""
    peak, source = peak_here(torch.device("cpu"), None)
    assert "measured" in source and 1e-3 < peak < 100
    assert peak_of("a100", torch.bfloat16) == 312


SIX_STEPS = ["--trainer.max_steps", 6, "--keep_every_steps", 1, *SIXTEEN]


@pytest.fixture(scope="module")
def never_stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of images that are small for three steps, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("never-stopped") / "run"
    assert pretrain_tiny_model(shards, run, *SIX_STEPS) == 0
    return run


@pytest.mark.parametrize("step", [2, 3, 4], ids=["before", "at the switch", "after"])
def test_a_stop_on_either_side_of_the_switch(
    tmp_path: Path, never_stopped: Path, pretrain_tiny: Run, step: int
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(never_stopped, cut)
    cut_back(cut, step)
    assert pretrain_tiny(cut, *SIX_STEPS, "--resume") == 0
    assert_same_weights(never_stopped, cut)
    assert column(cut, "loss") == column(never_stopped, "loss")


def test_images_are_small_first(
    tmp_path: Path, pretrain_tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = MaskedAutoencoder.forward

    def noted(self: MaskedAutoencoder, batch: Any, *noise: Any) -> Any:
        if self.training:
            sizes.append(batch["input"].shape[-1])
        return forward(self, batch, *noise)

    monkeypatch.setattr(MaskedAutoencoder, "forward", noted)
    assert pretrain_tiny(tmp_path / "whole", *SIX_STEPS) == 0
    assert sizes == [8] * 3 + [16] * 3


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            ["--data.low_resolution.image_size", 10, "--data.low_resolution.epochs", 1],
            "must be divisible by patch size",
        ),
        (
            ["--data.low_resolution.image_size", 24, "--data.low_resolution.epochs", 1],
            "24x24 is above 16x16",
        ),
        (
            ["--data.low_resolution.image_size", 8],
            "low_resolution.image_size 8 and low_resolution.epochs 0.0 go together",
        ),
        (
            ["--data.low_resolution.epochs", 1],
            "low_resolution.image_size None and low_resolution.epochs 1.0 go together",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    pretrain_tiny: Run,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    rule: str,
) -> None:
    assert pretrain_tiny(tmp_path / "run", *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert rule in line and not (tmp_path / "run/config.yaml").exists()


def test_models_of_one_size_refuse_smaller_images(
    tmp_path: Path, shards: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/autoencoder",
        "--data.train",
        f"{shards}/train-*.tar",
    ]
    asked += ["--data.val", "null", "--run", tmp_path / "run", *SIXTEEN]
    assert run_cli(*asked, "--data.image_size", 16) == 2
    assert "Autoencoder takes no smaller images" in capsys.readouterr().err


def test_options_through_the_command_line(tmp_path: Path, pretrain_tiny: Run) -> None:
    """Cross-attention on two masks of an image, a part of them predicted: it learns."""
    options = ["--model.decoder", "cross", "--model.reconstruct", 0.5]
    options += ["--model.masks_per_image", 2, "--trainer.max_epochs", 4, *SGD]
    assert pretrain_tiny(tmp_path / "run", *options) == 0
    losses = [value for _, value in column(tmp_path / "run", "loss")]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
