"""Options of small runs, and what a run folder holds afterwards."""

import csv
import sys
from pathlib import Path

import pytest
import torch

TINY = ["--model.encoder_width", "32", "--model.encoder_depth", "2", "--model.encoder_heads", "2"]
TINY += ["--model.decoder_width", "16", "--model.decoder_heads", "2"]
TINY += ["--data.global_batch", "24", "--data.num_workers", "0", "--trainer.log_every_n_steps", "1"]
TINY += ["--optim.warmup_epochs", "1", "--checkpoint_every_steps", "1000000"]
# Adam turns a gradient that is zero but for rounding into a full step; SGD keeps rounding small.
SGD = ["--optim.optimizer", "sgd", "--optim.base_lr", "1.0"]


def call_cli(*words: object) -> int:
    """`maepretrain ...` in this process; its exit code."""
    from maepretrain.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        # Lightning warns of a launcher's words where it sees those of pytest.
        patch.setattr(sys, "argv", ["maepretrain"])
        return main([str(word) for word in words])


def pretrain_tiny_model(shards: Path, run: Path, *more: object) -> int:
    """`maepretrain pretrain` of recipe/mae_digits with a tiny model on these shards, without
    pictures: drawing them takes as long as the rest."""
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    options = [*data, "--run", run, "--pictures", 0, *TINY, *more]
    return call_cli("pretrain", "-c", "data/digits", "-c", "recipe/mae_digits", *options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def column(run: Path, name: str) -> list[tuple[int, float]]:
    with (run / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r[name])) for r in csv.DictReader(file) if r[name]]


def by_step(run: Path, name: str) -> dict[int, float]:
    """A column of metrics.csv; of a step that was logged twice, the last value."""
    return dict(column(run, name))


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_close_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-6), name


def cut_back(run: Path, step: int) -> None:
    """Leave the run as it stood when this step was saved."""
    kept = run / "checkpoints" / f"step={step}.ckpt"
    kept.replace(run / "checkpoints" / "last.ckpt")
