"""The autoencoder against PCA, and what the capacity of the code and of its coder does."""

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from small import digit_images, fit
from torch import Tensor, nn

from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Coder, Convolutional, Dense


def error(model: nn.Module, images: Tensor) -> float:
    """The mean squared error of what the model reconstructs."""
    shown = model.reconstruct(images)  # pyright: ignore[reportCallIssue]
    return float((shown.reconstruction - shown.original).square().mean())


def descend(model: nn.Module, images: Tensor, steps: int) -> None:
    """Full-batch L-BFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model({"input": images})["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_autoencoder_spans_the_principal_subspace(tied: bool) -> None:
    torch.manual_seed(0)
    images = digit_images()[0].double()
    model = Autoencoder(Dense(8, 1, [6], "none", tied=tied)).double()
    descend(model, images, 250)
    coder = model.coder
    assert isinstance(coder, Dense)
    layer = coder.encoder[0] if tied else coder.decoder[0]
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().numpy()
    spanned = weight.T if tied else weight
    flat = images.flatten(1).numpy()
    pca = PCA(6).fit(flat)
    assert pca.components_ is not None
    assert subspace_angles(spanned, pca.components_.T).max() < 1e-2
    best = np.square(flat - pca.inverse_transform(pca.transform(flat))).mean()
    assert error(model, images) == pytest.approx(best, rel=1e-3)


CODERS: dict[str, Coder] = {
    "relu": Dense(8, 1, [24], "relu"),
    "sigmoid": Dense(8, 1, [24], "sigmoid"),
    "tanh": Dense(8, 1, [24], "tanh"),
    "deep": Dense(8, 1, [128, 64, 24], "relu", "none"),
    "deep, tied": Dense(8, 1, [128, 64, 24], "tanh", tied=True),
    "convolutional": Convolutional(8, 1, [16], 24, code_activation="none"),
    "bernoulli": Dense(8, 1, [24], "relu", likelihood="bernoulli"),
    "categorical": Dense(8, 1, [24], "relu", likelihood="categorical", levels=8),
}


@pytest.mark.parametrize("name", CODERS)
def test_every_kind_reconstructs_held_out_digits(name: str) -> None:
    """Far better than the mean image does."""
    torch.manual_seed(0)
    model = Autoencoder(copy.deepcopy(CODERS[name]))
    train, test = digit_images()
    mean_image = float((test - train.mean(0)).square().mean())
    losses = fit(model, train, 160, 1e-2)
    assert losses[-1] < losses[0]
    assert error(model, test) < 0.45 * mean_image
    assert model.encode(test).shape == (360, 24)
    shown = model.reconstruct(test[:5])
    assert shown._fields == ("original", "reconstruction")
    assert torch.equal(shown.original, test[:5]) and shown.reconstruction.shape == (5, 1, 8, 8)


def test_the_encoder_can_be_probed_and_tuned() -> None:
    model = Autoencoder(Dense(8, 1, [20, 10]))
    layers = model.layers()
    assert [[tuple(p.shape) for p in layer] for layer in layers] == [
        [(20, 64), (20,)],
        [(10, 20), (10,)],
        [],
    ]
    assert "parameters" in model.summary()
    with pytest.raises(ValueError, match="the model takes"):
        model.encode(torch.zeros(1, 3, 8, 8))
