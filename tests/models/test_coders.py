"""Dense and convolutional coders: what their layers compute, shapes, groups of parameters."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from maepretrain.models.autoencoders.coders import Coder, Convolutional, Dense

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(3, 2, 6, 5, generator=GENERATOR)

CODERS: dict[str, Coder] = {
    "dense": Dense([6, 5], 2, [9, 4], "relu", "sigmoid"),
    "one layer": Dense([6, 5], 2, [4], "tanh"),
    "overcomplete": Dense([6, 5], 2, [100]),
    "tied": Dense([6, 5], 2, [9, 4], tied=True),
    "categorical": Dense([6, 5], 2, [4], likelihood="categorical", levels=3),
    "convolutional": Convolutional([6, 5], 2, [3, 4], 7),
    "a map": Convolutional([6, 5], 2, [3, 4], kernel=5, code_activation="none"),
    "one stage": Convolutional([6, 5], 2, [3]),
    "levels": Convolutional([6, 5], 2, [3, 4], 7, likelihood="categorical", levels=3),
}


@pytest.mark.parametrize("name", CODERS)
def test_shapes_groups_and_gradients(name: str) -> None:
    coder = CODERS[name]
    hidden = coder.hidden(X)
    code = coder.encode(X)
    assert hidden.shape == (3, coder.hidden_width)
    assert code.shape == (3, coder.width)
    assert torch.equal(coder.code(hidden), code)
    assert coder.decode(code).shape == (3, 60, coder.likelihood.parameters_per_value)
    assert coder.mean(code).shape == X.shape
    assert coder.nll(code, X).shape == (3,)
    layers = coder.layers()
    assert layers[-1] == []
    every = {id(p) for p in coder.parameters()}
    assert {id(p) for layer in layers for p in layer} < every
    coder.error(code, X).backward()
    assert all(p.grad is not None for p in coder.parameters())
    # The code depends on the encoder's parameters, on all of them, and on no others.
    names = {id(p): n for n, p in coder.named_parameters()}
    gradients = torch.autograd.grad(
        coder.encode(X).sum(), list(coder.parameters()), allow_unused=True
    )
    used = {id(p) for p, g in zip(coder.parameters(), gradients, strict=True) if g is not None}
    assert used == {id(p) for layer in layers for p in layer}, names


def test_dense_is_what_its_layers_compute() -> None:
    coder = Dense([6, 5], 2, [9, 4], "relu", "sigmoid")
    w = {name: p.detach() for name, p in coder.named_parameters()}
    hidden = (X.reshape(3, 60) @ w["encoder.0.weight"].T + w["encoder.0.bias"]).clamp(min=0)
    code = (hidden @ w["encoder.1.weight"].T + w["encoder.1.bias"]).sigmoid()
    assert torch.allclose(coder.encode(X), code, atol=1e-6)
    back = (code @ w["decoder.0.weight"].T + w["decoder.0.bias"]).clamp(min=0)
    back = back @ w["decoder.1.weight"].T + w["decoder.1.bias"]
    assert torch.allclose(coder.mean(code), back.view(3, 2, 6, 5), atol=1e-6)
    assert torch.allclose(coder.error(code, X), (back.view_as(X) - X).square().mean())


def test_tied_weights_are_the_encoders_transposed() -> None:
    coder = Dense([6, 5], 2, [9, 4], "tanh", tied=True)
    w = {name: p.detach() for name, p in coder.named_parameters()}
    assert sorted(n for n in w if "weight" in n) == ["encoder.0.weight", "encoder.1.weight"]
    assert [w[f"biases.{i}"].shape for i in (0, 1)] == [(9,), (60,)]
    code = torch.randn(3, 4, generator=GENERATOR)
    back = (code @ w["encoder.1.weight"] + w["biases.0"]).tanh() @ w["encoder.0.weight"]
    assert torch.allclose(coder.decode(code)[..., 0], back + w["biases.1"], atol=1e-6)


def test_convolutions_halve_and_the_decoder_enlarges() -> None:
    coder = Convolutional([6, 5], 2, [3, 4], kernel=3, code_activation="none")
    w = {name: p.detach() for name, p in coder.named_parameters()}
    first = F.conv2d(X, w["encoder.0.weight"], w["encoder.0.bias"], 2, 1).relu()
    code = F.conv2d(first, w["encoder.1.weight"], w["encoder.1.bias"], 2, 1)
    assert code.shape == (3, 4, 2, 2)
    assert torch.allclose(coder.encode(X), code.flatten(1), atol=1e-6)
    wide = code[..., [0, 0, 1], :][..., [0, 0, 1]]  # 2 x 2 to 3 x 3
    wide = F.conv2d(wide, w["decoder.0.weight"], w["decoder.0.bias"], padding=1).relu()
    wide = wide[..., [0, 0, 1, 1, 2, 2], :][..., [0, 0, 1, 1, 2]]  # 3 x 3 to 6 x 5
    image = F.conv2d(wide, w["decoder.1.weight"], w["decoder.1.bias"], padding=1)
    assert torch.allclose(coder.mean(code.flatten(1)), image, atol=1e-6)


def test_levels_of_a_value_stand_together() -> None:
    """The categorical parameters of value v are outputs v's q channels, in both coders alike."""
    coder = Convolutional([6, 5], 2, [3], likelihood="categorical", levels=3)
    last: Any = coder.decoder[-1]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.arange(6.0))
    parameters = coder.decode(coder.encode(X))
    assert torch.equal(parameters[:, :30], torch.arange(3.0).expand(3, 30, 3))
    assert torch.equal(parameters[:, 30:], torch.arange(3.0, 6.0).expand(3, 30, 3))


@pytest.mark.parametrize("code", [None, 5])
def test_signals(code: int | None) -> None:
    coder = Convolutional([37], 3, [4, 6], code)
    signals = torch.rand(2, 3, 37, generator=GENERATOR)
    assert coder.width == (code or 6 * 10)
    assert coder.mean(coder.encode(signals)).shape == signals.shape
    assert Dense([37], 3, [5]).encode(signals).shape == (2, 5)


def test_initial_values() -> None:
    torch.manual_seed(0)
    for coder in (
        Dense(16, 1, [64]),
        Convolutional(16, 1, [16, 32], 50),
        Dense(8, 1, [9], tied=True),
    ):
        for name, p in coder.named_parameters():
            if p.ndim == 1:
                assert not p.any(), name
            else:
                receptive = math.prod(p.shape[2:])
                bound = math.sqrt(6 / (receptive * (p.shape[0] + p.shape[1])))
                assert 0.9 * bound < p.abs().max() <= bound, name


def test_summary_counts() -> None:
    told = Dense(28, 1, [64]).summary()
    assert told["coder"] == "Dense, 784 values to 64 and back, gaussian"
    assert told["parameters"] == "encoder 50,240, decoder 50,960"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dense(8, 1, []), r"widths \[\]"),
        (lambda: Dense(8, 1, [4, 0]), r"widths \[4, 0\]"),
        (lambda: Dense(8, 1, [4], tied=True, likelihood="categorical"), "tied"),
        (lambda: Convolutional(8, 1, []), r"stages \[\]"),
        (lambda: Convolutional(8, 1, [4], 0), "code 0"),
        (lambda: Convolutional(8, 1, [4], kernel=4), "kernel 4 must be odd"),
        (lambda: Convolutional([4, 4, 4], 1, [4]), "images and signals"),
        (lambda: Dense(8, 1, [4]).encode(torch.zeros(2, 1, 8, 9)), r"\(1, 8, 9\).*\(1, 8, 8\)"),
    ],
)
def test_mistakes(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
