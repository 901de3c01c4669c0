"""Training in a run folder: the Trainer of a run, the loop around its steps, and how it ends."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar

from maepretrain.checkpoints.whole import WholeCheckpointIO
from maepretrain.data.module import ShardData
from maepretrain.lightning_internals import disable_signal_handlers, validate_in_inference_mode
from maepretrain.ranks import say
from maepretrain.runs.folder import RunFolder
from maepretrain.strategies.sharded import ShardedStrategy
from maepretrain.training.announce import announce_run, measure_cost, share_of_peak
from maepretrain.training.callbacks.gradient_norm import GradientNorm
from maepretrain.training.callbacks.last_checkpoint import LastCheckpoint, StoppedInValidation
from maepretrain.training.callbacks.progress import progress
from maepretrain.training.callbacks.throughput import Throughput
from maepretrain.training.module import TrainingModule, data_state
from maepretrain.training.preemption import Preempted, StopReason, under_slurm

# Messages of gloo and NCCL where another process of the run has ended.
LOST_PEER = ("closed by peer", "reset by peer", "communicator was aborted", "process has exited")


def fit(
    module: TrainingModule,
    data: ShardData,
    trainer_arguments: dict[str, Any],
    folder: RunFolder,
    callbacks: list[L.Callback],
    last: LastCheckpoint,
) -> tuple[bool, L.Trainer]:
    """Train in a run folder, from its last checkpoint where it is resumed.

    Args:
        module: to train.
        data: its batches.
        trainer_arguments: as `in_steps` returns them.
        folder: the run folder, entered.
        callbacks: besides those that every run has.
        last: saves checkpoints, and stops the run.

    Returns:
        Whether the run came to its end, and the trainer.

    Raises:
        ValueError: an argument that Lightning refuses, sizes that do not divide, a checkpoint of
            another model.
        Preempted: SLURM took the nodes.
    """
    if data.val_index is None:
        trainer_arguments = trainer_arguments | {"limit_val_batches": 0}
    throughput = Throughput(data.global_batch)
    with _errors_in_one_line(folder):
        trainer = _make_trainer(
            trainer_arguments, folder, [*callbacks, GradientNorm(), last], throughput
        )
        data.plan(trainer.max_steps, trainer.world_size, trainer.accumulate_grad_batches)
        checkpoint = folder.state()
        if checkpoint is not None:
            # Another order is refused here, before the run has changed its folder.
            data.resumes_at(data_state(checkpoint))
        cost = measure_cost(data, trainer, module)
        throughput.share_of_peak = share_of_peak(cost, data, trainer.world_size)
        announce_run(data, trainer, module, cost)
        with suppress(StoppedInValidation):
            trainer.fit(module, data, ckpt_path=folder.resume_from, weights_only=True)
    if last.stopped:
        _end_stopped_run(trainer, folder, last.stopped)
    return not last.stopped, trainer


def _make_trainer(
    arguments: dict[str, Any],
    folder: RunFolder,
    callbacks: list[L.Callback],
    throughput: Throughput,
) -> L.Trainer:
    plugins: list[Any] = [WholeCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeue saves in the middle of a step, without asking the other ranks.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    bar = progress(throughput)
    trainer = L.Trainer(
        **arguments,
        default_root_dir=folder.path,
        logger=folder.loggers(),
        enable_model_summary=False,
        plugins=plugins,
        enable_progress_bar=isinstance(bar, RichProgressBar),
        # Throughput comes last: what it does not see between two steps is waiting for data.
        callbacks=[*callbacks, bar, throughput],
    )
    if isinstance(trainer.strategy, ShardedStrategy):
        # Parameters that are gathered in inference mode could not be trained after it.
        validate_in_inference_mode(trainer, enabled=False)
    if under_slurm():
        # The verb's own handlers took the signals from its beginning, and StopRequest goes on.
        disable_signal_handlers(trainer)
    return trainer


@contextmanager
def _errors_in_one_line(folder: RunFolder) -> Iterator[None]:
    """Turn the errors that a user can mend, and those of a lost rank, into one line."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in LOST_PEER):
            raise ValueError(
                "another process of this run ended; its own message says why"
            ) from None
        if "loading state_dict" in text:
            raise ValueError(
                f"the model differs from the one in {folder.resume_from}: {error}"
            ) from error
        raise


def _end_stopped_run(trainer: L.Trainer, folder: RunFolder, reason: StopReason) -> None:
    """Write down and print that a run was stopped on the way.

    Raises:
        Preempted: by SLURM.
    """
    is_preempted = reason == StopReason.PREEMPTED
    folder.mark(state="preempted" if is_preempted else "stopped")
    say(
        f"stopped at step {trainer.global_step} of {trainer.max_steps} with a checkpoint; "
        "go on with the same command and --resume"
    )
    if is_preempted:
        raise Preempted
