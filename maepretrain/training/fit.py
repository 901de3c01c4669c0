"""Training in a run folder: the loop around the steps, and what is printed before the first one."""

from contextlib import suppress
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar

from maepretrain.checkpoints.whole import WholeCheckpointIO
from maepretrain.data.module import ShardData
from maepretrain.models.flops import flops, peak_here
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.ranks import say
from maepretrain.runs.folder import RunFolder
from maepretrain.strategies.sharded import Sharded
from maepretrain.training.callbacks.gradient_norm import GradientNorm
from maepretrain.training.callbacks.last_checkpoint import LastCheckpoint, MidValidation
from maepretrain.training.callbacks.progress import progress
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.module import TrainingModule, _data_state
from maepretrain.training.preemption import Preempted, Stop, under_slurm

# What gloo and NCCL say where another process of the run has ended.
LOST_PEER = ("closed by peer", "reset by peer", "communicator was aborted", "process has exited")


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
    module: TrainingModule,
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
    throughput: Throughput, data: ShardData, engine: L.Trainer, module: TrainingModule
) -> str:
    """Tell the throughput what an image costs and what the devices could do; both in words."""
    assert data.sampler is not None
    dtype = torch.bfloat16 if str(engine.precision).startswith(("bf16", "16")) else None
    peak, source = peak_here(engine.strategy.root_device, dtype)
    costs: dict[tuple[int, ...], float] = {}
    model = module.training_step_model()
    by_parts = isinstance(model, MaskedAutoencoder)
    n = data.sampler.micro_batch if by_parts else 2
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
    data: ShardData, engine: L.Trainer, accumulation: int, module: TrainingModule, cost: str
) -> None:
    """Tell what is really applied before the first step."""
    assert data.sampler is not None
    optim, steps = module.optim, module.steps
    lines = {
        "data": data.describe(),
        "held out": data.describe_held_out(engine.world_size),
        "batch": f"{data.global_batch} = {data.sampler.micro_batch} x {engine.world_size} "
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
    module.announce(lines | module.summary())
