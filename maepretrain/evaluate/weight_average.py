"""Exponential moving average of weights, on whole and on divided tensors."""

from typing import cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from maepretrain.strategies.sharded import local_tensors


def make_average(network: nn.Module, decay: float) -> ModelEmaV3:
    """A copy of the network that `update_average` moves; it takes no gradient.

    Raises:
        ValueError: a decay outside (0, 1).
    """
    if not 0 < decay < 1:
        raise ValueError(f"ema {decay} must be a decay between 0 and 1, such as 0.9999")
    average = ModelEmaV3(network, decay=decay)
    return cast(ModelEmaV3, average.requires_grad_(False))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * network; integers are copied.

    Of a divided tensor each process moves the part that it holds.

    Args:
        average: of the same structure as `network`.
        network: the trained weights.
        decay: 0..1.
    """
    for mean, current in zip(_tensors(average), _tensors(network), strict=True):
        for ours, theirs in zip(local_tensors(mean), local_tensors(current), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - decay)
            else:
                ours.copy_(theirs)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]
