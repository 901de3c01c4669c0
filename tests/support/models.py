"""Small masked autoencoders, pictures and noise for them."""

from typing import Any

import torch
from torch import Tensor

from maepretrain.models.mae.model import MaskedAutoencoder

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "encoder_width": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
# For small gray pictures, as digits are.
GRAY_SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "channels": 1,
    "encoder_width": 32,
    "encoder_depth": 3,
    "encoder_heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def tiny(weights: int = 0, **changes: Any) -> MaskedAutoencoder:
    """A small model whose weights are all moved from their initial values, which hide mistakes.

    Args:
        weights: seed of the weights.
        changes: other arguments of the model; its `seed` is that of the masks.
    """
    return _moved(weights, SIZES | changes)


def tiny_gray(weights: int = 0, **changes: Any) -> MaskedAutoencoder:
    """The same for pictures of 16 x 16 in one channel, in evaluation mode."""
    return _moved(weights, GRAY_SIZES | changes).eval()


def _moved(weights: int, arguments: dict[str, Any]) -> MaskedAutoencoder:
    torch.manual_seed(weights)
    model = MaskedAutoencoder(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pictures(b: int = 3, c: int = 3, h: int = 32, w: int = 32) -> Tensor:
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(1))


def some_noise(b: int, n: int) -> Tensor:
    return torch.rand(b, n, generator=torch.Generator().manual_seed(2))


def visible(model: MaskedAutoencoder, noise: Tensor) -> Tensor:
    """1 for patches that stay visible, (b, n), read from the picture that is drawn of ones."""
    p, (rows, columns) = model.patch_size, model.grid
    ones = torch.ones(len(noise), model.channels, rows * p, columns * p)
    return model.reconstruct(ones, noise).masked[:, 0, ::p, ::p].flatten(1)
