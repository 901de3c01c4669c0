"""The convolutional coder: its prior against SciPy, its normalisation against loops, its gradients
against what the papers say."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import logistic
from small import digit_images, fit
from support.halves import assert_halves_average_to_the_whole
from torch import Tensor

from maepretrain.compression.autoencoder import (
    LARGEST,
    Compression,
    DivisiveNormalisation,
    FactorisedPrior,
    padded,
    quantised,
    round_straight_through,
    table_bits,
)


def random_prior(channels: int = 4) -> FactorisedPrior:
    torch.manual_seed(0)
    prior = FactorisedPrior(channels)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter))
    return prior


def density(prior: FactorisedPrior, k: int, y: float) -> float:
    shares = prior.logits[k].double().softmax(0).tolist()
    means, scales = prior.mean[k].tolist(), prior.log_scale[k].exp().tolist()
    parts = zip(shares, means, scales, strict=True)
    return sum(w * float(logistic.pdf(y, m, s)) for w, m, s in parts)


def test_bits_are_the_integral_of_the_density() -> None:
    prior = random_prior()
    code = torch.tensor([[-3.3, 0.2, 1.0, 2.75], [0.0, -1.5, 0.5, 4.0]])[:, :, None, None]
    with torch.no_grad():
        found = prior.bits(code)[:, :, 0, 0]
    for b in range(2):
        for k in range(4):
            y = float(code[b, k, 0, 0])
            p = quad(lambda v, k=k: density(prior, k, v), y - 0.5, y + 0.5)[0]
            assert float(found[b, k]) == pytest.approx(-math.log2(p), rel=1e-4)


def test_bits_stay_finite_far_away() -> None:
    prior = FactorisedPrior(1)
    with torch.no_grad():
        prior.log_scale.fill_(-2)
    code = torch.tensor([-900.0, 900.0]).view(2, 1, 1, 1).requires_grad_()
    bits = prior.bits(code)
    assert bits.isfinite().all() and (bits > 1000).all()
    (gradient,) = torch.autograd.grad(bits.sum(), code)
    assert gradient[0].item() < 0 < gradient[1].item()


def test_probabilities_are_those_of_the_bits_and_sum_to_one() -> None:
    prior = random_prior()
    p = prior.probabilities()
    assert p.shape == (4, 2 * LARGEST + 1)
    torch.testing.assert_close(p.sum(1), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert (p > 0).all()
    numbers = torch.arange(-20.0, 21).view(1, 1, 1, -1).expand(1, 4, 1, -1)
    with torch.no_grad():
        bits = prior.bits(numbers)[0, :, 0].double()
    torch.testing.assert_close(
        -p[:, LARGEST - 20 : LARGEST + 21].log2(), bits, atol=1e-3, rtol=1e-4
    )
    # What lies beyond the ends is theirs.
    beyond = sum(
        w * float(logistic.sf(LARGEST - 0.5, m, s))
        for w, m, s in zip(
            prior.logits[0].double().softmax(0).tolist(),
            prior.mean[0].tolist(),
            prior.log_scale[0].exp().tolist(),
            strict=True,
        )
    )
    assert float(p[0, -1]) == pytest.approx(beyond, rel=1e-4)


def test_table_bits_equal_a_loop() -> None:
    p = torch.rand(3, 5, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    symbols = torch.randint(5, (2, 3, 2, 2))
    for b in range(2):
        expected = sum(
            -math.log2(float(p[k, int(symbols[b, k, i, j])]))
            for k in range(3)
            for i in range(2)
            for j in range(2)
        )
        assert float(table_bits(symbols, p)[b]) == pytest.approx(expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_divisive_normalisation_equals_loops(inverse: bool) -> None:
    torch.manual_seed(0)
    gdn = DivisiveNormalisation(3, inverse)
    with torch.no_grad():
        gdn.gamma.add_(0.3 * torch.randn(3, 3))
        gdn.beta.uniform_(0.5, 2)
    x = torch.randn(1, 3, 2, 2)
    found = gdn(x)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                norm = gdn.beta[c].item()
                norm += sum(
                    abs(gdn.gamma[c, d].item()) * x[0, d, i, j].item() ** 2 for d in range(3)
                )
                root = math.sqrt(norm)
                expected = float(x[0, c, i, j]) * (root if inverse else 1 / root)
                assert float(found[0, c, i, j]) == pytest.approx(expected, rel=1e-4)


def test_straight_through_has_a_derivative_of_one() -> None:
    x = torch.tensor([-1.7, -0.4, 0.2, 2.6], requires_grad=True)
    rounded = round_straight_through(x)
    torch.testing.assert_close(rounded.detach(), torch.tensor([-2.0, 0, 0, 3]))
    (gradient,) = torch.autograd.grad((rounded * torch.tensor([1.0, 2, 3, 4])).sum(), x)
    assert gradient.tolist() == [1, 2, 3, 4]
    assert quantised(torch.tensor([500.0, -500.0])).tolist() == [LARGEST, -LARGEST]


def make(**more: object) -> Compression:
    torch.manual_seed(0)
    return Compression(**({"image_size": 16, "channels": 1, "width": 8, "code": 6} | more))  # type: ignore


def batch(b: int = 8) -> dict[str, Tensor]:
    digits, _ = digit_images()
    big = torch.nn.functional.interpolate(digits[:b], scale_factor=2)
    return {"input": 2 * big - 1, "position": torch.arange(b)}


@pytest.mark.parametrize("quantisation", ["noise", "straight_through"])
def test_halves_average_to_the_whole(quantisation: str) -> None:
    assert_halves_average_to_the_whole(make(quantisation=quantisation, refinements=2), batch())


def test_noise_is_uniform_and_of_the_position() -> None:
    model, data = make(), batch(100)
    with torch.no_grad():
        # A narrow prior far to one side: the rate grows with whatever is added to the code.
        model.prior.mean.fill_(-2)
        model.prior.log_scale.fill_(-1)
        rates = [float(model(data)["bpp"]) for _ in range(2)]
        later = float(model(data | {"position": data["position"] + 100})["bpp"])
    assert rates[0] == rates[1] != later
    # The rate with noise, averaged, is the expected one over the unit interval around the code.
    code = model.continuous(data["input"]).detach()
    grid = [model.prior.bits(code + u).detach() for u in np.linspace(-0.475, 0.475, 20)]
    expected = float(torch.stack(grid).mean(0).sum()) / (100 * 256)
    assert rates[0] == pytest.approx(expected, rel=0.02)


def test_the_refinement_leaves_the_rest_alone() -> None:
    """The plain decoder's initial values and gradients are those of a model without."""
    alone, refined = make(), make(refinements=2)
    data = batch()
    for model in (alone, refined):
        model(data)["loss"].backward()
    plain = dict(alone.named_parameters())
    shared = {n: p for n, p in refined.named_parameters() if not n.startswith("refinement")}
    assert plain.keys() == shared.keys()
    for name, parameter in shared.items():
        assert torch.equal(parameter, plain[name])
        found, expected = parameter.grad, plain[name].grad
        assert found is not None and expected is not None and torch.equal(found, expected)


def test_evaluation_is_the_files_rate_and_the_reconstructions_error() -> None:
    model, data = make(refinements=2).eval(), batch()
    with torch.no_grad():
        found = model({"input": data["input"]})
    shown = model.reconstruct(data["input"])
    for name, row in (("mse", shown.plain), ("refined_mse", shown.reconstruction)):
        expected = (row - data["input"]).square().mean()
        torch.testing.assert_close(found[name], expected)
    bits = table_bits(model.symbols(data["input"]), model.probabilities()).mean() / 256
    assert float(found["bpp"]) == pytest.approx(float(bits), rel=1e-4)


def test_any_size_is_padded_and_cropped() -> None:
    model = make().eval()
    x = torch.rand(2, 1, 13, 21)
    assert padded(x, 8).shape == (2, 1, 16, 24)
    assert torch.equal(padded(x, 8)[0, 0, 13:, :21], x[0, 0, 12:13].expand(3, -1))
    assert model.symbols(x).shape == (2, 6, 2, 3)
    assert model.reconstruct(x).reconstruction.shape == x.shape
    one = torch.rand(1, 1, 1, 1)
    assert model.reconstruct(one).reconstruction.shape == one.shape


def test_weight_buys_quality_with_bits() -> None:
    images = batch(200)["input"]
    found = []
    for weight in (3.0, 100.0):
        model = make(weight=weight)
        fit(model, images, 150, 5e-3, 32)
        with torch.no_grad():
            found.append(model.eval()({"input": images}))
    assert found[0]["bpp"] < 0.8 * found[1]["bpp"]
    assert found[1]["mse"] < 0.8 * found[0]["mse"]


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"weight 0\.0 positive"):
        make(weight=0.0)
    with pytest.raises(ValueError, match="code 0"):
        make(code=0)
    with pytest.raises(ValueError, match="the model takes"):
        make().encode(torch.rand(1, 1, 8, 8))
