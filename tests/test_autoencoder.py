"""The autoencoder against PCA, and what the capacity of the code and of its coder does."""

import copy

import numpy as np
import pytest
import torch
from family import digit_images, fit
from scipy.linalg import subspace_angles
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from maepretrain.models.autoencoder import Autoencoder
from maepretrain.models.coders import Coder, Convolutional, Dense
from maepretrain.models.sparse import Sparse


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
    losses = fit(model, train, 120, 1e-2)
    assert losses[-1] < losses[0]
    assert error(model, test) < 0.45 * mean_image
    assert model.encode(test).shape == (360, 24)
    shown = model.reconstruct(test[:5])
    assert shown._fields == ("original", "reconstruction")
    assert torch.equal(shown.original, test[:5]) and shown.reconstruction.shape == (5, 1, 8, 8)


def test_without_a_penalty_an_overcomplete_code_copies() -> None:
    """Its error is far below any undercomplete one's, on digits and on noise, which has nothing to
    be learnt; its code is no sparser. With a penalty it cannot copy."""
    train, test = digit_images()
    noise = torch.rand(test.shape, generator=torch.Generator().manual_seed(0))
    models: dict[str, nn.Module] = {}
    for name in ("under", "over", "sparse"):
        torch.manual_seed(0)
        coder = Dense(8, 1, [16 if name == "under" else 128])
        models[name] = Sparse(coder, "l1", 3e-3) if name == "sparse" else Autoencoder(coder)
        fit(models[name], train, 400, 5e-3)
    copied, under, sparse = (error(models[n], test) for n in ("over", "under", "sparse"))
    assert copied < 0.05 * under and copied < 0.2 * sparse
    # Not one of the digits' kind, and still copied: far better than by digits' features.
    assert error(models["over"], noise) < 0.6 * error(models["sparse"], noise)
    active = {n: float((m.encode(test) > 0.01).float().mean()) for n, m in models.items()}  # pyright: ignore[reportCallIssue]
    assert active["over"] > 0.3 and active["sparse"] < 0.5 * active["over"]


def test_what_is_learnt_is_of_the_data_that_was_seen() -> None:
    """A model of digits reconstructs patches of a photograph worse than one of such patches does,
    and the reverse."""
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).float().mean(2) / 255
    patches = photograph[:400, :640].unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 1, 8, 8)
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))]
    sets = {"digits": digit_images(), "patches": (patches[:1400], patches[1400:1760])}
    errors = {}
    for seen, (train, _) in sets.items():
        torch.manual_seed(0)
        model = Autoencoder(Dense(8, 1, [64, 12], "relu", "none"))
        fit(model, train, 150, 5e-3)
        errors |= {(seen, shown): error(model, test) for shown, (_, test) in sets.items()}
    assert errors["digits", "patches"] > 3 * errors["patches", "patches"]
    assert errors["patches", "digits"] > 2 * errors["digits", "digits"]


def test_one_number_memorises_a_small_set_if_the_coder_is_powerful() -> None:
    """Goodfellow et al. 2016, section 14.1: a code of one number can stand for the index of the
    sample; nothing is learnt of the distribution."""
    train, test = digit_images()
    few = train[:6]
    torch.manual_seed(0)
    model = Autoencoder(Dense(8, 1, [128, 64, 1], "gelu", "none"))
    fit(model, few, 400, 3e-3, batch=6)
    mean_image = float((few - few.mean(0)).square().mean())
    assert error(model, few) < 0.1 * mean_image
    assert error(model, test) > 0.7 * float((test - train.mean(0)).square().mean())
    torch.manual_seed(0)
    linear = Autoencoder(Dense(8, 1, [1], "none"))
    fit(linear, few, 300, 1e-2, batch=6)
    assert error(linear, few) > 0.3 * mean_image


def test_an_overcomplete_code_makes_xor_separable() -> None:
    """Four clouds whose classes no line separates, before and after a code of one number."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 2, (600, 2), generator=generator)
    points = 2.0 * corner - 1 + 0.2 * torch.randn(600, 2, generator=generator)
    labels = (corner[:, 0] ^ corner[:, 1]).numpy()

    def separated(features: np.ndarray) -> float:
        probe = LogisticRegression(C=100, max_iter=2000).fit(features[:400], labels[:400])
        return float(probe.score(features[400:], labels[400:]))

    accuracy = {}
    for width in (1, 16):
        torch.manual_seed(0)
        model = Autoencoder(Dense([2], 1, [width], "tanh"))
        fit(model, points[:400, None], 200, 2e-2)
        accuracy[width] = separated(model.encode(points[:, None]).detach().numpy())
    assert separated(points.numpy()) < 0.8 and accuracy[1] < 0.8
    assert accuracy[16] > 0.98


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
