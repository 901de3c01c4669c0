"""The LightningModule that pretraining and fine-tuning share: schedule, steps and resume.

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
from maepretrain.lightning_internals import repeat_validation, set_logged_step, set_progress
from maepretrain.ranks import say, say_detail
from maepretrain.strategies.fsdp2 import FSDP2
from maepretrain.training.callbacks.last_checkpoint import VALIDATION_IS_DUE
from maepretrain.training.optimizer import Group, Optimization, check_groups, describe


class TrainingModule(L.LightningModule):
    """A LightningModule whose learning rate and random numbers are pure functions of the step.

    The configuration wins over whatever a loaded checkpoint brings along.

    Args:
        optim: optimizer and schedule.
        data: its normalisation, global batch and epoch length are used.
        steps: optimizer steps of the run.
        seed: of dropout and its like.
    """

    def __init__(self, optim: Optimization, data: ShardData, steps: int, seed: int) -> None:
        super().__init__()
        self.optim = optim
        self.steps = steps
        self.seed = seed
        self.global_batch = data.global_batch
        self.steps_per_epoch = data.order.steps_per_epoch
        self.normalise = Normalise(data.mean, data.std)
        # The lines that were printed about the run, for its folder.
        self.applied: dict[str, str] = {}
        # Settings of the parameter groups as configured now, without their parameters.
        self.group_settings: list[Group] = []
        # Of the optimizer, in its order: names of its parameters, and how many each group has.
        self.parameter_names: list[str] = []
        self.group_sizes: list[int] = []

    def sharding_units(self) -> list[nn.Module]:
        """Modules that a strategy divides among processes, each by itself."""
        return [cast(nn.Module, self.model)]

    def training_step_model(self) -> nn.Module:
        """The module that a training step computes: `training_step_model()(batch)["loss"]`."""
        raise NotImplementedError

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        """The encoder's parameters in order, for layer-wise learning rates."""
        return []

    def summary(self) -> dict[str, str]:
        """Further lines that a run prints before its first step, by name."""
        return {}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Parameters without weight decay besides the vectors."""
        return []

    def announce(self, lines: dict[str, str]) -> None:
        """Print lines about the run, and keep them for the run folder."""
        self.applied |= lines
        for name, text in lines.items():
            indented = text.replace("\n", "\n" + 14 * " ")
            say_detail(f"{name:<13} {indented}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optim.check_strategy(type(self.trainer.strategy).__name__)
        groups = self._parameter_groups()
        names = {id(p): name for name, p in self.named_parameters()}
        self.parameter_names = [names[id(p)] for group in groups for p in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        self.group_settings = [
            {name: value for name, value in group.items() if name != "params"} for group in groups
        ]
        lines = describe(groups, self.optim.lr(self.global_batch))
        self.announce({"optimizer": "\n".join([f"{self.optim.optimizer}", *lines])})
        # Lightning cannot clip under mixed precision when the optimizer is fused.
        amp = isinstance(self.trainer.precision_plugin, MixedPrecision)
        clips = bool(self.trainer.gradient_clip_val)
        return self.optim.make(groups, self.global_batch, fused=not (amp and clips))

    def _parameter_groups(self) -> list[Group]:
        layers = self.parameter_layers()
        in_layers = {id(p) for layer in layers for p in layer}
        rest = [p for p in self.parameters() if id(p) not in in_layers]
        groups = self.optim.groups(layers, rest, self.undecayed_parameters())
        check_groups(groups, self.parameters())
        return groups

    def configure_model(self) -> None:
        """Divide the model where the strategy does."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2):
            strategy.shard(self.sharding_units())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the parameters that the optimizer numbers, for any strategy that goes on."""
        checkpoint["parameter_names"] = self.parameter_names

    def on_train_start(self) -> None:
        self.optim.refresh(cast(torch.optim.Optimizer, self.optimizers()), self.group_settings)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set this step's learning rate, and seed dropout and its like by (seed, micro-batch,
        rank)."""
        step = self.trainer.global_step
        lr = self.optim.lr_at(step, self.steps, self.steps_per_epoch, self.global_batch)
        for group in cast(torch.optim.Optimizer, self.optimizers()).param_groups:
            group["lr"] = lr * group["lr_scale"]
        set_logged_step(self.trainer, step)
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * 4099 + self.global_rank)
        self.log("lr", lr)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set how far Lightning's loop is, in micro-batches and steps of today's size."""
        state = data_state(checkpoint)
        data = cast(ShardData, cast(Any, self.trainer).datamodule)
        assert data.sampler is not None
        samples = data.resumes_at(state)
        if data.changes(state):
            say(f"resumed with  another order of samples from sample {samples:,} on")
        set_progress(
            checkpoint,
            micro_batches=samples // (data.sampler.micro_batch * data.sampler.world_size),
            steps=samples // data.global_batch,
        )
        if checkpoint.get(VALIDATION_IS_DUE):
            repeat_validation(checkpoint)


def data_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The state of the data module; Lightning keeps it under the name of its class."""
    return next(value for name, value in checkpoint.items() if name.endswith("ShardData"))
