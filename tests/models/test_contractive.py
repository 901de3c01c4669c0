"""The contractive penalty against torch.func.jacrev, and what it does."""

from typing import Any

import pytest
import torch
from small import digit_images, fit
from torch import Tensor
from torch.func import jacrev, vmap

from maepretrain.models.autoencoders.coders import Coder, Convolutional, Dense
from maepretrain.models.autoencoders.contractive import Contractive

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 2, 5, 4, generator=GENERATOR, dtype=torch.float64)
POSITION = torch.arange(6)


def jacobians(coder: Coder, x: Tensor) -> Tensor:
    """(b, d, v) of each sample on its own."""
    return vmap(jacrev(lambda one: coder.encode(one[None])[0]))(x).flatten(2)


def one_layer(activation: Any) -> Coder:
    return Dense([5, 4], 2, [9], "gelu", activation).double()


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "none"])
def test_the_closed_form_of_one_layer(activation: Any) -> None:
    coder = one_layer(activation)
    truth = jacobians(coder, X).square().sum((1, 2))
    assert truth.min() > 0.1
    assert torch.allclose(Contractive(coder, jacobian="closed").norms(X), truth, rtol=1e-10)
    assert torch.allclose(Contractive(coder, jacobian="exact").norms(X), truth, rtol=1e-10)


DEEP: dict[str, Coder] = {
    "dense": Dense([5, 4], 2, [12, 10, 7], "tanh", "sigmoid").double(),
    "gelu": Dense([5, 4], 2, [12, 7], "gelu").double(),
    "convolutional": Convolutional([5, 4], 2, [3, 4], 7, activation="tanh").double(),
    "a map": Convolutional([5, 4], 2, [3, 4], activation="relu").double(),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_exact_norm_of_any_encoder(name: str) -> None:
    coder = DEEP[name]
    truth = jacobians(coder, X).square().sum((1, 2))
    model = Contractive(coder, weight=0.7)
    assert torch.allclose(model.norms(X), truth, rtol=1e-10)
    told = model({"input": X, "position": POSITION})
    assert torch.allclose(told["contraction"], truth.mean())
    assert torch.allclose(told["error"], coder.error(coder.encode(X), X))
    assert torch.allclose(told["loss"], told["error"] + 0.7 * truth.mean())


@pytest.mark.parametrize("name", DEEP)
def test_hutchinsons_estimate(name: str) -> None:
    """Its value is that of the same signs by jacrev; over many signs it has the exact mean."""
    coder = DEEP[name]
    model = Contractive(coder, jacobian="hutchinson", probes=3, seed=5)
    j = jacobians(coder, X)
    signs = model._signs(coder.encode(X), POSITION)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    truth = torch.einsum("rbd,bdv->rbv", signs, j).square().sum(2).mean(0)
    assert torch.allclose(model.norms(X), truth, rtol=1e-10)
    many = Contractive(coder, jacobian="hutchinson", probes=1500).norms(X)
    gram = j @ j.mT
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    deviation = (2 * off.square().sum((1, 2)) / 1500).sqrt()
    assert ((many - j.square().sum((1, 2))).abs() < 5 * deviation + 1e-12).all()


def test_signs_are_of_the_sample() -> None:
    model = Contractive(DEEP["dense"], jacobian="hutchinson", seed=1)
    whole = model.norms(X, POSITION + 40)
    assert torch.allclose(model.norms(X[2:4], POSITION[2:4] + 40), whole[2:4])
    assert not torch.allclose(model.norms(X, POSITION), whole)
    assert not torch.allclose(
        Contractive(DEEP["dense"], jacobian="hutchinson").norms(X, POSITION + 40), whole
    )


@pytest.mark.parametrize("jacobian", ["closed", "exact", "hutchinson"])
def test_gradients_of_the_norm_are_those_through_jacrev(jacobian: Any) -> None:
    """Second-order: of a linear combination of all parameters' gradients."""
    coder = one_layer("sigmoid")
    model = Contractive(coder, jacobian=jacobian, probes=2, seed=3)
    if jacobian == "hutchinson":
        signs = model._signs(coder.encode(X), POSITION)
        truth = torch.einsum("rbd,bdv->rbv", signs, jacobians(coder, X)).square().sum(2).mean(0)
    else:
        truth = jacobians(coder, X).square().sum((1, 2))
    encoder = [p for layer in coder.layers() for p in layer]
    for mine, its in zip(
        torch.autograd.grad(model.norms(X).mean(), encoder),
        torch.autograd.grad(truth.mean(), encoder),
        strict=True,
    ):
        assert mine.abs().max() > 1e-3
        assert torch.allclose(mine, its, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("jacobian", ["closed", "exact", "hutchinson"])
def test_training_contracts(jacobian: Any) -> None:
    train, test = digit_images()
    norms = []
    for weight in (0.0, 1e-2):
        torch.manual_seed(0)
        coder = Dense(8, 1, [32], "sigmoid", tied=True)
        model = Contractive(coder, weight, jacobian)
        losses = fit(model, train, 80, 2e-2)
        assert losses[-1] < losses[0]
        norms.append(float(Contractive(coder, jacobian="closed").norms(test).mean().detach()))
        assert all(p.grad is not None for p in model.parameters())
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize("jacobian", ["closed", "exact", "hutchinson"])
def test_validation_in_inference_mode(jacobian: Any) -> None:
    model = Contractive(Dense(8, 1, [12], "tanh"), jacobian=jacobian)
    batch = {"input": torch.rand(3, 1, 8, 8), "position": torch.arange(3)}
    with torch.inference_mode():
        inside = model({name: value.clone() for name, value in batch.items()})
        shown = model.reconstruct(batch["input"])
    assert inside["loss"].item() == pytest.approx(model(batch)["loss"].item())
    assert shown.reconstruction.shape == (3, 1, 8, 8)
    assert model.layers()[-1] == [] and "contraction" in model.summary()
    assert model.encode(batch["input"]).shape == (3, 12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Contractive(Dense(8, 1, [4]), weight=-1.0), "weight -1.0"),
        (lambda: Contractive(Dense(8, 1, [4]), probes=0), "probes 0"),
        (lambda: Contractive(Dense(8, 1, [9, 4]), jacobian="closed"), "one dense layer"),
        (lambda: Contractive(Dense(8, 1, [4], "gelu"), jacobian="closed"), "one dense layer"),
        (lambda: Contractive(Convolutional(8, 1, [4]), jacobian="closed"), "one dense layer"),
    ],
)
def test_mistakes(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
