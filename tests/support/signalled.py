"""A model whose process gets a signal at a chosen moment."""

import os
import signal
import time

import torch
from torch import Tensor, nn

from maepretrain.randomness import uniform


class Signalled(nn.Module):
    """A linear layer whose process is sent a signal in the middle of its work.

    Args:
        signal: its name.
        at: train:N, validate:N (its N-th forward pass there, counted from 1), or make.
        rank: of the process; others get none.
        pace: seconds that a forward pass takes.
    """

    def __init__(
        self,
        image_size: int = 8,
        channels: int = 3,
        signal: str = "",
        at: str = "",
        rank: int = 0,
        pace: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * image_size**2, 4)
        self.signal, self.at, self.rank, self.pace = signal, at, rank, pace
        self.passes = {True: 0, False: 0}
        self._send("make")

    def _send(self, now: str) -> None:
        if now == self.at and int(os.environ.get("RANK", "0")) == self.rank:
            signal.raise_signal(signal.Signals[self.signal])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training or not torch.is_grad_enabled():  # counting FLOPs is neither
            self.passes[self.training] += 1
            time.sleep(self.pace)
            self._send(f"{'train' if self.training else 'validate'}:{self.passes[self.training]}")
        target = uniform(1, "target", batch["position"], 4)
        return {"loss": (self.linear(batch["input"].flatten(1)) - target).square().mean()}
