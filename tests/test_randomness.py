"""Hashed random numbers against plain-Python SplitMix64, and against what chance would give."""

import zlib
from collections import Counter

import pytest
import torch

from maepretrain.randomness import key, mix, permutation, uniform

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, figure 17, in unsigned integers of any size."""
    z = (state + GAMMA) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def plain_key(seed: int, stream: str, *place: int) -> int:
    hashed = seed & WORD
    for word in (zlib.crc32(stream.encode()), *place):
        hashed = splitmix64(hashed ^ word)
    return hashed


def test_mix_gives_the_published_sequence():
    # The first five numbers of SplitMix64 with seed 1234567, as listed by Rosetta Code.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + i * GAMMA) & WORD for i in range(5)]
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    assert [int(x) & WORD for x in mix(signed)] == published


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -5])
def test_key_equals_plain_python(seed: int):
    for place in [(), (0,), (3, 15, 2**40)]:
        assert key(seed, "block", *place) & WORD == plain_key(seed, "block", *place)


@pytest.mark.parametrize("seed", [0, 7, -1])
def test_uniform_equals_plain_python(seed: int):
    positions = [0, 1, 255, 10**9, 2**62 + 3]
    ours = uniform(seed, "crop", torch.tensor(positions), 41)
    start = plain_key(seed, "crop")
    for row, position in zip(ours.tolist(), positions, strict=True):
        sample = splitmix64(position ^ start)
        # The 24 highest bits: a float32 holds them exactly.
        assert row == [(splitmix64((sample + j) & WORD) >> 40) * 2.0**-24 for j in range(41)]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_equals_plain_python(n: int):
    start = plain_key(3, "block", 5, 2)
    signed = [h - (1 << 64) if h >> 63 else h for h in (splitmix64(i ^ start) for i in range(n))]
    assert permutation(3, "block", n, 5, 2).tolist() == sorted(range(n), key=signed.__getitem__)


def test_any_split_of_a_batch_gives_the_same_numbers():
    whole = uniform(0, "mask", torch.arange(1000), 49)
    for sizes in ([1000], [1, 999], [250] * 4, [333, 334, 333]):
        parts = [uniform(0, "mask", part, 49) for part in torch.arange(1000).split(sizes)]
        assert torch.equal(torch.cat(parts), whole)
    shuffled = torch.randperm(1000)
    assert torch.equal(uniform(0, "mask", shuffled, 49), whole[shuffled])


def test_numbers_asked_for_do_not_change_earlier_ones():
    assert torch.equal(
        uniform(0, "crop", torch.arange(9), 100)[:, :41], uniform(0, "crop", torch.arange(9), 41)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_bit_for_bit():
    positions = torch.arange(10**9, 10**9 + 5000)
    assert torch.equal(
        uniform(1, "mask", positions, 196), uniform(1, "mask", positions.cuda(), 196).cpu()
    )


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        order = permutation(0, "shards", 10, 12345)
    assert torch.equal(order, permutation(0, "shards", 10, 12345))


def chi_square(counts: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean, for equally likely cells."""
    expected = counts.double().mean()
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("first", [0, 2**33])
def test_numbers_are_uniform(first: int):
    u = uniform(0, "crop", torch.arange(first, first + 20_000), 8)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    for column in (*u.T, u.flatten()):
        assert abs(chi_square(torch.histc(column, 256, 0, 1))) < 5


def test_numbers_are_independent():
    """Pairs fill the unit square: neighbours in a row, in position, in stream and in seed."""
    positions = torch.arange(40_000)
    u = uniform(0, "crop", positions, 3)
    others = {
        "next number": u[:, 1],
        "next but one": u[:, 2],
        "next position": uniform(0, "crop", positions + 1, 1)[:, 0],
        "position + 2^32": uniform(0, "crop", positions + 2**32, 1)[:, 0],
        "stream": uniform(0, "mask", positions, 1)[:, 0],
        "seed": uniform(1, "crop", positions, 1)[:, 0],
    }
    for name, other in others.items():
        cell = (u[:, 0] * 16).long() * 16 + (other * 16).long()
        assert abs(chi_square(torch.bincount(cell, minlength=256))) < 5, name


def test_permutations_are_equally_likely():
    times = Counter(tuple(permutation(0, "block", 4, e).tolist()) for e in range(2400))
    assert len(times) == 24
    assert abs(chi_square(torch.tensor(list(times.values())))) < 4


def test_places_streams_and_seeds_give_other_permutations():
    orders = [
        permutation(seed, stream, 50, *place).tolist()
        for seed in (0, 1)
        for stream in ("block", "shards")
        for place in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1))
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
