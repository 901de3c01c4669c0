"""Corruption: shares, moments, places and maps, each a function of seed and position alone."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.functional import affine as torchvision_affine

from maepretrain.models.autoencoders.corruption import Corruption, Kind, affine, choose
from maepretrain.randomness import normal

GENERATOR = torch.Generator().manual_seed(0)
# No two values are equal, and none is 0 or 1.
X = (torch.randperm(20 * 2 * 10 * 8, generator=GENERATOR) + 1.0).view(20, 2, 10, 8) / 4000
POSITION = torch.arange(1000, 1020)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_seed_and_position_alone(kind: Any) -> None:
    corrupt = Corruption(kind, 0.5, seed=3)
    whole = corrupt(X, POSITION)
    assert whole.shape == X.shape
    order = torch.randperm(20, generator=GENERATOR)
    assert torch.allclose(corrupt(X[order][:7], POSITION[order][:7]), whole[order][:7])
    assert not torch.allclose(whole, X, atol=0.01)
    assert not torch.allclose(corrupt(X, POSITION + 1), whole)
    assert not torch.allclose(Corruption(kind, 0.5, seed=4)(X, POSITION), whole)
    # Two samples that are equal are not corrupted alike.
    same = corrupt(X[:1].expand(20, -1, -1, -1), POSITION)
    assert not torch.allclose(same[0], same[1], atol=0.01)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_no_amount_changes_nothing(kind: Any) -> None:
    assert torch.allclose(Corruption(kind, 0.0)(X, POSITION), X, atol=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_masking_hides_a_share_of_each_sample(share: float) -> None:
    masked = Corruption("masking", share)(X, POSITION)
    kept = masked == X
    assert ((masked == 0) | kept).all()
    assert ((masked == 0).flatten(1).sum(1) == round(160 * share)).all()
    # All values are equally likely: means of 2,000 samples within 5 standard deviations.
    many = Corruption("masking", share)(torch.ones(2000, 1, 8, 8), torch.arange(2000))
    deviation = math.sqrt(share * (1 - share) / 2000)
    assert (1 - many.mean(0) - share).abs().max() <= 5 * deviation


def test_salt_and_pepper() -> None:
    noisy = Corruption("salt_and_pepper", 0.4, low=-2.0, high=3.0)(X, POSITION)
    salt, pepper = noisy == 3, noisy == -2
    assert ((salt | pepper) == (noisy != X)).all()
    assert ((salt | pepper).flatten(1).sum(1) == 64).all()
    assert abs(float(salt.float().mean()) - 0.2) < 0.03


def test_gaussian_noise_has_the_amount_as_its_deviation() -> None:
    x = torch.zeros(400, 1, 16, 16)
    noise = Corruption("gaussian", 0.5)(x, torch.arange(400))
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(0.5, rel=0.01)
    # Neighbouring samples and values are not correlated: 5 / sqrt(n).
    for a, b in ((noise[1:], noise[:-1]), (noise[..., 1:], noise[..., :-1])):
        assert abs(float((a * b).mean())) / 0.25 < 5 / math.sqrt(a.numel())


def test_normal_numbers_have_the_distribution_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    numbers = normal(0, "any", torch.arange(2**40, 2**40 + 5000), 8)
    assert numbers.dtype == torch.float32 and numbers.isfinite().all()
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(numbers.T.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(5000)


def test_shuffled_places_exchange_their_values() -> None:
    shuffled = Corruption("shuffle", 0.5)(X, POSITION)
    for before, after in zip(X.flatten(2), shuffled.flatten(2), strict=True):
        moved = (before != after).any(0)
        # Of 40 chosen places about one stays where it is by chance.
        assert 30 <= moved.sum() <= 40
        # Both channels move together, and nothing is lost or doubled.
        pairs = {tuple(p) for p in before.T.tolist()}
        assert {tuple(p) for p in after.T.tolist()} == pairs
    everything = Corruption("shuffle", 1.0)(X, POSITION)
    assert (everything != X).float().mean() > 0.95


def test_an_affine_map_is_torchvisions() -> None:
    image = torch.nn.functional.interpolate(X[:1], (30, 24), mode="bilinear")
    mine = affine(
        image, torch.tensor([math.radians(20)]), torch.tensor([1.2]), torch.tensor([[0.25, -0.2]])
    )
    truth = torchvision_affine(
        image, -20.0, [3, -3], 1.2, [0.0, 0.0], InterpolationMode.BILINEAR
    )  # its angles are clockwise; a quarter of half of 24 to the right, a fifth of half of 30 up
    inner = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(mine[inner], truth[inner], atol=1e-4)


def test_a_quarter_turn_and_a_shift() -> None:
    square = X[:, :, :8]
    zero, one = torch.zeros(20), torch.ones(20)
    turned = affine(square, zero + math.pi / 2, one, torch.zeros(20, 2))
    assert torch.allclose(turned, square.rot90(1, (2, 3)), atol=1e-5)
    shifted = affine(square, zero, one, torch.tensor([0.25, 0.0]).expand(20, 2))
    assert torch.allclose(shifted[..., 1:], square[..., :-1], atol=1e-5)


def test_geometric_keeps_within_its_range() -> None:
    """A point in the centre goes no further than the shift."""
    x = torch.zeros(200, 1, 33, 33)
    x[:, :, 16, 16] = 1
    moved = Corruption("geometric", 0.25)(x, torch.arange(200))
    place = moved.flatten(1).argmax(1)
    rows, columns = place // 33 - 16, place % 33 - 16
    assert rows.abs().max() <= 5 and columns.abs().max() <= 5
    assert rows.unique().numel() > 6 and columns.unique().numel() > 6


def test_colour_is_a_gain_and_an_offset_of_each_channel() -> None:
    coloured = Corruption("colour", 0.3)(X, POSITION)
    slopes = []
    for before, after in zip(X.flatten(0, 1), coloured.flatten(0, 1), strict=True):
        slope, offset = np.polyfit(before.flatten(), after.flatten(), 1)
        assert np.allclose(slope * before + offset, after, atol=1e-5)
        assert abs(slope - 1) < 0.3 and abs(offset) < 0.3
        slopes.append(slope)
    assert len({round(s, 4) for s in slopes}) == 40


def test_chosen_are_the_smallest() -> None:
    u = torch.tensor([[0.5, 0.1, 0.9, 0.2], [0.3, 0.3, 0.3, 0.3]])
    chosen = choose(u, 0.5)
    assert chosen[0].tolist() == [False, True, False, True]
    assert chosen[1].sum() == 2


@pytest.mark.parametrize(
    ("kind", "amount", "said"),
    [
        ("masking", -0.1, "amount -0.1 of masking must be in 0..1"),
        ("shuffle", 1.1, "amount 1.1 of shuffle must be in 0..1"),
        ("gaussian", -1.0, "must be not negative"),
    ],
)
def test_amounts_that_mean_nothing(kind: Any, amount: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Corruption(kind, amount)


def test_signals_have_no_geometry() -> None:
    with pytest.raises(ValueError, match="of images"):
        Corruption("geometric", 0.1)(torch.zeros(2, 1, 9), torch.arange(2))
    assert Corruption("shuffle", 0.5)(torch.rand(2, 3, 9), torch.arange(2)).shape == (2, 3, 9)
