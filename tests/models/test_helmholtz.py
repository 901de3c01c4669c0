"""Helmholtz machines: the delta rules by hand, and probabilities by enumeration of every state of
a tiny machine."""

from itertools import product

import pytest
import torch
from small import digit_images, fit
from support.halves import assert_halves_average_to_the_whole
from torch import Tensor, nn

from maepretrain.models.autoencoders.helmholtz import Helmholtz

WIDTHS = (5, 3)


def make(side: int = 2, widths: tuple[int, ...] = WIDTHS, std: float = 1.0) -> Helmholtz:
    """A machine with random biases too, so that nothing is symmetric."""
    torch.manual_seed(0)
    model = Helmholtz(side, 1, widths)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def every(n: int) -> Tensor:
    """All vectors of n bits, (2^n, n)."""
    return torch.tensor(list(product((0.0, 1.0), repeat=n)))


def exact_log_likelihood(model: Helmholtz, visible: Tensor) -> Tensor:
    """log p(x): the sum over every state of the hidden layers, with products of probabilities."""
    lower, upper = (every(w) for w in model.widths)
    (down0, down1), logs = model.generation, []
    p_upper = model.top.sigmoid()
    log_upper = (upper * p_upper.log() + (1 - upper) * (1 - p_upper).log()).sum(1)
    p_lower = down1(upper).sigmoid()  # (upper states, lower units)
    log_lower = lower @ p_lower.log().T + (1 - lower) @ (1 - p_lower).log().T + log_upper
    log_h = log_lower.logsumexp(1)  # of each state of the lower layer
    p_visible = down0(lower).sigmoid()
    for x in visible:
        log_x = (x * p_visible.log() + (1 - x) * (1 - p_visible).log()).sum(1)
        logs.append((log_x + log_h).logsumexp(0))
    return torch.stack(logs)


def descent(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return -parameter.grad


def test_gradients_are_the_delta_rules() -> None:
    model = make(3)
    x = (digit_images()[0][:10, :, 2:5, 2:5] > 0.5).float()
    position = torch.arange(10)
    model({"input": x, "position": position})["loss"].backward()
    with torch.no_grad():
        awake, asleep = model.recognise(x.flatten(1), position), model.dream(position)
        torch.testing.assert_close(descent(model.top), (awake[2] - model.top.sigmoid()).mean(0))
        for n in range(2):
            up, down = model.recognition[n], model.generation[n]
            assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
            for layer, states, to, source in ((down, awake, n, n + 1), (up, asleep, n + 1, n)):
                weights, biases = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
                for b in range(10):
                    s, t = states[source][b], states[to][b]
                    error = t - torch.sigmoid(layer.weight @ s + layer.bias)
                    weights += torch.outer(error, s) / 10
                    biases += error / 10
                torch.testing.assert_close(descent(layer.weight), weights, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(descent(layer.bias), biases, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_probabilities_are_probabilities() -> None:
    model = make()
    assert float(exact_log_likelihood(model, every(4)).logsumexp(0)) == pytest.approx(0, abs=1e-4)
    states = every(4 + 5 + 3).split((4, 5, 3), 1)
    joint = -model.generation_nll(list(states))
    assert float(joint.logsumexp(0)) == pytest.approx(0, abs=1e-4)
    # q(h | x) sums to 1 for each of the 16 images.
    recognised = -model.recognition_nll(list(states))
    assert torch.allclose(recognised.view(16, -1).logsumexp(1), torch.zeros(16), atol=1e-4)


@torch.no_grad()
def test_importance_sampling_approaches_the_exact_likelihood() -> None:
    model = make(std=0.5)
    images = every(4).view(-1, 1, 2, 2)
    exact = exact_log_likelihood(model, every(4))
    estimate = model.log_likelihood(images, samples=20_000)
    assert torch.allclose(estimate, exact, atol=0.1)
    rough = model.log_likelihood(images, samples=1)
    assert float((rough - exact).mean()) < float((estimate - exact).mean())


@torch.no_grad()
def test_dreams_are_distributed_as_generated() -> None:
    model = make()
    dreams = model.dream(torch.arange(40_000))
    number = (dreams[0] @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
    shares = number.bincount(minlength=16) / 40_000
    assert torch.allclose(shares, exact_log_likelihood(model, every(4)).exp(), atol=0.01)


def test_learning_improves_the_exact_likelihood_and_the_bound() -> None:
    """Real digits, averaged to 4 x 4 and thresholded; every state of 7 + 4 units is summed."""
    train, test = ((nn.functional.avg_pool2d(part, 2) > 0.3).float() for part in digit_images())
    torch.manual_seed(0)
    model = Helmholtz(4, 1, (7, 4))
    with torch.no_grad():
        first = -exact_log_likelihood(model, test.flatten(1)).mean()
    fit(model, train, 800, 3e-2)
    with torch.no_grad():
        exact = -exact_log_likelihood(model, test.flatten(1)).mean()
        bound = model({"input": test, "position": torch.arange(len(test))})["loss"]
        estimate = -model.log_likelihood(test, samples=200).mean()
    p = train.flatten(1).mean(0).clamp(1e-3, 1 - 1e-3)
    independent = nn.functional.binary_cross_entropy(p.expand(360, 16), test.flatten(1)) * 16
    assert exact < 0.75 * first
    assert exact < independent - 0.2  # more than each pixel's frequency
    assert exact < bound < exact + 1.5
    assert abs(float(estimate - exact)) < 0.1


def test_states_are_functions_of_seed_and_position() -> None:
    model, x = make(4), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    position = torch.arange(6)
    assert torch.equal(model.binarise(x, position)[2:4], model.binarise(x[2:4], position[2:4]))
    binary = (x > 0.5).float()
    assert torch.equal(model.binarise(binary, position), binary.flatten(1))
    drawn = model.binarise(torch.full((4000, 1, 4, 4), 0.3), torch.arange(4000))
    assert abs(float(drawn.mean()) - 0.3) < 0.01
    for a, b in zip(model.dream(position), model.dream(position[3:]), strict=True):
        assert torch.equal(a[3:], b)


def test_halves_average_to_the_whole() -> None:
    batch = {"input": digit_images()[0][:8], "position": torch.arange(8)}
    assert_halves_average_to_the_whole(make(8, std=0.1), batch)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="widths"):
        Helmholtz(4, 1, ())
    model, position = make(4), torch.arange(2)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        model({"input": torch.full((2, 1, 4, 4), 1.5), "position": position})
    with pytest.raises(ValueError, match="takes"):
        model.encode(torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="binary"):
        model.log_likelihood(torch.full((2, 1, 4, 4), 0.5))
