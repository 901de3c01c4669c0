"""Normalisation of a batch on its device."""

from typing import cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Normalise(nn.Module):
    """(x - mean) / std in float32, on the device, where x is a uint8 pixel / 255 or a float as it
    is. Tokens (int64) stay as they are."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Shaped[Tensor, "b c *size"]) -> Shaped[Tensor, "b c *size"]:
        """Images (b, c, h, w) or signals (b, c, t), normalised."""
        if x.dtype == torch.int64:
            return x
        values = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        mean, std = self._channelwise(x.ndim)
        return (values - mean) / std

    def undo(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """Pixels in 0..1 again; signals in their own range."""
        mean, std = self._channelwise(x.ndim)
        values = x * std + mean
        return values.clamp(0, 1) if x.ndim == 4 else values

    def _channelwise(self, dimensions: int) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (dimensions - 2))
        return cast(Tensor, self.mean).view(shape), cast(Tensor, self.std).view(shape)
