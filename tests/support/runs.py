"""Options of small runs, and what a run folder holds afterwards."""

import csv
from pathlib import Path

import torch

TINY = [
    *("--model.encoder_width", "32", "--model.encoder_depth", "2", "--model.encoder_heads", "2"),
    *("--model.decoder_width", "16", "--model.decoder_heads", "2"),
    *("--data.global_batch", "24", "--data.num_workers", "0", "--trainer.log_every_n_steps", "1"),
    *("--optim.warmup_epochs", "1", "--checkpoint_every_steps", "1000000"),
]
# Adam turns a gradient that is zero but for rounding into a full step; SGD keeps rounding small.
SGD = ["--optim.optimizer", "sgd", "--optim.base_lr", "1.0"]


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
