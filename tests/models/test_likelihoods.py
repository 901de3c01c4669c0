"""Decoders as distributions, against torch.distributions."""

import pytest
import torch
from torch import distributions

from maepretrain.models.autoencoders.likelihoods import Likelihood


@pytest.fixture
def parameters() -> torch.Tensor:
    return 3 * torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(4, 7, generator=torch.Generator().manual_seed(1))


def test_gaussian(parameters: torch.Tensor, x: torch.Tensor) -> None:
    mean = parameters[..., :1]
    gaussian = Likelihood("gaussian")
    normal = distributions.Normal(mean[..., 0], 1.0)
    assert torch.allclose(gaussian.nll(mean, x), -normal.log_prob(x).sum(1), rtol=1e-5)
    squares = [sum((x[b, v] - mean[b, v, 0]) ** 2 for v in range(7)) / 7 for b in range(4)]
    assert torch.allclose(gaussian.error(mean, x), torch.stack(squares), rtol=1e-5)  # pyright: ignore[reportArgumentType]
    assert torch.equal(gaussian.mean(mean), normal.mean)


def test_bernoulli(parameters: torch.Tensor, x: torch.Tensor) -> None:
    logits = parameters[..., :1]
    bernoulli = Likelihood("bernoulli")
    truth = distributions.Bernoulli(logits=logits[..., 0], validate_args=False)
    for values in (x, x.round()):  # grey values, and zeros and ones
        nll = bernoulli.nll(logits, values)
        assert torch.allclose(nll, -truth.log_prob(values).sum(1), rtol=1e-5)
        assert torch.allclose(bernoulli.error(logits, values), nll / 7)
    assert torch.allclose(bernoulli.mean(logits), truth.mean)


def test_categorical(parameters: torch.Tensor, x: torch.Tensor) -> None:
    categorical = Likelihood("categorical", levels=5)
    assert categorical.parameters_per_value == 5
    truth = distributions.Categorical(logits=parameters)
    x[0, :6] = torch.tensor([0.0, 0.19, 0.2001, 0.5, 0.81, 1.0])
    bins = (x * 5).floor().clamp(max=4)
    assert bins[0, :6].tolist() == [0, 0, 1, 2, 4, 4]
    nll = categorical.nll(parameters, x)
    assert torch.allclose(nll, -truth.log_prob(bins).sum(1), rtol=1e-5)
    assert torch.allclose(categorical.error(parameters, x), nll / 7)
    centres = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    assert torch.allclose(categorical.mean(parameters), (truth.probs * centres).sum(-1))


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_values_outside_the_distribution_are_refused(kind: str, value: float) -> None:
    likelihood = Likelihood(kind, levels=5)  # pyright: ignore[reportArgumentType]
    x = torch.full((2, 3), 0.5)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"needs values in 0\.\.1.*data.mean to 0"):
        likelihood.nll(torch.zeros(2, 3, likelihood.parameters_per_value), x)
    assert Likelihood("gaussian").nll(torch.zeros(2, 3, 1), x).shape == (2,)


def test_one_level_is_refused() -> None:
    with pytest.raises(ValueError, match="two levels or more, not 1"):
        Likelihood("categorical", levels=1)
