"""Corruptions of the input of denoising autoencoders (Vincent et al. 2008 and 2010).

Noise of the values: masking, Gaussian, salt-and-pepper (Vincent et al. 2010, section 3.4). For
images also: pixels that exchange places, affine maps, and changes of colour.

Every number drawn is a pure function of (seed, position of the sample in the run).

Axes: b samples, c channels, *size sides, s places (the product of the sides), v = c x s.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from maepretrain.randomness import normal, uniform

Kind = Literal["masking", "gaussian", "salt_and_pepper", "shuffle", "geometric", "colour"]


class Corruption:
    """A corruption of normalised inputs.

    Args:
        kind: "masking" sets a share of the values of each sample to 0; "gaussian" adds noise;
            "salt_and_pepper" sets a share of the values to `low` or `high`, at even odds; "shuffle"
            lets a share of the places exchange their values, all channels together; "geometric"
            turns, scales and shifts an image; "colour" gives every channel of a sample a gain and
            an offset.
        amount: masking, salt_and_pepper, shuffle: the share in 0..1, met exactly but for rounding.
            gaussian: the standard deviation. geometric, in 0..1: a turn within +-90 degrees x
            amount, a scale within 2 to the power of +-amount, a shift within +-half a side x
            amount. colour: gains within 1 +- amount, offsets within +-amount.
        low: pepper; in the normalised values of the config's mean and std.
        high: salt.
        seed: seed of the noise.

    Raises:
        ValueError: a negative amount, a share above 1.
    """

    def __init__(
        self, kind: Kind, amount: float, low: float = 0.0, high: float = 1.0, seed: int = 0
    ) -> None:
        if amount < 0 or (amount > 1 and kind not in ("gaussian", "colour")):
            limit = "not negative" if kind in ("gaussian", "colour") else "in 0..1"
            raise ValueError(f"amount {amount} of {kind} must be {limit}")
        self.kind = kind
        self.amount = amount
        self.low = low
        self.high = high
        self.seed = seed

    def __call__(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c *size"]:
        """The samples of these positions, corrupted.

        Raises:
            ValueError: geometric corruption of what is no image.
        """
        if self.kind == "shuffle":
            return self._shuffle(x, position)
        if self.kind == "geometric":
            return self._geometric(x, position)
        if self.kind == "colour":
            return self._colour(x, position)
        return self._noise(x.flatten(1), position).view_as(x)

    def _noise(self, x: Float[Tensor, "b v"], position: Int64[Tensor, "b"]) -> Float[Tensor, "b v"]:
        v = x.shape[1]
        if self.kind == "gaussian":
            noise = normal(self.seed, "corruption", position, v)
            return x + self.amount * noise.to(x.dtype)
        if self.kind == "masking":
            u = uniform(self.seed, "corruption", position, v)
            return x.masked_fill(choose(u, self.amount), 0.0)
        u = uniform(self.seed, "corruption", position, 2 * v)
        hit = choose(u[:, :v], self.amount)
        grains = torch.where(u[:, v:] < 0.5, self.low, self.high).to(x.dtype)
        return torch.where(hit, grains, x)

    def _shuffle(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c *size"]:
        places = x.flatten(2)
        s = places.shape[2]
        u = uniform(self.seed, "corruption", position, 2 * s)
        hit = choose(u[:, :s], self.amount)
        # Those chosen come first, once by number and once in random order; the others by number.
        number = torch.arange(s, device=x.device, dtype=u.dtype).expand_as(hit)
        to = torch.where(hit, number, s + number).argsort(1)
        source = torch.where(hit, u[:, s:], s + number).argsort(1)
        source = torch.empty_like(source).scatter(1, to, source)
        return places.gather(2, source[:, None].expand_as(places)).view_as(x)

    def _geometric(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c *size"]:
        if x.ndim != 4:
            raise ValueError(f"geometric corruption is of images, not of inputs {tuple(x.shape)}")
        u = self.amount * (2 * uniform(self.seed, "corruption", position, 4) - 1)
        return affine(x, 0.5 * math.pi * u[:, 0], 2 ** u[:, 1], u[:, 2:])

    def _colour(
        self, x: Float[Tensor, "b c *size"], position: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c *size"]:
        c = x.shape[1]
        u = self.amount * (2 * uniform(self.seed, "corruption", position, 2 * c) - 1)
        gain, offset = u.to(x.dtype).view(-1, 2 * c, *[1] * (x.ndim - 2)).split(c, 1)
        return x * (1 + gain) + offset


def choose(u: Float[Tensor, "b n"], share: float) -> Bool[Tensor, "b n"]:
    """A share of n places, equal in number for each sample: those of the smallest u."""
    n = u.shape[1]
    smallest = u.topk(round(share * n), dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(u, dtype=torch.bool).scatter(1, smallest, True)


def affine(
    x: Float[Tensor, "b c h w"],
    angle: Float[Tensor, "b"],
    scale: Float[Tensor, "b"],
    shift: Float[Tensor, "b 2"],
) -> Float[Tensor, "b c h w"]:
    """Images turned counter-clockwise about their centre by `angle` radians, enlarged by `scale`,
    then shifted right and down by `shift` half sides; bilinear, the edge goes on outside."""
    h, w = x.shape[2:]
    cos = angle.cos() / scale
    sin = angle.sin() / scale
    # affine_grid maps places of the result to places of the source, in half sides.
    to_source = torch.stack([cos, -sin * h / w, sin * w / h, cos], 1).view(-1, 2, 2)
    origin = -to_source @ shift[..., None]
    grid = F.affine_grid(torch.cat([to_source, origin], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)
