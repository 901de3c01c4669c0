"""Recirculation: the paper's local rules written out by hand, and back-propagation beside it."""

from typing import Any

import pytest
import torch
from small import digit_images, fit
from support.halves import assert_halves_average_to_the_whole
from torch import Tensor, nn

from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Coder, Convolutional, Dense
from maepretrain.models.autoencoders.recirculation import Recirculation


def make_coder(likelihood: Any = "bernoulli", width: int = 5) -> Dense:
    torch.manual_seed(0)
    return Dense(8, 1, [width], code_activation="sigmoid", likelihood=likelihood)


def layers(model: Recirculation) -> tuple[nn.Linear, nn.Linear]:
    assert isinstance(model.coder, Dense)
    up, down = model.coder.encoder[0], model.coder.decoder[0]
    assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    return up, down


def textbook_updates(model: Recirculation, x: Tensor) -> list[Tensor]:
    """The changes of up.weight, up.bias, down.weight, down.bias, mean over samples."""
    (up, down), share = layers(model), model.regression
    total = [torch.zeros_like(p) for layer in (up, down) for p in (layer.weight, layer.bias)]
    for sample in x:
        v0 = sample.flatten()
        h1 = torch.sigmoid(up.weight @ v0 + up.bias)
        reconstructed = down.weight @ h1 + down.bias
        if model.coder.likelihood.kind == "bernoulli":
            reconstructed = torch.sigmoid(reconstructed)
        v2 = share * v0 + (1 - share) * reconstructed
        h3 = torch.sigmoid(up.weight @ v2 + up.bias)
        changes = [torch.outer(h1 - h3, v2), h1 - h3, torch.outer(v0 - v2, h1), v0 - v2]
        total = [a + b / len(x) for a, b in zip(total, changes, strict=True)]
    return total


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("regression", [0.0, 0.75])
def test_gradient_is_the_papers_update(likelihood: Any, regression: float) -> None:
    model = Recirculation(make_coder(likelihood), regression)
    for parameter in model.parameters():  # no symmetry that could hide a transposed rule
        nn.init.normal_(parameter, std=0.3)
    x = digit_images()[0][:7]
    model({"input": x})["loss"].backward()
    with torch.no_grad():
        expected = textbook_updates(model, x)
    up, down = layers(model)
    for p, change in zip((up.weight, up.bias, down.weight, down.bias), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(-p.grad, change, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_is_back_propagation_where_the_mixture_is_close_to_the_sample(likelihood: Any) -> None:
    """With symmetric weights, divided by 1 - lambda. In float64: the update is a difference."""
    model = Recirculation(make_coder(likelihood), 1 - 1e-4).double()
    x = digit_images()[0][:50].double()
    model({"input": x})["loss"].backward()
    local = [p.grad / 1e-4 for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.coder.nll(model.coder.encode(x), x).mean().backward()
    for mine, p in zip(local, model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(mine, p.grad, atol=1e-3, rtol=1e-2)


def test_starts_symmetric() -> None:
    up, down = layers(Recirculation(make_coder()))
    assert torch.equal(up.weight, down.weight.T)


def test_approaches_back_propagation() -> None:
    train, test = digit_images()
    local, back = (
        Recirculation(make_coder(width=32)),
        Autoencoder(Recirculation(make_coder(width=32)).coder),
    )
    with torch.no_grad():
        first = float(local({"input": test})["loss"])
    fit(local, train, 400, 1e-2)
    fit(back, train, 400, 1e-2)
    with torch.no_grad():
        errors = [float(m.coder.error(m.encode(test), test)) for m in (local, back)]
    assert errors[0] < 0.45 * first
    assert errors[0] < 1.05 * errors[1]


def test_loss_is_the_reconstruction_error() -> None:
    model, x = Recirculation(make_coder()), digit_images()[0][:9]
    shown = model.reconstruct(x)
    expected = nn.functional.binary_cross_entropy(shown.reconstruction, shown.original)
    torch.testing.assert_close(model({"input": x})["loss"].detach(), expected.detach())


def test_halves_average_to_the_whole() -> None:
    assert_halves_average_to_the_whole(
        Recirculation(make_coder()), {"input": digit_images()[0][:8]}
    )


@pytest.mark.parametrize(
    ("coder", "regression", "message"),
    [
        (Dense(8, 1, [9, 5], code_activation="sigmoid"), 0.75, "one layer"),
        (Dense(8, 1, [5]), 0.75, "sigmoid"),
        (Dense(8, 1, [5], code_activation="sigmoid", tied=True), 0.75, "not tied"),
        (
            Dense(8, 1, [5], code_activation="sigmoid", likelihood="categorical"),
            0.75,
            "categorical",
        ),
        (Convolutional(8, 1, [5], code_activation="sigmoid"), 0.75, "Dense"),
        (make_coder(), 1.0, r"regression 1\.0"),
    ],
)
def test_refuses(coder: Coder, regression: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recirculation(coder, regression)
