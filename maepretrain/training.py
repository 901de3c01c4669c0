"""Training in a run folder, for pretraining and fine-tuning alike: schedule, steps, resume, what is
printed first.

A run is one Lightning epoch over a stream of micro-batches (see `data/module.py`), so the Trainer
counts steps and epochs are ours to convert.
"""

from contextlib import suppress
from typing import Any, cast

import lightning as L
import torch
from jaxtyping import Float, Shaped
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from maepretrain.callbacks import (
    VALIDATION_IS_DUE,
    GradientNorm,
    LastCheckpoint,
    MidValidation,
    Throughput,
    progress,
)
from maepretrain.data.module import ShardData
from maepretrain.data.samples import Batch
from maepretrain.distributed import say
from maepretrain.engines.fsdp import FSDP2
from maepretrain.engines.sharded import Sharded
from maepretrain.flops import flops, peak_here
from maepretrain.models.mae import MaskedAutoencoder
from maepretrain.optim import Group, Optimization, check_groups, describe
from maepretrain.preemption import Preempted, Stop, under_slurm
from maepretrain.runs import RunFolder, WholeCheckpointIO

# What gloo and NCCL say where another process of the run has ended.
LOST_PEER = ("closed by peer", "reset by peer", "communicator was aborted", "process has exited")


class Normalise(nn.Module):
    """(x - mean) / std in float32, on the device, where x is a uint8 pixel / 255 or a float as it
    is. Tokens (int64) stay as they are."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Shaped[Tensor, "b c *size"]) -> Shaped[Tensor, "b c *size"]:
        """Images (b, c, h, w) or signals (b, c, t), normalised."""
        if x.dtype == torch.int64:
            return x
        values = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        mean, std = self._channelwise(x.ndim)
        return (values - mean) / std

    def undo(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """Pixels in 0..1 again; signals in their own range."""
        mean, std = self._channelwise(x.ndim)
        values = x * std + mean
        return values.clamp(0, 1) if x.ndim == 4 else values

    def _channelwise(self, dimensions: int) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (dimensions - 2))
        return cast(Tensor, self.mean).view(shape), cast(Tensor, self.std).view(shape)


class Scheduled(L.LightningModule):
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

    def units(self) -> list[nn.Module]:
        """What an engine divides, each part by itself."""
        return [cast(nn.Module, self.model)]

    def costly(self) -> nn.Module:
        """What a training step computes: `costly()(batch)["loss"]`."""
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
        self.tell({"optimizer": "\n".join(self._describe(groups))})
        # Lightning cannot clip under mixed precision when the optimizer is fused.
        amp = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self.optim.make(
            groups, self.global_batch, fused=not (amp and self.trainer.gradient_clip_val)
        )

    def tell(self, lines: dict[str, str]) -> None:
        """Print what is really applied, and keep it for the run folder."""
        self.applied |= lines
        indented = {name: text.replace("\n", "\n" + 14 * " ") for name, text in lines.items()}
        say("\n".join(f"{name:<13} {text}" for name, text in indented.items()))

    def _describe(self, groups: list[Group]) -> list[str]:
        return [f"{self.optim.optimizer}", *describe(groups, self.optim.lr(self.global_batch))]

    def configure_model(self) -> None:
        """Divide the model where the strategy does."""
        if isinstance(strategy := self.trainer.strategy, FSDP2):
            strategy.shard(self.units())

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
        assert data.stream is not None
        begin = data.resumes_at(state)
        if data.changes(state):
            say(f"resumed with  another order of samples from sample {begin:,} on")
        loops = checkpoint["loops"]["fit_loop"]
        done = begin // (data.stream.micro_batch * data.stream.world_size)
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


def set_threads(threads: int | None) -> None:
    """Compute threads of this process; None leaves torch's choice.

    Raises:
        ValueError: fewer than one.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads {threads} must be at least 1")
        torch.set_num_threads(threads)


def in_steps(trainer: dict[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """Trainer arguments with epochs turned into steps, since the whole run is one Lightning epoch.

    Raises:
        ValueError: neither max_epochs nor max_steps, or numbers below 1.
    """
    arguments = dict(trainer)
    epochs, steps = arguments.pop("max_epochs", None), arguments.get("max_steps", -1)
    if steps is None or steps < 0:
        if epochs is None or epochs < 1:
            raise ValueError(
                "the length of the run is missing: set trainer.max_epochs or max_steps"
            )
        steps = epochs * steps_per_epoch
    accumulation = arguments.get("accumulate_grad_batches") or 1
    if steps < 1 or accumulation < 1:
        raise ValueError(f"{steps} steps of {accumulation} micro-batches: both must be at least 1")
    interval, every = arguments.get("val_check_interval"), arguments.get("check_val_every_n_epoch")
    if not isinstance(interval, int):
        if not isinstance(interval, float | None):
            raise ValueError(
                f"trainer.val_check_interval {interval} must be a number of micro-batches or a "
                "share of an epoch"
            )
        share = (every or 1) if interval is None else interval * (every or 1)
        interval = max(1, round(share * steps_per_epoch)) * accumulation
    # Lightning refuses an interval longer than the run.
    interval = min(interval, steps * accumulation)
    return arguments | {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": interval,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": min(arguments.get("log_every_n_steps") or 50, steps),
    }


def fit(
    module: Scheduled,
    data: ShardData,
    trainer: dict[str, Any],
    folder: RunFolder,
    callbacks: list[L.Callback],
    last: LastCheckpoint,
) -> tuple[bool, L.Trainer]:
    """Train in a run folder, from its last checkpoint where it is resumed.

    Returns:
        Whether the run came to its end, and the trainer.

    Raises:
        ValueError: what Lightning refuses, sizes that do not divide, a checkpoint of another model.
        Preempted: SLURM took the nodes.
    """
    throughput = Throughput(data.global_batch)
    bar = progress(throughput)
    if data.val_index is None:
        trainer = trainer | {"limit_val_batches": 0}
    plugins: list[Any] = [WholeCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeue saves in the middle of a step, without asking the other ranks.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        engine = L.Trainer(
            **trainer,
            default_root_dir=folder.path,
            logger=folder.loggers(),
            enable_model_summary=False,
            plugins=plugins,
            enable_progress_bar=isinstance(bar, RichProgressBar),
            # Throughput comes last: what it does not see between two steps is waiting for data.
            callbacks=[*callbacks, GradientNorm(), last, bar, throughput],
        )
        accumulation = trainer.get("accumulate_grad_batches") or 1
        if isinstance(engine.strategy, Sharded):
            # Parameters that are gathered in inference mode could not be trained after it.
            engine.fit_loop.epoch_loop.val_loop.inference_mode = False
        data.plan(trainer["max_steps"], engine.world_size, accumulation)
        if (state := folder.state()) is not None:
            data.resumes_at(_data_state(state))  # refused here, it has not touched the folder yet
        cost = _set_speed(throughput, data, engine, module)
        _describe(data, engine, accumulation, module, cost)
        if under_slurm():
            # Lightning's handler of SIGTERM meets the other ranks wherever they are; ours, which
            # the verb began with, takes note.
            cast(Any, engine)._signal_connector.register_signal_handlers = lambda: None
        with suppress(MidValidation):
            engine.fit(module, data, ckpt_path=folder.resume_from, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST_PEER):
            raise ValueError(
                "another process of this run ended; its own message says why"
            ) from None
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"the model differs from the one in {folder.resume_from}: {error}"
        ) from error
    if last.stopped:
        preempted = last.stopped == Stop.PREEMPTED
        folder.mark(state="preempted" if preempted else "stopped")
        say(
            f"stopped at step {engine.global_step} of {trainer['max_steps']} with a checkpoint; "
            "go on with the same command and --resume"
        )
        if preempted:
            raise Preempted
    return not last.stopped, engine


def _set_speed(
    throughput: Throughput, data: ShardData, engine: L.Trainer, module: Scheduled
) -> str:
    """Tell the throughput what an image costs and what the devices could do; both in words."""
    assert data.stream is not None
    dtype = torch.bfloat16 if str(engine.precision).startswith(("bf16", "16")) else None
    peak, source = peak_here(engine.strategy.root_device, dtype)
    costs: dict[tuple[int, ...], float] = {}
    model = module.costly()
    by_parts = isinstance(model, MaskedAutoencoder)
    n = data.stream.micro_batch if by_parts else 2
    for shape in {data.shape_at(0), data.shape}:
        batch = {
            # Zeros are what every likelihood takes.
            "input": torch.zeros(n, *shape, device="meta" if by_parts else "cpu"),
            "position": torch.arange(n),
            "label": torch.zeros(n, dtype=torch.int64),
        }
        costs[shape] = flops(model, batch).training

    def share(step: int) -> float:
        return costs[data.shape_at(step)] / (peak * 1e12 * engine.world_size)

    throughput.share_of_peak = share
    small = f" ({costs[data.shape_at(0)] / 1e9:.4g} G at first)" if len(costs) > 1 else ""
    return f"{costs[data.shape] / 1e9:.4g} G a sample{small}; peak {peak:.4g} T/s, {source}"


def _describe(
    data: ShardData, engine: L.Trainer, accumulation: int, module: Scheduled, cost: str
) -> None:
    """Tell what is really applied before the first step."""
    assert data.stream is not None
    optim, steps = module.optim, module.steps
    lines = {
        "data": data.describe(),
        "held out": data.describe_held_out(engine.world_size),
        "batch": f"{data.global_batch} = {data.stream.micro_batch} x {engine.world_size} "
        f"processes x {accumulation} accumulated",
        "length": f"{steps:,} steps, {steps / module.steps_per_epoch:.4g} epochs of "
        f"{module.steps_per_epoch}",
        "lr": f"{optim.lr(data.global_batch):.4g} = base_lr {optim.base_lr:g} x "
        f"{data.global_batch} / 256, warm-up {optim.warmup_epochs:g} epochs, "
        f"cosine to {optim.min_lr:g}",
        "precision": f"{engine.precision}",
        "FLOPs": cost,
        "devices": f"{engine.world_size} x {engine.strategy.root_device}, "
        f"{type(engine.strategy).__name__}",
        "run folder": str(engine.default_root_dir),
    }
    module.tell(lines | module.summary())
