"""A model for jobs on a real SLURM: each process writes down what it trains on, start by start."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maepretrain.randomness import uniform
from support.recorder import append, numbers

FOLDER = "WRITTEN_FOLDER"


class Seen(NamedTuple):
    """A sample that one start of a run trained on: its place in the run, and its number, read from
    its pixels."""

    position: int
    image: int


class Written(nn.Module):
    """Two linear layers; slow, so that a signal finds them at work.

    Args:
        pace: seconds that a training step takes; a pass of validation takes a tenth.
        fails_at: a process that comes to this position raises RuntimeError.
    """

    shardable = True

    def __init__(
        self,
        image_size: int = 8,
        channels: int = 3,
        seed: int = 0,
        pace: float = 0.0,
        fails_at: int = -1,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(channels * image_size**2, 8)
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.pace, self.fails_at = pace, fails_at

    def encode(self, images: Tensor) -> Tensor:
        """What probes look at."""
        return self.first(images.flatten(1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: how far the output is from four numbers that belong to the image's position."""
        time.sleep(self.pace if self.training else self.pace / 10)
        positions = batch["position"].tolist()
        if self.training:
            self._write(positions, numbers(batch["input"]))
            if self.fails_at in positions:
                raise RuntimeError(f"position {self.fails_at} is where this model fails")
        target = uniform(1, "target", batch["position"], 4)
        outputs = self.last(self.encode(batch["input"]).tanh())
        return {"loss": (outputs - target).square().mean()}

    def _write(self, positions: list[int], images: list[int]) -> None:
        if FOLDER not in os.environ:
            return
        job = os.environ.get("SLURM_JOB_ID", "0")
        start, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_PROCID", "")
        lines = [f"{p},{image}\n" for p, image in zip(positions, images, strict=True)]
        append(Path(os.environ[FOLDER]) / f"{job}-{start}-{rank}.csv", "".join(lines))


def read_starts(folder: Path, job: str) -> list[list[Seen]]:
    """What each start of a job trained on, over all its processes, by position."""
    starts: dict[int, list[Seen]] = {}
    for path in folder.glob(f"{job}-*-*.csv"):
        rows = [Seen(*map(int, line.split(","))) for line in path.read_text().splitlines()]
        starts.setdefault(int(path.stem.split("-")[1]), []).extend(rows)
    return [sorted(starts[n]) for n in sorted(starts)]
