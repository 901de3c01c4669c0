"""Augmentation of fine-tuning: a pure function of position or seed, with targets by hand."""

import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor

from maepretrain.data.finetune_augmentation import Augmentation, RandAugmented
from maepretrain.data.transforms import UNIFORMS, Augment
from maepretrain.randomness import key, uniform

POLICY = "rand-m9-mstd0.5-inc1"
MEANS = {1: (0.3,), 3: (0.5, 0.4, 0.3)}


def picture(channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (channels, 20, 24), generator=generator, dtype=torch.uint8)


def numbers(position: int) -> Tensor:
    return uniform(0, "crop", torch.tensor([position]), UNIFORMS)[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_a_pure_function_of_the_position(channels: int) -> None:
    change = RandAugmented(16, 18, policy=POLICY, mean=MEANS[channels])
    image = picture(channels)
    first = [change(image, numbers(p)) for p in range(60)]
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    again = pickle.loads(pickle.dumps(change))  # as it goes to a loader process
    for p in reversed(range(60)):
        assert torch.equal(again(image, numbers(p)), first[p])
    crops = [Augment(16, 18)(image, numbers(p)) for p in range(60)]
    changed = [not torch.equal(a, b) for a, b in zip(first, crops, strict=True)]
    assert 20 < sum(changed) < 60  # each of two operations is applied to every second image
    assert all(x.dtype == torch.uint8 and x.shape == (channels, 16, 18) for x in first)


def test_full_magnitude_works_with_every_operation() -> None:
    change = RandAugmented(16, 16, policy="rand-m10-n10-p1.0-inc1", mean=MEANS[3])
    for position in range(10):
        assert change(picture(), numbers(position)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugmented(8, 8, policy="auto", mean=MEANS[3]), "RandAugment policy 'auto'"),
        (lambda: RandAugmented(8, 8, mean=(0.0, 0.0)), "1 or 3 channels, not 2"),
        (lambda: Augmentation(erasing=1.5), "erasing 1.5 must be a probability"),
        (lambda: RandAugmented(8, 8, mean=MEANS[1])(torch.rand(1, 9, 9), numbers(0)), "uint8"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def mixed(augmentation: Augmentation, seed: int, smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    return augmentation.change(images, torch.arange(6) % 4, 4, smoothing, seed)


@pytest.mark.parametrize("which", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixing_by_hand(which: dict[str, Any]) -> None:
    """Image i holds the number i; its partner is image 5 - i. The share of the partner, read from
    the pixels, is its share of the target."""
    shares = []
    for seed in range(20):
        images, targets = mixed(Augmentation(**which), seed)
        for i in range(6):
            share = float((images[i].mean() - i) / (5 - 2 * i))
            smooth = 0.9 * torch.eye(4) + 0.1 / 4
            expected = (1 - share) * smooth[i % 4] + share * smooth[(5 - i) % 4]
            assert torch.allclose(targets[i], expected, atol=1e-5)
        shares.append(float(images[0].mean() / 5))
        whole = (images[0] == images[0].round()).all()
        assert bool(whole) == ("cutmix" in which or shares[-1] in (0.0, 1.0))
    assert len(set(shares)) > 8
    assert 0.25 < sum(shares) / len(shares) < 0.75


def test_mixing_and_erasing_are_a_pure_function_of_the_seed() -> None:
    augmentation = Augmentation(erasing=0.5, mixup=0.8, cutmix=1.0)
    first = [mixed(augmentation, seed) for seed in range(5)]
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    for seed in reversed(range(5)):
        images, targets = mixed(augmentation, seed)
        assert torch.equal(images, first[seed][0])
        assert torch.equal(targets, first[seed][1])
    assert not torch.equal(first[0][0], first[1][0])


def test_erasing_leaves_labels_and_the_rest_of_the_image() -> None:
    images, labels = mixed(Augmentation(erasing=1.0), 0)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    for i in range(6):
        kept = float((images[i] == i).float().mean())
        assert 0.4 < kept < 1  # a rectangle of 2 to 33 % becomes noise
    assert torch.equal(
        mixed(Augmentation(), 0)[0], torch.arange(6.0)[:, None, None, None].expand(-1, 3, 8, 8)
    )


def test_every_process_draws_its_own_mixture_of_the_same_distribution() -> None:
    """lambda ~ Beta(.8, .8) on each of two ranks (Zhang et al. 2018), and not the same there."""
    augment = Augmentation(mixup=0.8)
    drawn = torch.empty(2, 400)
    for rank, batch in itertools.product(range(2), range(400)):
        labels = torch.tensor([0, 1])
        seed = key(7, "mix", batch, rank)
        _, targets = augment.change(torch.zeros(2, 1, 2, 2), labels, 2, 0.0, seed)
        drawn[rank, batch] = targets[0, 0]
    for one in drawn:
        assert kstest(one.double().numpy(), beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.15
