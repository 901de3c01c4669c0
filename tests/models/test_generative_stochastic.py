"""Walkback step by step, and chains whose samples look like data and do not stand still."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maepretrain.models.autoencoders.coders import Convolutional, Dense
from maepretrain.models.autoencoders.generative_stochastic import GenerativeStochastic
from maepretrain.randomness import uniform
from maepretrain.workflows.quickstart import digits


@cache
def pixels(held_out: bool = False) -> Tensor:
    return torch.from_numpy(digits()[held_out].images).float()[:, None] / 255


def make(**arguments: Any) -> GenerativeStochastic:
    torch.manual_seed(0)
    coder = Dense(8, 1, [200], "tanh", likelihood=arguments.pop("likelihood", "bernoulli"))
    given = {"steps": 3, "amount": 0.1, "code_noise": 0.1} | arguments
    return GenerativeStochastic(coder, **given)


@pytest.fixture(scope="module")
def trained() -> GenerativeStochastic:
    model, images = make(), pixels()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        position = torch.arange(step * 64, step * 64 + 64)
        adam.zero_grad()
        model({"input": images[position % len(images)], "position": position})["loss"].backward()
        adam.step()
    return model


def nearest(images: Tensor) -> float:
    """The mean distance to the nearest training sample."""
    return float(torch.cdist(images.flatten(1), pixels().flatten(1)).amin(1).mean())


def test_samples_from_noise_look_like_data(trained: GenerativeStochastic) -> None:
    few = [trained.sample(3, steps=2, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])
    samples = trained.sample(60, steps=40, seed=3)
    assert nearest(samples) < 0.5 * nearest(torch.rand(60, 64))
    assert nearest(samples) < 0.5 * nearest(make().sample(60, steps=10))
    # About as near as digits that were not trained on.
    assert nearest(samples) < 1.5 * nearest(pixels(held_out=True))


def test_the_chain_mixes(trained: GenerativeStochastic) -> None:
    """Steps apart it is further away than one step on, and it does not stay where it began."""
    start = pixels()[:1].expand(60, 1, 8, 8)
    steps = trained.chain(start, 40).flatten(2)
    one = (steps[-1] - steps[-2]).norm(dim=1).mean()
    twenty = (steps[-1] - steps[-21]).norm(dim=1).mean()
    assert float(one) > 0.1 and float(twenty) > 1.2 * float(one)
    # Chains from one image part.
    assert float(steps[-1].std(0).mean()) > 0.3 * float(pixels().std(0).mean())


def test_loss_is_that_of_the_steps_made_by_hand() -> None:
    model, x, position = make(draw=False), pixels()[:4], torch.tensor([5, 6, 70, 8])
    walked, errors = x, []
    for step in range(3):
        corrupted = model._corrupt(walked, position, step, 0)
        code = model._noisy_code(walked, position, step, 0)
        noise = (code - model.coder.encode(corrupted)) / 0.1
        assert 0.7 < float(noise.detach().std()) < 1.3
        logits = model.coder.decode(code)[..., 0]
        # The clean sample is asked for at every step.
        errors.append(F.binary_cross_entropy_with_logits(logits, x.flatten(1)))
        walked = logits.sigmoid().view_as(x).detach()
    losses = model({"input": x, "position": position})
    torch.testing.assert_close(losses["loss"], torch.stack(errors).mean())
    torch.testing.assert_close(losses["first_step"], errors[0])
    torch.testing.assert_close(losses["last_step"], errors[2])
    # No gradient goes from a step to the one before.
    weight = model.coder.encoder[0].weight  # type: ignore
    (mine,) = torch.autograd.grad(torch.stack(errors).mean(), weight)
    (theirs,) = torch.autograd.grad(losses["loss"], weight)
    torch.testing.assert_close(theirs, mine)


def test_sample_is_the_end_of_chains_from_uniform_noise() -> None:
    model = make(likelihood="gaussian", low=-1.0, high=2.0)
    start = 3 * uniform(7, "start", torch.arange(5), 64).view(5, 1, 8, 8) - 1
    assert -1 <= float(start.min()) < -0.8 and 1.8 < float(start.max()) <= 2
    torch.testing.assert_close(model.sample(5, 3, seed=7), model.chain(start, 3, seed=7)[-1])


def test_noise_is_a_function_of_seed_position_and_step() -> None:
    model, x, position = make(code_noise=0.5), pixels()[:2], torch.tensor([5, 6])
    first = model._noisy_code(x, position, 0, 0)
    # A matrix product rounds one row otherwise than two.
    torch.testing.assert_close(first[1:], model._noisy_code(x[1:], position[1:], 0, 0))
    for other in ((position + 1, 0, 0), (position, 1, 0), (position, 0, 1)):
        assert not torch.allclose(first, model._noisy_code(x, *other), atol=0.01)
    # A step of one seed is no step of the next.
    later, other = model._noisy_code(x, position, 1, 0), model._noisy_code(x, position, 0, 1)
    assert not torch.allclose(later, other, atol=0.01)
    whole = model({"input": x, "position": position})["loss"]
    parts = [model({"input": x[i : i + 1], "position": position[i : i + 1]}) for i in (0, 1)]
    torch.testing.assert_close(whole, torch.stack([part["loss"] for part in parts]).mean())


def test_draws_are_bernoulli_of_the_mean() -> None:
    model = make()
    mean = torch.full((400, 1, 8, 8), 0.3)
    drawn = model._next(mean, torch.arange(400), 0, 0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(make(draw=False)._next(mean, torch.arange(400), 0, 0), mean)
    assert torch.equal(make(likelihood="gaussian")._next(mean, torch.arange(400), 0, 0), mean)


def test_contract() -> None:
    coder = Convolutional(8, 1, [4, 8], code=16, likelihood="bernoulli")
    model, x = GenerativeStochastic(coder, steps=2), pixels()[:4]
    model({"input": x, "position": torch.arange(4)})["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    drawn = model.reconstruct(x)
    assert drawn._fields == ("original", "corrupted", "one_step", "reconstruction", "chain_sample")
    assert all(row.shape == x.shape for row in drawn)
    torch.testing.assert_close(drawn.reconstruction, model.coder.mean(model.encode(x)))
    code = model._noisy_code(x, torch.arange(4), 0, model.seed)
    torch.testing.assert_close(drawn.one_step, model.coder.mean(code))
    assert model.encode(x).shape == (4, 16)
    assert model.layers()[-1] == []
    assert "2 steps" in model.summary()["walkback"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"code_noise": -1.0}, "code_noise -1.0"),
        ({"likelihood": "categorical"}, "categorical"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
