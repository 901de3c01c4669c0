"""Small masked autoencoders, pictures and noise for them."""

from typing import Any

import torch
from torch import Tensor

from maepretrain.models.mae.model import MaskedAutoencoder


def tiny(**arguments: Any) -> MaskedAutoencoder:
    """A small model whose weights are all moved from their initial values, which hide mistakes."""
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "encoder_width": 24,
        "encoder_depth": 2,
        "encoder_heads": 2,
        "decoder_width": 16,
        "decoder_depth": 2,
        "decoder_heads": 2,
    }
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**sizes, **arguments})
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
