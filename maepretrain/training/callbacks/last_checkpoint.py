"""Checkpoints at step boundaries: periodic ones, the last one, and on a request to stop."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, cast

import lightning as L

from maepretrain.ranks import is_rank_zero, largest_on_all
from maepretrain.runs.folder import RunFolder
from maepretrain.training.preemption import SIGNALS, Stop, listener, under_slurm

# In a checkpoint: the validation of its step was cut off, or never begun.
VALIDATION_IS_DUE = "validation_is_due"


class MidValidation(Exception):
    """The run stops between two batches of a validation, with a checkpoint."""


class LastCheckpoint(L.Callback):
    """Saves at step boundaries: every so many steps or minutes, at the end, and where the run is to
    stop: on Ctrl-C or SIGTERM, under SLURM on SIGUSR1 too.

    Lightning alone leaves in the middle of a step without a checkpoint. All processes agree on it,
    after a step or between two batches of a validation; a validation that is cut off runs anew when
    the run goes on. A second Ctrl-C ends at once. SLURM may send its signals as often as it likes.

    Args:
        folder: the run folder.
        every: optimizer steps between two saves.
        minutes: time between two saves.
        keep_every: steps between two checkpoints `step=N.ckpt` that are kept; None keeps none.

    Raises:
        ValueError: a number of steps below 1, or no minutes.
    """

    def __init__(
        self, folder: RunFolder, every: int, minutes: float, keep_every: int | None = None
    ) -> None:
        for name, steps in (("checkpoint_every_steps", every), ("keep_every_steps", keep_every)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name} {steps} must be at least 1")
        if not minutes > 0:
            raise ValueError(f"checkpoint_every_minutes {minutes} must be above 0")
        self.folder, self.every, self.minutes, self.keep_every = folder, every, minutes, keep_every
        self.stopped = Stop.NO
        # What this process was told, and what all processes agreed on.
        self._told = self._stop = Stop.NO
        self._due = self._validation_is_due = False
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._saved, self._saved_at = -1, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(Any, pl_module)
        self.folder.begin(trainer.global_step, module.applied)
        about = {"steps": trainer.max_steps, "steps_per_epoch": module.steps_per_epoch}
        self.folder.mark(**about, global_batch=module.global_batch)
        self._saved, self._saved_at = trainer.global_step, time.monotonic()
        if listener.heard:
            self._told = Stop.PREEMPTED
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGINT, signal.SIGTERM, *(SIGNALS if under_slurm() else ())}:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that has only just been forked
        first = self._told == Stop.NO
        if number in SIGNALS and under_slurm():
            self._told = max(self._told, Stop.PREEMPTED)
        else:
            self._told = Stop.INTERRUPTED
            again = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, again)
        if first and is_rank_zero():
            more = "; again: at once" if self._told == Stop.INTERRUPTED else ""
            print(f"\nstopping at the next step with a checkpoint{more}", file=sys.stderr)

    def _agree(self, trainer: L.Trainer) -> None:
        """What all processes do at this boundary; they meet here."""
        due = is_rank_zero() and time.monotonic() - self._saved_at >= 60 * self.minutes
        stop, due = largest_on_all(trainer, int(self._told), int(due))
        self._stop, self._due = Stop(stop), bool(due)

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
        validates = trainer.enable_validation and cast(Any, trainer).val_check_batch
        if not validates or (batch_idx + 1) % validates:
            self._save(trainer)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here, but for the last validation: no step follows with which it would come
        again."""
        if trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps:
            return
        self._agree(trainer)
        if self._stop:
            self._validation_is_due = True
            self._save(trainer)
            raise MidValidation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say whether a validation is left to do."""
        checkpoint[VALIDATION_IS_DUE] = self._validation_is_due

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        ended = step >= trainer.max_steps
        folder = self.folder.path / "checkpoints"
        if step != self._saved and (self._stop or ended or self._due or step % self.every == 0):
            trainer.save_checkpoint(folder / "last.ckpt")
            self._saved_at = time.monotonic()
            self.folder.mark(saved_step=step, saved_at=time.time())
        if step != self._saved and self.keep_every and step % self.keep_every == 0:
            trainer.save_checkpoint(folder / f"step={step}.ckpt")
        self._saved = step
        if self._stop and not ended:
            self.stopped = self._stop
            trainer.should_stop = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _restore(self) -> None:
        """The handlers of before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
