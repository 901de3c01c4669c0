"""The bounds against torch.distributions and against a likelihood that is known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from maepretrain.models.autoencoders.coders import Convolutional, Dense
from maepretrain.models.autoencoders.variational import Variational, divergence
from maepretrain.workflows.quickstart import digits


def make(likelihood: str = "bernoulli", **arguments: object) -> Variational:
    """A small model whose posteriors are not the prior."""
    torch.manual_seed(0)
    coder = Dense(8, 1, [32, 4], code_activation="none", likelihood=likelihood)  # type: ignore
    model = Variational(coder, **arguments)  # type: ignore
    nn.init.normal_(model.log_variance.weight, std=0.1)
    nn.init.normal_(model.log_variance.bias, mean=-1.0)
    return model


def batch(n: int) -> dict[str, Tensor]:
    images = torch.from_numpy(digits()[0].images[:n]).float()[:, None] / 255
    return {"input": images, "position": torch.arange(n)}


def test_divergence_is_that_of_torch_distributions() -> None:
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    q = Normal(mean, (0.5 * log_variance).exp())
    theirs = kl_divergence(q, Normal(torch.zeros(3), torch.ones(3))).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), theirs)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_loss_is_likelihood_and_divergence_of_torch_distributions(beta: float) -> None:
    model, given = make(beta=beta), batch(6)
    losses = model(given)
    mean, log_variance = model.posterior(given["input"])
    q = Normal(mean, (0.5 * log_variance).exp())
    z = model._draw(mean, log_variance, given["position"])[:, 0]
    p = Bernoulli(logits=model.coder.decode(z)[..., 0], validate_args=False)
    nll = -p.log_prob(given["input"].flatten(1)).sum(1)
    kl = kl_divergence(q, Normal(torch.zeros(4), torch.ones(4))).sum(1)
    torch.testing.assert_close(losses["loss"], (nll + beta * kl).mean())
    torch.testing.assert_close(losses["nll"], nll.mean())
    torch.testing.assert_close(losses["kl"], kl.mean())


def test_draws_follow_the_posterior_and_are_those_of_their_positions() -> None:
    model = make(draws=4000)
    mean, log_variance = torch.tensor([[1.0, -2.0, 0.0, 3.0]]), torch.tensor([[0.0, 1.0, -2.0, 0]])
    z = model._draw(mean, log_variance, torch.tensor([7]))[0]
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.1, rtol=0)
    torch.testing.assert_close(z.var(0), log_variance[0].exp(), atol=0.1, rtol=0.1)
    two = model._draw(mean.expand(2, 4), log_variance.expand(2, 4), torch.tensor([7, 8]))
    assert torch.equal(two[0], z) and not torch.equal(two[1], z)
    model.seed = 1
    assert not torch.equal(model._draw(mean, log_variance, torch.tensor([7]))[0], z)


def test_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    model, whole = make(draws=3, importance_weighted=True), batch(8)
    halves = [{name: x[part] for name, x in whole.items()} for part in (slice(4), slice(4, 8))]
    parts = [model(half)["loss"] for half in halves]
    torch.testing.assert_close(model(whole)["loss"], torch.stack(parts).mean())


def linear(draws: int, seed: int = 0) -> tuple[Variational, Tensor, Tensor]:
    """p(x|z) = N(A z, 1), so that p(x) = N(0, A A' + 1); its posteriors are not q. Returns an x and
    its -log p(x)."""
    torch.manual_seed(3)
    coder = Dense([5], 1, [2], "none")
    model = Variational(coder, draws=draws, importance_weighted=True, seed=seed)
    a = model.coder.decoder[0].weight.detach()  # type: ignore
    x = torch.randn(1, 1, 5)
    p = MultivariateNormal(torch.zeros(5), a @ a.T + torch.eye(5))
    return model, x, -p.log_prob(x.flatten())


def test_importance_weighted_bound_falls_to_the_likelihood_with_more_draws() -> None:
    """Burda et al., theorem 1, on a model whose likelihood is known."""
    bounds = []
    for draws in (1, 10, 500):
        model, x, exact = linear(draws)
        many = {"input": x.expand(1000, 1, 5), "position": torch.arange(1000)}
        bounds.append(float(model(many)["loss"].detach()))
    assert bounds[0] > bounds[1] > bounds[2]
    assert bounds[2] > float(exact) - 0.02
    assert bounds[2] == pytest.approx(float(exact), abs=0.1)


def test_importance_weighted_bound_of_one_draw_is_the_bound_in_expectation() -> None:
    model, x, _ = linear(1)
    many = {"input": x.expand(20000, 1, 5), "position": torch.arange(20000)}
    weighted = model(many)["loss"]
    model.importance_weighted = False
    assert float(weighted.detach()) == pytest.approx(float(model(many)["loss"].detach()), abs=0.05)


def test_bound_is_exact_where_q_is_the_posterior() -> None:
    """Every importance weight is p(x) then, whatever is drawn."""
    model, x, _ = linear(3)
    with torch.no_grad():
        model.coder.decoder[0].weight.copy_(torch.eye(5)[:, :2])  # type: ignore
        model.coder.encoder[0].weight.copy_(torch.eye(5)[:2] / 2)  # type: ignore
        model.log_variance.bias.fill_(math.log(0.5))
    p = MultivariateNormal(torch.zeros(5), torch.diag(torch.tensor([2.0, 2, 1, 1, 1])))
    bound = model({"input": x, "position": torch.zeros(1, dtype=torch.int64)})["loss"]
    torch.testing.assert_close(bound, -p.log_prob(x.flatten()))


@pytest.fixture(scope="module")
def trained() -> Variational:
    """On 1,000 digits."""
    torch.manual_seed(0)
    coder = Dense(8, 1, [64, 6], code_activation="none", likelihood="bernoulli")
    model, given = Variational(coder), batch(1000)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(500):
        rows = torch.arange(step * 64, step * 64 + 64) % 1000
        adam.zero_grad()
        model({"input": given["input"][rows], "position": torch.arange(64) + 64 * step})[
            "loss"
        ].backward()
        adam.step()
    return model


def nearest(images: Tensor, bank: Tensor) -> float:
    """The mean distance to the nearest of a bank."""
    return float(torch.cdist(images.flatten(1), bank.flatten(1)).amin(1).mean())


def test_samples_look_like_data(trained: Variational) -> None:
    data = batch(1000)["input"]
    samples = trained.sample(200, seed=1)
    assert torch.equal(samples, trained.sample(200, seed=1))
    assert not torch.equal(samples, trained.sample(200, seed=2))
    assert samples.shape == (200, 1, 8, 8)
    fresh = make().sample(200, seed=1)
    assert nearest(samples, data) < 0.6 * nearest(fresh, data)
    assert nearest(samples, data) < 0.6 * nearest(torch.rand(200, 64), data)
    assert float(samples.std(0).mean()) > 0.5 * float(data.std(0).mean())


def test_loss_falls_and_says_more_than_a_model_without_code(trained: Variational) -> None:
    given = batch(1000)
    held_out = torch.from_numpy(digits()[1].images).float()[:, None] / 255
    loss = trained({"input": held_out, "position": torch.arange(len(held_out))})["loss"]
    pixels = given["input"].mean(0).clamp(1e-3, 1 - 1e-3)
    independent = nn.functional.binary_cross_entropy(pixels.expand_as(held_out), held_out)
    assert float(loss.detach()) < 0.95 * float(independent * 64)


def test_beta_trades_detail_for_a_code_near_the_prior() -> None:
    figures: dict[float, dict[str, Tensor]] = {}
    for beta in (0.1, 10.0):
        model, given = make(beta=beta), batch(300)
        adam = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(100):
            adam.zero_grad()
            model(given)["loss"].backward()
            adam.step()
        figures[beta] = model(given)
    assert figures[10.0]["kl"] < 0.5 * figures[0.1]["kl"]
    assert figures[10.0]["nll"] > figures[0.1]["nll"]


def test_contract() -> None:
    coder = Convolutional(8, 1, [4, 8], code=3, code_activation="none", likelihood="bernoulli")
    model, given = Variational(coder, draws=2), batch(4)
    losses = model(given)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encode(given["input"]).shape == (4, 3)
    drawn = model.reconstruct(given["input"])
    assert all(row.shape == given["input"].shape for row in drawn)
    assert drawn._fields == ("original", "reconstruction", "prior_sample")
    assert model.layers()[-1] == [] and len(model.layers()) == 4
    assert "draws" in model.summary()["objective"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws 0 must be at least 1"),
        ({"beta": -1.0}, "beta -1.0 must be at least 0"),
        ({"beta": 2.0, "importance_weighted": True}, "beta 2.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_refuses_a_code_with_an_activation() -> None:
    with pytest.raises(ValueError, match="code_activation none"):
        Variational(Dense(8, 1, [4]))
