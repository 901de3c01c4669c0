"""The recurrent coder of residuals: drawn bits, their gradient, and rates that buy quality."""

import math

import pytest
import torch
from skimage.data import chelsea
from skimage.metrics import peak_signal_noise_ratio
from support.halves import assert_halves_average_to_the_whole

from maepretrain.compression.autoencoder import table_bits
from maepretrain.compression.residual_coder import ResidualCoder, binarise, sign


def make(**more: object) -> ResidualCoder:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"image_size": 16, "width": 8, "bits": 4, "iterations": 3}
    return ResidualCoder(**(sizes | more))  # type: ignore


def photographs(b: int = 8, side: int = 16) -> torch.Tensor:
    """Pieces of a photograph, -1..1."""
    image = torch.from_numpy(chelsea()).movedim(2, 0).float() / 127.5 - 1
    return torch.stack([image[:, 40 + 9 * n :, 80 + 17 * n :][:, :side, :side] for n in range(b)])


def test_bits_are_drawn_with_the_right_probability_and_pass_gradients() -> None:
    y = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).repeat(20000, 1).requires_grad_()
    noise = torch.rand(y.shape, generator=torch.Generator().manual_seed(0))
    bits = binarise(y, noise)
    torch.testing.assert_close(bits.detach().abs(), torch.ones_like(bits))
    assert ((bits > 0).float().mean(0) - torch.tensor([0, 0.25, 0.5, 0.75, 1])).abs().max() < 0.02
    (gradient,) = torch.autograd.grad((3 * bits).sum(), y)
    assert (gradient == 3).all()
    assert sign(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [-1, -1, 1]


def test_each_iteration_codes_what_is_missing() -> None:
    """The chain by hand, from the parts."""
    model, x = make().eval(), photographs(2)
    encoder, decoder = [None, None], [None, None, None]
    missing, shown, bits = x, torch.zeros_like(x), []
    with torch.no_grad():
        for t in range(3):
            gain = 1.25**t
            y, encoder = model.encoder(gain * missing, encoder)  # type: ignore
            bits.append((y > 0).long())
            change, decoder = model.decoder(2.0 * bits[-1] - 1, decoder)  # type: ignore
            shown = shown + change / gain
            missing = x - shown
            symbols = model.symbols(x, t + 1)
            assert torch.equal(symbols, torch.cat(bits, 1))
            torch.testing.assert_close(model.decode_symbols(symbols), shown)
    torch.testing.assert_close(model.reconstruct(x).reconstruction, shown)
    with torch.no_grad():
        found = model({"input": x})
    torch.testing.assert_close(found["mse"], (x - shown).square().mean())


def test_the_prior_learns_how_often_bits_are_set_and_nothing_else_learns_it() -> None:
    model, x = make(), photographs()
    with torch.no_grad():
        model.prior.copy_(torch.randn(3, 4))
    data = {"input": x, "position": torch.arange(8)}
    found = model(data)
    rate = found["loss"] - found["residual"]
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(rate, list(named.values()), allow_unused=True)
    reached = {
        name
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None and bool(gradient.abs().max() > 1e-7)
    }
    assert "prior" in reached
    with torch.no_grad():
        rated = model.eval()({"input": x})["bpp"]
        symbols = model.symbols(x, 3)
        expected = table_bits(symbols, model.probabilities(3)).mean() / 256
    assert float(rated) == pytest.approx(float(expected), rel=1e-5)
    p = model.probabilities(2)
    assert p.shape == (8, 2)
    assert float(p[5, 1]) == pytest.approx(1 / (1 + math.exp(-model.prior[1, 1].item())))


@pytest.mark.parametrize(
    ("iterations", "steps"), [(2, 100), pytest.param(4, 600, marks=pytest.mark.slow)]
)
def test_more_iterations_are_more_bits_and_not_less_quality(iterations: int, steps: int) -> None:
    """On the image that a tiny model was trained on: random pieces, then the whole."""
    model = make(width=12, iterations=iterations)
    image = torch.from_numpy(chelsea()[:296, :448]).movedim(2, 0).float() / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters())
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        places = torch.randint(280, (16, 2), generator=random).tolist()
        pieces = torch.stack([image[:, i : i + 16, j : j + 16] for i, j in places])
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        position = torch.arange(16) + 16 * step
        model({"input": pieces, "position": position})["loss"].backward()
        optimizer.step()
    model.eval()
    quality, bits = [], []
    for t in range(1, iterations + 1):
        symbols = model.symbols(image[None], t)
        decoded = model.decode_symbols(symbols)[0]
        quality.append(peak_signal_noise_ratio(image.numpy(), decoded.numpy(), data_range=2))
        bits.append(float(table_bits(symbols, model.probabilities(t))))
    assert bits == sorted(bits) and bits[-1] > 1.6 * bits[0]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 0.5


def test_halves_average_to_the_whole() -> None:
    assert_halves_average_to_the_whole(
        make(), {"input": photographs(), "position": torch.arange(8)}
    )


def test_any_size_is_padded_and_cropped() -> None:
    model, x = make().eval(), photographs(1, 21)[:, :, :13]
    assert model.symbols(x, 2).shape == (1, 8, 2, 3)
    assert model.reconstruct(x).reconstruction.shape == x.shape


def test_refuses() -> None:
    for wrong in ({"width": 10}, {"bits": 0}, {"iterations": 256}):
        with pytest.raises(ValueError, match="multiple of 4"):
            make(**wrong)
    with pytest.raises(ValueError, match="the model takes"):
        make().encode(photographs(1, 8))
