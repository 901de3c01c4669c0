"""A small model with what a micro-batch that is left out could disturb: random numbers and a
running mean."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.randomness import uniform
from support.recorder import RECORDS, append


class Noisy(nn.Module):
    """A linear layer behind dropout, on signals less their running mean; notes the checksum of its
    weights at each training pass in $RECORDER_RECORDS/RANK.weights.

    Args:
        image_size: [length] of the signals.
        channels: 1.
        dropout: share of the values.
        momentum: share of a batch in the running mean.
        spread: of the initial weights.
        width: outputs.
    """

    shardable = True
    running: Tensor

    def __init__(
        self,
        image_size: Sequence[int],
        channels: int = 1,
        dropout: float = 0.3,
        momentum: float = 0.1,
        spread: float = 1.0,
        width: int = 4,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * image_size[0], width)
        self.linear.weight.data *= spread
        self.dropout, self.momentum = dropout, momentum
        self.register_buffer("running", torch.zeros(channels * image_size[0]))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: how far the layer is from numbers that belong to the position."""
        x = batch["input"].flatten(1)
        difference = x - self.running
        if self.training:
            self.running.lerp_(x.mean(0), self.momentum)
            self._note()
        target = uniform(1, "target", batch["position"], self.linear.out_features)
        found = self.linear(F.dropout(difference, self.dropout, self.training))
        return {"loss": (found - target).square().sum(1).mean() / 4, "largest": found.abs().max()}

    def _note(self) -> None:
        if RECORDS in os.environ:
            weights = torch.cat([p.detach().flatten() for p in self.parameters()])
            path = Path(os.environ[RECORDS]) / f"{os.environ.get('LOCAL_RANK', '0')}.weights"
            append(path, f"{zlib.crc32(weights.numpy().tobytes())}\n")
