"""Geometry: Jacobians against autograd, linear algebra and analytic scores; a digit that moves as a
manifold whose tangent is known."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from geometry import along_and_across, fit, shifted
from sklearn.decomposition import PCA
from small import digit_images
from torch import Tensor
from torch.nn import functional as F

from maepretrain.evaluate.geometry import (
    across,
    decoder_tangents,
    encoder_tangents,
    flat_map,
    interpolate,
    jacobian,
    sensitivity,
    traverse,
    vector_field,
)
from maepretrain.models.autoencoders.autoencoder import Autoencoder
from maepretrain.models.autoencoders.coders import Convolutional, Dense
from maepretrain.models.autoencoders.contractive import Contractive
from maepretrain.models.autoencoders.denoising import Denoising
from maepretrain.plots.geometry import draw_maps

EXAMPLE = Path(__file__).parents[2] / "examples/geometry.py"


@pytest.fixture(scope="module")
def moving() -> tuple[Autoencoder, Tensor]:
    """An autoencoder of one number for a real digit that moves to the right, and the digit."""
    digit = digit_images()[1][0]
    torch.manual_seed(0)
    model = Autoencoder(Dense(16, 1, [128, 1], activation="tanh", code_activation="none"))
    fit(model, shifted(digit, torch.linspace(-3, 3, 601)), 1200)
    return model, digit


def test_jacobian_equals_autograd() -> None:
    torch.manual_seed(0)
    coder = Convolutional(8, 1, [3, 4], code=5, activation="tanh")
    x = digit_images()[0][:3]
    mine = jacobian(coder.encode, x)
    for sample, found in zip(x, mine, strict=True):
        truth = torch.autograd.functional.jacobian(lambda s: coder.encode(s[None])[0], sample)
        assert isinstance(truth, Tensor)
        torch.testing.assert_close(found, truth.flatten(1), atol=1e-6, rtol=1e-4)


def test_tangents_of_linear_maps_are_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 6, generator=generator)
    u, s, v = torch.linalg.svd(a)
    x = torch.randn(2, 6, generator=generator)
    into, values = encoder_tangents(lambda y: y @ a.T, x, 3)
    out, same = decoder_tangents(lambda y: y @ a.T, x, 3)
    torch.testing.assert_close(values, s[:3].expand(2, 3))
    torch.testing.assert_close(same, values)
    for b in range(2):
        torch.testing.assert_close((into[b] @ v[:3].T).abs(), torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close((out[b] @ u[:, :3]).abs(), torch.eye(3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="5 directions"):
        encoder_tangents(lambda y: y @ a.T, x, 5)


def test_first_tangents_are_the_translation(moving: tuple[Autoencoder, Tensor]) -> None:
    """Against finite differences of shifted digits that training did not see."""
    model, digit = moving
    at = torch.linspace(-2, 2, 9) + 0.003
    x = shifted(digit, at)
    truth = ((shifted(digit, at + 0.05) - shifted(digit, at - 0.05)) / 0.1).flatten(1)
    code = model.encode(x).detach()
    learnt, length = decoder_tangents(model.coder.mean, code, 1)
    assert F.cosine_similarity(learnt.flatten(1), truth).abs().min() > 0.9
    # The chain of both Jacobians moves along the curve as fast as the digit does.
    speed = sensitivity(model.encode, x, truth.view_as(x)) * length[:, 0]
    torch.testing.assert_close(speed, torch.ones(9), atol=0.2, rtol=0)


def test_sensitivity_is_the_length_of_the_jacobians_product() -> None:
    torch.manual_seed(0)
    coder = Dense(8, 1, [7], activation="tanh")
    x = digit_images()[0][:4]
    direction = torch.randn(4, 1, 8, 8)
    unit = direction.flatten(1) / direction.flatten(1).norm(dim=1, keepdim=True)
    expected = (jacobian(coder.encode, x) @ unit[..., None]).squeeze(-1).norm(dim=1)
    torch.testing.assert_close(sensitivity(coder.encode, x, direction), expected)


def test_across_is_what_least_squares_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    direction, tangents = (torch.randn(*s, generator=generator) for s in ((3, 2, 4), (3, 2, 2, 4)))
    left = across(direction, tangents)
    for b in range(3):
        basis = tangents[b].flatten(1).T
        fitted = torch.linalg.lstsq(basis, direction[b].flatten()[:, None]).solution
        residue = direction[b].flatten() - (basis @ fitted)[:, 0]
        torch.testing.assert_close(left[b].flatten(), residue, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_contraction_is_across_the_manifold() -> None:
    """Along the way to near real digits the code stays sensitive (Rifai et al. 2011, section 5)."""
    train, test = digit_images()
    ratios = []
    for weight in (0.0, 1e-2):
        torch.manual_seed(0)
        coder = Dense(8, 1, [64], activation="sigmoid", tied=True, likelihood="bernoulli")
        model = Contractive(coder, weight, "closed")
        fit(model, train, 300)
        along, off = along_and_across(model.encode, train, test)
        ratios.append(along / off)
    assert ratios[1] > 1.05 * ratios[0] > 1.05


def test_denoisers_field_is_the_score_of_a_gaussian() -> None:
    """Of N(0, S) with noise sigma the best r(x) - x is -sigma^2 (S + sigma^2)^-1 x, so that divided
    by sigma^2 it approaches the score -S^-1 x (Alain and Bengio 2014, theorem 1)."""
    torch.manual_seed(0)
    covariance, sigma = torch.tensor([[1.0, 0.6], [0.6, 1.0]]), 0.2
    samples = torch.randn(20_000, 2) @ torch.linalg.cholesky(covariance).T
    coder = Dense([1], 2, [2], activation="none")
    model = Denoising(coder, "gaussian", sigma)
    fit(model, samples[..., None], 500, lr=2e-2, batch=512)
    at = torch.cartesian_prod(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5))
    field = vector_field(model.denoise, at[..., None]).squeeze(-1) / sigma**2
    best = -at @ torch.linalg.inv(covariance + sigma**2 * torch.eye(2))
    score = -at @ torch.linalg.inv(covariance)
    assert (field - best).norm() < 0.1 * best.norm()
    assert (field - score).norm() < 0.2 * score.norm()


def test_denoisers_arrows_point_to_the_curve() -> None:
    torch.manual_seed(0)
    angle = torch.rand(4000) * 2 * torch.pi
    model = Denoising(Dense([1], 2, [64, 64], activation="tanh"), "gaussian", 0.2)
    fit(model, torch.stack([angle.cos(), angle.sin()], 1)[..., None], 400)
    on = torch.linspace(0, 6.2, 40)
    circle = torch.stack([on.cos(), on.sin()], 1)
    for radius in (0.7, 1.3):
        arrows = vector_field(model.denoise, radius * circle[..., None]).squeeze(-1)
        assert F.cosine_similarity(arrows, (1 - radius) * circle).min() > 0.8
        moved = (radius * circle + arrows).norm(dim=1)
        assert (moved - 1).abs().mean() < 0.5 * abs(radius - 1)


def test_paths_stay_on_the_manifold(moving: tuple[Autoencoder, Tensor]) -> None:
    model, digit = moving
    ends = shifted(digit, torch.tensor([-2.5, 2.5]))
    along, blended = interpolate(model.encode, model.coder.mean, ends[0], ends[1], steps=7)
    torch.testing.assert_close(blended[[0, -1]], ends)
    torch.testing.assert_close(along[[0, -1]], model.reconstruct(ends).reconstruction.detach())
    torch.testing.assert_close(blended[3], ends.mean(0))
    manifold = shifted(digit, torch.linspace(-3, 3, 601)).flatten(1)
    near, far = (torch.cdist(s.flatten(1), manifold).amin(1)[1:-1].mean() for s in (along, blended))
    assert near < 0.5 * far
    with pytest.raises(ValueError, match="2 steps"):
        interpolate(model.encode, model.coder.mean, ends[0], ends[1], steps=1)


def test_a_traversal_changes_one_number_of_the_code() -> None:
    decode, code = torch.nn.Linear(3, 7, bias=False), torch.tensor([1.0, 2.0, 3.0])
    drawn = traverse(decode, code, 1, torch.tensor([-4.0, 2.0]))
    with torch.no_grad():
        columns = decode.weight.T
        expected = torch.stack([columns[0] + n * columns[1] + 3 * columns[2] for n in (-4, 2)])
    torch.testing.assert_close(drawn, expected)
    assert code.tolist() == [1, 2, 3]
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"dimension {wrong} must be 0 to 2"):
            traverse(decode, code, wrong, torch.zeros(1))


def test_maps_keep_what_they_say(tmp_path: Path) -> None:
    at = torch.linspace(-3, 3, 120)
    x = shifted(digit_images()[1][0], at).flatten(1)
    maps = {method: flat_map(x, method) for method in ("pca", "mds", "isomap")}
    expected = torch.from_numpy(PCA(2).fit_transform(x.double().numpy())).float()
    torch.testing.assert_close(maps["pca"].abs(), expected.abs(), atol=1e-4, rtol=1e-3)
    # A curve in many dimensions: only isomap unrolls it, so that its first axis is the shift.
    order = torch.corrcoef(torch.stack([maps["isomap"][:, 0], at]))[0, 1].abs()
    assert order > 0.99 > torch.corrcoef(torch.stack([maps["pca"][:, 1], at]))[0, 1].abs()
    drawn, truth = (torch.pdist(points) for points in (maps["mds"], x))
    assert torch.corrcoef(torch.stack([drawn, truth]))[0, 1] > 0.9
    draw_maps(tmp_path / "maps.png", maps, torch.arange(120) // 12)
    assert (tmp_path / "maps.png").stat().st_size > 5000


@pytest.mark.slow
def test_example_draws_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 7
