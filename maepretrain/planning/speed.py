"""Speed and length of a run: steps, images a second, hours, CPU cores that decode."""

from typing import Any

import torch

from maepretrain.data.module import shard_data
from maepretrain.data.order import EpochOrder
from maepretrain.models.flops import Flops

# CPU seconds of one image in benchmarks/RESULTS.md (JPEG, 500 x 375 to 224): 1 / 699 with one crop,
# 1 / 1169 a crop with two.
DECODE_SECONDS = 1150e-6
CROP_SECONDS = 281e-6


def autocast_type(precision: Any) -> torch.dtype | None:
    """The type that a precision of Lightning's casts to, None for fp32; of 16 bits both are as
    wide.

    Raises:
        ValueError: one that the project does not train with.
    """
    if precision in (None, 32, "32", "32-true"):
        return None
    if precision in (16, "16", "16-mixed", "bf16", "bf16-mixed"):
        return torch.bfloat16
    raise ValueError(f"precision {precision}: plan knows 32-true, bf16-mixed and 16-mixed")


def epoch(data: Any, images: int | None) -> tuple[int, int, float | None]:
    """Steps of an epoch, samples to train on, and bytes of a sample where the index knows.

    Args:
        data: the options under `data`.
        images: how many there are; None asks the index of `data.train`.

    Raises:
        ValueError: neither is given; shards that cannot be read; fewer samples than a batch.
    """
    if images is not None:
        if data.global_batch % data.crop.per_image:
            raise ValueError(
                f"global batch {data.global_batch} is no multiple of {data.crop.per_image} "
                "crop.per_image"
            )
        order = EpochOrder(
            torch.tensor([images]),
            data.global_batch // data.crop.per_image,
            seed=data.order.seed,
            streams=data.order.streams,
            block=data.order.block,
            tail=data.order.tail,
        )
        return order.steps_per_epoch, images, None
    if not data.train:
        raise ValueError("how many images are there? --images N, or their shards as --data.train")
    opened = shard_data(data.as_dict() | {"val": None})
    steps = opened.order.steps_per_epoch
    if opened.unindexed is not None:
        return steps, steps * opened.global_batch, None
    shards = opened.index.shards
    size = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    return steps, len(opened.index), size


def speed(
    cost: Flops,
    data: Any,
    *,
    steps: int,
    world: int,
    peak: float,
    mfu: float,
    sample_bytes: float | None,
    decode_img_per_s: float | None,
) -> dict[str, float | None]:
    """Images a second, hours, and what loading them asks.

    Args:
        cost: of a sample.
        data: the options under `data`.
        steps: of the run.
        world: devices.
        peak: TFLOP/s of a device.
        mfu: share of the peak that training reaches.
        sample_bytes: of a sample in the shards, if known.
        decode_img_per_s: samples that one CPU core decodes and crops; None takes the measured one.
    """
    rate = world * peak * 1e12 * mfu / (cost.training + cost.recomputed)
    core = decode_img_per_s or 1 / (DECODE_SECONDS / data.crop.per_image + CROP_SECONDS)
    return {
        "img_per_s": rate,
        "hours": steps * data.global_batch / rate / 3600,
        "per_core": core,
        "cores": rate / core,
        "megabytes_per_s": sample_bytes and rate / data.crop.per_image * sample_bytes / 1e6,
    }
