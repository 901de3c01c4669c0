"""Random numbers that are a pure function of where they are used.

Order, crops and masks must not depend on rank, worker, device or time, so none of them draws from a
stateful generator: each is a hash of (seed, stream, position). The hash is SplitMix64 (Steele, Lea
and Flood 2014), written in int64 tensor operations that wrap, so that CPU and GPU agree bit for
bit. Nothing here may change between releases: a resume relies on it.
"""

import math
import zlib
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def _signed(constant: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit `constant`."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GAMMA, _MIX1, _MIX2 = (
    _signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 `>>` copies the sign bit, which is masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """One SplitMix64 step: 64 well-mixed bits for each input."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


@lru_cache(256)
def key(seed: int, stream: str, *place: int) -> int:
    """A 64-bit key for one stream of numbers ("mask", "crop", ...) at one place (epoch, ...)."""
    hashed = torch.tensor(_signed(seed % (1 << 64)), device="cpu")
    for word in (zlib.crc32(stream.encode()), *place):
        hashed = mix(hashed ^ word)
    return int(hashed)


def uniform(seed: int, stream: str, position: Int64[Tensor, "b"], n: int) -> Float[Tensor, "b n"]:
    """`n` float32 numbers in [0, 1) for each sample, on the device of `position`.

    From (seed, stream, position) alone.
    """
    sample = mix(position ^ key(seed, stream))[:, None]
    bits = mix(sample + torch.arange(n, device=position.device))
    return _shift_right(bits, 40).float() * 2.0**-24


def normal(seed: int, stream: str, position: Int64[Tensor, "b"], n: int) -> Float[Tensor, "b n"]:
    """`n` float32 numbers of the standard normal distribution for each sample, on the device of
    `position`.

    From (seed, stream, position) alone: sqrt(-2 log u) cos(2 pi v) of two uniform numbers (Box and
    Muller 1958), none beyond 5.8. The bits behind are equal on every device, the logarithm and the
    cosine are as the device rounds them.
    """
    u, v = uniform(seed, stream, position, 2 * n).split(n, 1)
    return (-2 * torch.log1p(-u)).sqrt() * (2 * math.pi * v).cos()


def permutation(seed: int, stream: str, n: int, *place: int) -> Int64[Tensor, "n"]:
    """A permutation of 0..n-1 from (seed, stream, place) alone.

    The order of the hashes of 0..n-1, of which no two are equal: the hash is one to one.
    """
    return torch.argsort(mix(torch.arange(n, device="cpu") ^ key(seed, stream, *place)))
