"""Sparse autoencoders: penalties against torch.distributions, activities that reach their target,
and the global mean activity on two real processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digit_images, fit
from support.runs import assert_close_weights, column
from torch import distributions

from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.sparse import Sparse, keep_largest, kl_to_target

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(5, 1, 8, 8, generator=GENERATOR)


def losses(model: Sparse, x: torch.Tensor = X) -> dict[str, float]:
    return {name: value.item() for name, value in model({"input": x}).items()}


def test_l1_is_a_laplace_prior() -> None:
    """Equations 14.5 to 14.7: -log p(h) = sum_j (lambda |h_j| - log(lambda / 2))."""
    model = Sparse(Dense(8, 1, [12], "tanh"), "l1", weight=0.3)
    prior = distributions.Laplace(0.0, 1 / 0.3)
    code = model.encode(X).detach()
    negative_log = -prior.log_prob(code).sum(1).mean() + 12 * torch.tensor(0.3 / 2).log()
    told = losses(model)
    assert told["loss"] - told["error"] == pytest.approx(float(negative_log), rel=1e-4)
    assert told["activity"] == pytest.approx(float(code.abs().mean()))


def test_kl_is_of_bernoullis() -> None:
    activity = torch.tensor([0.01, 0.05, 0.3, 0.99])
    truth = distributions.kl_divergence(
        distributions.Bernoulli(torch.tensor(0.05)), distributions.Bernoulli(activity)
    )
    assert torch.allclose(kl_to_target(activity, 0.05), truth, atol=1e-6)
    assert kl_to_target(torch.tensor([0.0, 1.0]), 0.05).isfinite().all()
    model = Sparse(Dense(8, 1, [12], "sigmoid"), "kl", weight=0.3, target=0.1)
    mean = model.encode(X).detach().mean(0)
    told = losses(model)
    expected = 0.3 * float(kl_to_target(mean, 0.1).sum())
    assert told["loss"] - told["error"] == pytest.approx(expected, rel=1e-4)


def test_k_largest_are_kept_as_sorting_tells() -> None:
    code = torch.randn(50, 9, generator=GENERATOR, requires_grad=True)
    kept = keep_largest(code, 4)
    for one, whole in zip(kept.tolist(), code.tolist(), strict=True):
        assert sorted(x for x in one if x) == sorted(whole)[-4:]
        assert all(a in (0, b) for a, b in zip(one, whole, strict=True))
    kept.sum().backward()
    assert code.grad is not None
    assert torch.equal(code.grad, (kept != 0).float())
    told = losses(Sparse(Dense(8, 1, [100], "none"), "k", active=7))
    assert told["active"] == pytest.approx(0.07)
    assert told["loss"] == told["error"]


@pytest.mark.parametrize("target", [0.05, 0.2])
def test_mean_activities_reach_their_target(target: float) -> None:
    train, test = digit_images()
    torch.manual_seed(0)
    model = Sparse(Dense(8, 1, [128], "sigmoid"), "kl", weight=3e-2, target=target)
    before = losses(model, test)
    fit(model, train, 300, 1e-2)
    after = losses(model, test)
    each = model.encode(test).detach().mean(0)
    assert before["activity"] == pytest.approx(0.5, abs=0.1)
    assert after["activity"] == pytest.approx(target, rel=0.15)
    assert each.quantile(0.95) < 1.6 * target and each.quantile(0.05) > 0.5 * target
    assert after["error"] < 0.6 * float((test - train.mean(0)).square().mean())


def test_an_l1_penalty_silences_units() -> None:
    train, test = digit_images()
    active = []
    for weight in (0.0, 3e-3, 3e-2):
        torch.manual_seed(0)
        model = Sparse(Dense(8, 1, [64], "relu"), "l1", weight=weight)
        fit(model, train, 120, 1e-2)
        active.append(losses(model, test)["active"])
    assert active[0] > 1.5 * active[1] > 3 * active[2]


def test_k_sparse_learns_with_few_numbers() -> None:
    train, test = digit_images()
    torch.manual_seed(0)
    model = Sparse(Dense(8, 1, [128], "none"), "k", active=10)
    fit(model, train, 150, 1e-2)
    told = losses(model, test)
    assert ((model.encode(test) != 0).sum(1) == 10).all()
    assert told["error"] < 0.25 * float((test - train.mean(0)).square().mean())
    assert model.reconstruct(test[:3]).reconstruction.shape == (3, 1, 8, 8)


def test_the_penalty_reaches_every_parameter_that_it_should() -> None:
    for penalty in ("l1", "kl", "k"):
        model = Sparse(Dense(8, 1, [20, 12], "relu", "sigmoid"), penalty, active=3)
        model({"input": X})["loss"].backward()
        assert all(p.grad is not None for p in model.parameters())
        assert len(model.layers()) == 3 and "sparsity" in model.summary()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": -1.0}, "weight -1.0"),
        ({"target": 1.0}, "target 1.0 is a mean activity"),
        ({"penalty": "kl"}, "set code_activation to sigmoid"),
        ({"penalty": "k", "active": 13}, "active 13 must be 1 to 12"),
        ({"penalty": "k", "active": 0}, "active 0 must be 1 to 12"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sparse(Dense(8, 1, [12]), **options)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, shards: Path, run_cli: Callable[..., int]) -> None:
    """The penalty is of the mean activity of the global batch, in value and gradient. With a weight
    at which it rules, half batches of one's own would end elsewhere."""
    options = [
        "pretrain",
        "-c",
        "data/fashion_mnist",
        "-c",
        "recipe/sparse",
        "--model.coder.activation",
        "none",
        "--model.coder.code_activation",
        "sigmoid",
        "--model.penalty",
        "kl",
        "--model.weight",
        "1.0e-3",
        "--optim.base_lr",
        "4.0e-3",
        "--optim.weight_decay",
        "0.0",
        "--data.train",
        f"{shards}/train-*.tar",
    ]
    options += ["--data.val", f"{shards}/test-*.tar", "--data.image_size", "16"]
    options += ["--data.global_batch", "24", "--trainer.log_every_n_steps", "1"]
    options += ["--optim.optimizer", "sgd", "--optim.base_lr", "1.0", "--trainer.max_steps", "9"]
    options += ["--model.weight", "0.1", "--model.coder.widths", "[40]"]
    two = ["--run", str(tmp_path / "two"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "-m", "maepretrain", *options, *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "24 = 12 x 2 processes" in done.stdout
    assert run_cli(*options, "--run", tmp_path / "one") == 0
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    # Held-out samples meet in other batches, of which each has a mean activity of its own.
    for name, within in (("loss", 1e-5), ("activity", 1e-5), ("val_loss", 1e-2)):
        ours, theirs = (dict(column(tmp_path / run, name)) for run in ("two", "one"))
        assert ours == pytest.approx(theirs, rel=within), name
