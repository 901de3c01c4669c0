"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) in an encoder's blocks."""

from typing import Any, cast

from timm.layers.drop import DropPath, calculate_drop_path_rates
from torch import nn


def set_drop_path(model: nn.Module, layers: list[list[nn.Parameter]], rate: float) -> list[float]:
    """Set stochastic depth in the blocks of the encoder, rising linearly from 0 to `rate`.

    Args:
        model: the encoder.
        layers: its parameters from input to output: embedding, blocks, norm.
        rate: of the last block.

    Returns:
        The rate of each block.

    Raises:
        ValueError: a rate outside [0, 1), or blocks that cannot be found.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path {rate} must be in [0, 1)")
    in_blocks = {id(p) for layer in layers[1:-1] for p in layer}
    # A decoder has blocks too.
    blocks = [
        block
        for block in model.modules()
        if hasattr(block, "drop_path1") and id(next(block.parameters())) in in_blocks
    ]
    if not blocks or len(blocks) != len(layers) - 2:
        raise ValueError(
            f"drop_path {rate}: {type(model).__name__} has {len(blocks)} trained blocks with "
            f"residual paths in {len(layers)} layers"
        )
    rates = cast(list[float], calculate_drop_path_rates(rate, len(blocks)))
    for block, block_rate in zip(blocks, rates, strict=True):
        cast(Any, block).drop_path1 = DropPath(block_rate)
        cast(Any, block).drop_path2 = DropPath(block_rate)
    return rates
