"""Checkpoints at step boundaries: periodic ones, the last one, and on a request to stop."""

import time
from pathlib import Path
from typing import Any, cast

import lightning as L

from maepretrain.ranks import is_rank_zero, largest_on_all
from maepretrain.runs.folder import RunFolder
from maepretrain.training.preemption import StopReason
from maepretrain.training.stop_request import StopRequest

# Key in a checkpoint: the validation of its step was cut off, or never begun.
VALIDATION_IS_DUE = "validation_is_due"


class StoppedInValidation(Exception):
    """The run stops between two batches of a validation, with a checkpoint."""


class LastCheckpoint(L.Callback):
    """Saves at step boundaries: every so many steps or minutes, at the end, and where the run is to
    stop.

    Lightning alone stops in the middle of a step, without a checkpoint. Here all processes agree on
    it, after a step or between two batches of a validation. A validation that is cut off runs anew
    when the run goes on.

    Args:
        folder: the run folder.
        every_steps: optimizer steps between two saves.
        every_minutes: time between two saves.
        keep_every_steps: steps between two checkpoints `step=N.ckpt` that are kept; None keeps
            none.

    Raises:
        ValueError: a number of steps below 1, or no minutes.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        every_steps: int,
        every_minutes: float,
        keep_every_steps: int | None = None,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"checkpoint_every_steps {every_steps} must be at least 1")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise ValueError(f"keep_every_steps {keep_every_steps} must be at least 1")
        if not every_minutes > 0:
            raise ValueError(f"checkpoint_every_minutes {every_minutes} must be above 0")
        self.folder = folder
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep_every_steps = keep_every_steps
        # The reason for which training has stopped.
        self.stopped = StopReason.NONE
        self._request = StopRequest()
        # All processes agree on these two at a boundary.
        self._stop = StopReason.NONE
        self._time_is_up = False
        self._validation_is_due = False
        self._handled_step = -1
        self._saved_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(Any, pl_module)
        self.folder.begin(trainer.global_step, module.applied)
        self.folder.mark(
            steps=trainer.max_steps,
            steps_per_epoch=module.steps_per_epoch,
            global_batch=module.global_batch,
        )
        self._handled_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._request.install()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a checkpoint here would lose the gradients gathered so far
        self._agree(trainer)
        interval = cast(Any, trainer).val_check_batch
        validation_follows = (
            trainer.enable_validation and interval and not ((batch_idx + 1) % interval)
        )
        if not validation_follows:
            self._end_step(trainer)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here, except in the last validation: no step follows with which it would come
        again."""
        if trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps:
            return
        self._agree(trainer)
        if self._stop:
            self._validation_is_due = True
            self._end_step(trainer)
            raise StoppedInValidation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._end_step(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[VALIDATION_IS_DUE] = self._validation_is_due

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._request.restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._request.restore()

    def _agree(self, trainer: L.Trainer) -> None:
        """Agree with all processes on whether to stop and whether to save; they meet here."""
        seconds = time.monotonic() - self._saved_at
        # Clocks differ: rank zero's counts.
        time_is_up = is_rank_zero() and seconds >= 60 * self.every_minutes
        reason, due = largest_on_all(trainer, int(self._request.reason), int(time_is_up))
        self._stop = StopReason(reason)
        self._time_is_up = bool(due)

    def _end_step(self, trainer: L.Trainer) -> None:
        """Save what is due at this step, and stop training where that was agreed."""
        step = trainer.global_step
        is_last_step = step >= trainer.max_steps
        if step != self._handled_step:
            if self._stop or is_last_step or self._time_is_up or step % self.every_steps == 0:
                self._save_last(trainer)
            if self.keep_every_steps and step % self.keep_every_steps == 0:
                trainer.save_checkpoint(self._checkpoints / f"step={step}.ckpt")
        self._handled_step = step
        if self._stop and not is_last_step:
            self.stopped = self._stop
            trainer.should_stop = True

    def _save_last(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self._checkpoints / "last.ckpt")
        self._saved_at = time.monotonic()
        self.folder.mark(saved_step=trainer.global_step, saved_at=time.time())

    @property
    def _checkpoints(self) -> Path:
        return self.folder.path / "checkpoints"
