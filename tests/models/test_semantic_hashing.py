"""Semantic hashing: retrieval against loops, and bits that retrieve nearly as well as numbers."""

from typing import Any

import pytest
import torch
from small import digit_images, fit
from support.halves import assert_halves_average_to_the_whole
from torch import Tensor

from maepretrain.models.autoencoders.coders import Dense
from maepretrain.models.autoencoders.semantic_hashing import (
    SemanticHashing,
    hamming,
    nearest_codes,
    precision_at,
)
from maepretrain.workflows.quickstart import digits


def make(bits: int = 16, **more: Any) -> SemanticHashing:
    torch.manual_seed(0)
    coder = Dense(8, 1, [128, bits], code_activation="none", likelihood="bernoulli")
    return SemanticHashing(coder, **more)


def random_bits(n: int, d: int) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(n)) < 0.5


def test_hamming_equals_loops() -> None:
    a, b = random_bits(5, 9), random_bits(7, 9)
    expected = [
        [sum(x != y for x, y in zip(p, q, strict=True)) for q in b.tolist()] for p in a.tolist()
    ]
    assert hamming(a, b).tolist() == expected


def test_nearest_codes_equal_brute_force_with_ties() -> None:
    query, bank = random_bits(6, 4), random_bits(50, 4)  # 16 codes for 50 samples: many ties
    distances, numbers = nearest_codes(query, bank, 8, chunk=4)
    for q, near, which in zip(query, distances.tolist(), numbers.tolist(), strict=True):
        ranked = sorted((int((q != b).sum()), i) for i, b in enumerate(bank))[:8]
        assert list(zip(near, which, strict=True)) == ranked


def test_precision_equals_counting() -> None:
    neighbours = torch.tensor([[0, 1], [2, 3], [3, 0]])
    labels = torch.tensor([5, 5, 6, 5])
    truth = torch.tensor([5, 6, 6])
    assert precision_at(neighbours, truth, labels) == pytest.approx((2 + 1 + 0) / 6)


def test_bits_retrieve_nearly_as_well_as_numbers() -> None:
    """Precision at 10 of held-out digits: chance is .1. Without noise, rounding to bits loses
    more."""
    images, test = digit_images()
    labels, truth = (torch.as_tensor(part.labels).long() for part in digits())
    hashing, plain = make(), make(noise=0.0)
    scores = []
    for model in (hashing, plain):
        fit(model, images, 400, 2e-3)
        model.eval()
        with torch.no_grad():
            bits = nearest_codes(model.codes(test), model.codes(images), 10)[1]
            far = torch.cdist(model.encode(test), model.encode(images))
            numbers = far.topk(10, largest=False).indices
        scores.append([precision_at(found, truth, labels) for found in (bits, numbers)])
    (bits, numbers), (rounded, rounded_from) = scores
    assert bits > 0.65
    assert bits > 0.9 * numbers
    assert bits / numbers > rounded / rounded_from
    with torch.no_grad():
        undecided, left = (model({"input": test})["undecided"] for model in (hashing, plain))
        # What rounding costs the reconstruction.
        costs = [
            float(model({"input": test})["loss"] - model.coder.error(model.encode(test), test))
            for model in (hashing, plain)
        ]
    assert undecided < 0.2 < left
    assert abs(costs[0]) < 0.5 * costs[1]


def test_noise_enters_before_the_sigmoids() -> None:
    model, position = make(bits=8), torch.arange(4000)
    logits = torch.full((4000, 8), 0.5)
    noise = model.noisy(logits, position).double().logit() - 0.5
    inside = noise[noise.abs() < 12]  # beyond, float32 knows only 1
    assert abs(float(inside.mean())) < 0.1 and abs(float(inside.std()) - 4) < 0.15
    again = model.noisy(logits[7:9], position[7:9])
    assert torch.equal(again, model.noisy(logits, position)[7:9])
    assert not torch.equal(again, make(bits=8, seed=1).noisy(logits[7:9], position[7:9]))


def test_evaluation_decodes_bits() -> None:
    model, x = make().eval(), digit_images()[0][:6]
    codes = model.codes(x)
    assert codes.dtype == torch.bool
    assert torch.equal(codes, model.encode(x) > 0.5)
    shown = model.reconstruct(x)
    assert torch.equal(shown.from_bits, model.coder.mean(codes.float()))
    expected = torch.nn.functional.binary_cross_entropy(shown.from_bits, x)
    torch.testing.assert_close(model({"input": x})["loss"], expected)


def test_halves_average_to_the_whole() -> None:
    batch = {"input": digit_images()[0][:8], "position": torch.arange(8)}
    assert_halves_average_to_the_whole(make(), batch)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="not after Sigmoid"):
        SemanticHashing(Dense(8, 1, [4], code_activation="sigmoid"))
    with pytest.raises(ValueError, match=r"noise -1\.0"):
        make(noise=-1.0)
    with pytest.raises(ValueError, match="k 8 needs"):
        nearest_codes(random_bits(2, 4), random_bits(7, 4), 8)
