"""The lines that a run prints before its first step, and the cost of a sample."""

from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch

from maepretrain.data.module import ShardData
from maepretrain.models.flops import flops, peak_here
from maepretrain.training.module import TrainingModule


class Cost(NamedTuple):
    """FLOPs of a training sample by its shape, and the peak of one device.

    Args:
        flops: of a sample, by shape (c, h, w).
        peak: in TFLOP/s.
        source: where the peak comes from.
    """

    flops: dict[tuple[int, ...], float]
    peak: float
    source: str


def measure_cost(data: ShardData, trainer: L.Trainer, module: TrainingModule) -> Cost:
    """Count the FLOPs of a sample at all sizes that the run has, and look up the device's peak."""
    assert data.sampler is not None
    dtype = torch.bfloat16 if str(trainer.precision).startswith(("bf16", "16")) else None
    peak, source = peak_here(trainer.strategy.root_device, dtype)
    model = module.training_step_model()
    n = data.sampler.micro_batch
    costs: dict[tuple[int, ...], float] = {}
    for shape in {data.shape_at(0), data.shape}:
        batch = {
            # Every likelihood takes zeros; only their shape needs memory.
            "input": torch.zeros(1, *shape).expand(n, *shape),
            "position": torch.arange(n),
            "label": torch.zeros(n, dtype=torch.int64),
        }
        costs[shape] = flops(model, batch).training
    return Cost(costs, peak, source)


def share_of_peak(cost: Cost, data: ShardData, world_size: int) -> Callable[[int], float]:
    """A function from a step to the share of all devices' peak that one sample a second takes."""

    def share(step: int) -> float:
        return cost.flops[data.shape_at(step)] / (cost.peak * 1e12 * world_size)

    return share


def announce_run(data: ShardData, trainer: L.Trainer, module: TrainingModule, cost: Cost) -> None:
    """Print the values that the run uses, and keep them for its folder."""
    assert data.sampler is not None
    optim = module.optim
    accumulation = trainer.accumulate_grad_batches
    lines = {
        "data": data.describe(),
        "held out": data.describe_held_out(trainer.world_size),
        "batch": f"{data.global_batch} = {data.sampler.micro_batch} x {trainer.world_size} "
        f"processes x {accumulation} accumulated",
        "length": f"{module.steps:,} steps, {module.steps / module.steps_per_epoch:.4g} epochs of "
        f"{module.steps_per_epoch}",
        "lr": f"{optim.lr(data.global_batch):.4g} = base_lr {optim.base_lr:g} x "
        f"{data.global_batch} / 256, warm-up {optim.warmup_epochs:g} epochs, "
        f"cosine to {optim.min_lr:g}",
        "precision": f"{trainer.precision}",
        "FLOPs": _cost_in_words(cost, data),
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device}, "
        f"{type(trainer.strategy).__name__}",
        "run folder": str(trainer.default_root_dir),
    }
    module.announce(lines | module.summary())


def _cost_in_words(cost: Cost, data: ShardData) -> str:
    first = ""
    if len(cost.flops) > 1:
        first = f" ({cost.flops[data.shape_at(0)] / 1e9:.4g} G at first)"
    full = f"{cost.flops[data.shape] / 1e9:.4g} G a sample"
    return f"{full}{first}; peak {cost.peak:.4g} T/s, {cost.source}"
