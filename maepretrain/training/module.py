"""Training in a run folder, for pretraining and fine-tuning alike: schedule, steps, resume, what is
printed first.

A run is one Lightning epoch over a stream of micro-batches (see `data/module.py`), so the Trainer
counts steps and epochs are ours to convert.
"""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.data.normalise import Normalise
from maepretrain.ranks import say
from maepretrain.strategies.fsdp2 import FSDP2
from maepretrain.training.callbacks.last_checkpoint import (
    VALIDATION_IS_DUE,
)
from maepretrain.training.optimizer import Group, Optimization, check_groups, describe


class TrainingModule(L.LightningModule):
    """A LightningModule whose learning rate and random numbers are pure functions of the step.

    Shared by pretraining and fine-tuning: configuration wins over whatever a loaded checkpoint
    brings along.
    """

    def __init__(self, optim: Optimization, data: ShardData, steps: int, seed: int) -> None:
        super().__init__()
        self.optim, self.steps, self.seed = optim, steps, seed
        self.global_batch, self.steps_per_epoch = data.global_batch, data.order.steps_per_epoch
        self.normalise = Normalise(data.mean, data.std)
        # What is really applied, as it is printed.
        self.applied: dict[str, str] = {}
        self.fresh_groups: list[Group] = []
        # Of the optimizer, in its order: names of its parameters, and how many each group has.
        self.parameter_names: list[str] = []
        self.group_sizes: list[int] = []

    def sharding_units(self) -> list[nn.Module]:
        """What an engine divides, each part by itself."""
        return [cast(nn.Module, self.model)]

    def training_step_model(self) -> nn.Module:
        """What a training step computes: `training_step_model()(batch)["loss"]`."""
        raise NotImplementedError

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters in order, for layer-wise learning rates."""
        return []

    def summary(self) -> dict[str, str]:
        """What else a run prints before its first step."""
        return {}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Parameters without weight decay besides the vectors."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optim.check_strategy(type(self.trainer.strategy).__name__)
        layers = self.parameter_layers()
        inside = {id(p) for layer in layers for p in layer}
        rest = [p for p in self.parameters() if id(p) not in inside]
        groups = self.optim.groups(layers, rest, self.undecayed_parameters())
        check_groups(groups, self.parameters())
        self.fresh_groups = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        names = {id(p): name for name, p in self.named_parameters()}
        self.parameter_names = [names[id(p)] for g in groups for p in g["params"]]
        self.group_sizes = [len(g["params"]) for g in groups]
        self.announce({"optimizer": "\n".join(self._describe(groups))})
        # Lightning cannot clip under mixed precision when the optimizer is fused.
        amp = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self.optim.make(
            groups, self.global_batch, fused=not (amp and self.trainer.gradient_clip_val)
        )

    def announce(self, lines: dict[str, str]) -> None:
        """Print what is really applied, and keep it for the run folder."""
        self.applied |= lines
        indented = {name: text.replace("\n", "\n" + 14 * " ") for name, text in lines.items()}
        say("\n".join(f"{name:<13} {text}" for name, text in indented.items()))

    def _describe(self, groups: list[Group]) -> list[str]:
        return [f"{self.optim.optimizer}", *describe(groups, self.optim.lr(self.global_batch))]

    def configure_model(self) -> None:
        """Divide the model where the strategy does."""
        if isinstance(strategy := self.trainer.strategy, FSDP2):
            strategy.shard(self.sharding_units())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names of what the optimizer numbers, for whichever engine goes on."""
        checkpoint["parameter_names"] = self.parameter_names

    def on_train_start(self) -> None:
        self.optim.refresh(cast(torch.optim.Optimizer, self.optimizers()), self.fresh_groups)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set this step's learning rate, and seed dropout and its like by (seed, micro-batch,
        rank)."""
        lr = self.optim.lr_at(
            self.trainer.global_step, self.steps, self.steps_per_epoch, self.global_batch
        )
        for group in cast(torch.optim.Optimizer, self.optimizers()).param_groups:
            group["lr"] = lr * group["lr_scale"]
        # The step that Lightning logs under; after a resume it can be one behind.
        cast(Any, self.trainer).fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * 4099 + self.global_rank)
        self.log("lr", lr)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell Lightning's loop how far the run is, in micro-batches and steps of today's size."""
        state = _data_state(checkpoint)
        data = cast(ShardData, cast(Any, self.trainer).datamodule)
        assert data.sampler is not None
        begin = data.resumes_at(state)
        if data.changes(state):
            say(f"resumed with  another order of samples from sample {begin:,} on")
        loops = checkpoint["loops"]["fit_loop"]
        done = begin // (data.sampler.micro_batch * data.sampler.world_size)
        _set_progress(loops["epoch_loop.batch_progress"], done, "processed")
        if checkpoint.get(VALIDATION_IS_DUE):
            # As Lightning knows a validation that was cut in its first batch: it runs anew, whole.
            due = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            loops["epoch_loop.val_loop.batch_progress"] |= {"total": dict(due), "current": due}
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for name in ("step", "zero_grad"):
            _set_progress(optimizer[name], begin // data.global_batch, "completed")


def _data_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the data module saved in a checkpoint; Lightning keeps it under the class's name."""
    return next(value for name, value in checkpoint.items() if name.endswith("ShardData"))


def _set_progress(progress: dict[str, dict[str, int]], done: int, counted: str) -> None:
    """Shift all counts of one of Lightning's progress trackers so that `done` are done."""
    shift = done - progress["total"][counted]
    for counts in (progress["current"], progress["total"]):
        for name in counts:
            counts[name] += shift
