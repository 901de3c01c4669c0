"""Shards of numbered pictures, and the options of a run of `Recorder` on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from support.recorder import picture

SAMPLES, BATCH, STEPS_PER_EPOCH, LEFT_OUT = 150, 24, 6, 6
# SGD: Adam turns a gradient that is zero but for rounding into a full step.
OPTIONS = [
    *(
        "--model",
        "support.recorder.Recorder",
        "--seed",
        "3",
        "--threads",
        "1",
        "--data.order.block",
        "7",
    ),
    *("--data.global_batch", str(BATCH), "--data.image_size", "8"),
    *("--data.mean", "[0,0,0]", "--data.std", "[1,1,1]"),
    *("--optim.optimizer", "sgd", "--optim.base_lr", "1", "--optim.warmup_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"),
]


def write_pictures(folder: Path, split: str, images: Sequence[int], samples_per_shard: int) -> None:
    """Shards of the images with these numbers; their keys count from 0."""
    arrays = Arrays(np.stack([picture(n) for n in images]), np.array(images) % 3)
    write_shards(arrays, folder, split, samples_per_shard)
