"""What happens around the steps: checkpoints at step boundaries and on signals, speed, progress,
pictures, live evaluation."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from jaxtyping import UInt8
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor

from maepretrain.data.module import ShardData
from maepretrain.data.samples import Batch, ShardIndex
from maepretrain.distributed import is_rank_zero, largest_on_all, run_on_all, say
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.heads import linear_probe
from maepretrain.evaluate.neighbours import knn_accuracy
from maepretrain.plots import reconstruction_grid
from maepretrain.preemption import SIGNALS, Stop, listener, under_slurm
from maepretrain.randomness import permutation
from maepretrain.runs import RunFolder

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


class GradientNorm(L.Callback):
    """Logs `grad_norm`, the Euclidean norm of all gradients before they are clipped, at the steps
    that are logged; left out where an engine does not know it."""

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if hasattr(trainer.model, "get_global_grad_norm") or not self._is_logged(trainer):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # ranks meet
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler.get_scale()  # a fused optimizer takes the scale out itself
        pl_module.log("grad_norm", norm)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """DeepSpeed divides gradients, and tells their norm after the step."""
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last and hasattr(trainer.model, "get_global_grad_norm") and self._is_logged(trainer):
            norm = cast(Any, trainer.model).get_global_grad_norm()
            if norm is not None:
                pl_module.log("grad_norm", float(norm))

    def _is_logged(self, trainer: L.Trainer) -> bool:
        # Lightning's own question, which no public name answers.
        return cast(Any, trainer)._logger_connector.should_update_logs


class Throughput(L.Callback):
    """Logs `img_per_s`; `data_wait`, the share of time between two steps, validation apart; `mfu`,
    the share of the devices' peak that the model's own FLOPs make (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B: what is recomputed does not count); `memory_gb`, the most that rank
    zero's device, or its process on CPU, has held (10^9 bytes). Must be the last callback.

    `seconds` is the time of the whole run, stops left out: it goes along in checkpoints.

    Args:
        global_batch: images in an optimizer step.
        share_of_peak: of all devices' peak, by one image a second, in a step; None logs no mfu.
    """

    def __init__(
        self, global_batch: int, share_of_peak: Callable[[int], float] | None = None
    ) -> None:
        self.global_batch, self.share_of_peak = global_batch, share_of_peak
        self.img_per_s = self.data_wait = 0.0
        self._started = self._ended = time.perf_counter()
        self._waited = self._elsewhere = 0.0
        self._step, self._validated = 0, False
        self._before, self._began = 0.0, -1.0

    @property
    def seconds(self) -> float:
        """Time spent in training and validation so far, before a resume too."""
        return self._before + (time.perf_counter() - self._began if self._began >= 0 else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = float(state_dict["seconds"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()
        self._restart(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before, self._began = self.seconds, -1.0

    def _restart(self, step: int) -> None:
        self._started = self._ended = time.perf_counter()
        self._waited = self._elsewhere = 0.0
        self._step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # After a validation the time also went into the best checkpoint, which is written last.
        if not self._validated:
            self._waited += time.perf_counter() - self._ended
        self._validated = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._elsewhere -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self._elsewhere += now
        self._ended, self._validated = now, True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._ended = now = time.perf_counter()
        steps = trainer.global_step - self._step
        if steps and trainer.global_step % cast(Any, trainer).log_every_n_steps == 0:
            spent = max(1e-9, now - self._started - self._elsewhere)
            self.img_per_s = steps * self.global_batch / spent
            self.data_wait = self._waited / spent
            values = {"img_per_s": self.img_per_s, "data_wait": self.data_wait}
            values["memory_gb"] = _most_memory(cast(Any, trainer.strategy).root_device)
            if self.share_of_peak is not None:
                values["mfu"] = self.img_per_s * self.share_of_peak(trainer.global_step - 1)
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step - 1)
            self._restart(trainer.global_step)


def _most_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Bar(RichProgressBar):
    """Lightning's bar with images per second and the share of time spent waiting for data."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__(leave=True)
        self._throughput = throughput

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        epoch = trainer.global_step / cast(Any, pl_module).steps_per_epoch
        return metrics | {
            "epoch": f"{epoch:.1f}",
            "img/s": f"{self._throughput.img_per_s:.0f}",
            "wait": f"{self._throughput.data_wait:.0%}",
        }

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class Lines(L.Callback):
    """Progress for a log file, where a bar would be noise: one line every so many seconds."""

    def __init__(self, throughput: Throughput, seconds: float = 30.0) -> None:
        self._throughput, self._seconds = throughput, seconds
        self._first_step, self._began, self._last = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step, self._began = trainer.global_step, time.perf_counter()
        self._last = self._began

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now, step = time.perf_counter(), trainer.global_step
        if now - self._last < self._seconds and step < trainer.max_steps:
            return
        self._last = now
        left = (trainer.max_steps - step) * (now - self._began) / max(1, step - self._first_step)
        loss = trainer.callback_metrics.get("loss", torch.tensor(float("nan")))
        say(
            f"step {step:,}/{trainer.max_steps:,}  epoch "
            f"{step / cast(Any, pl_module).steps_per_epoch:.1f}  "
            f"loss {loss:.4f}  {self._throughput.img_per_s:.0f} img/s  "
            f"wait {self._throughput.data_wait:.0%}  {left / 60:.1f} min left"
        )


def progress(throughput: Throughput) -> L.Callback:
    """A bar on a terminal, lines in a file."""
    return Bar(throughput) if sys.stdout.isatty() else Lines(throughput)


class ReconstructionGrid(L.Callback):
    """Draws held-out images at each validation: original, masked, reconstruction, pasted.

    Args:
        run: the run folder; pictures go to `pictures/step-NNNNNNNN.png` and to TensorBoard.
        images: how many.
    """

    def __init__(self, run: Path, images: int) -> None:
        self.folder, self.images = run / "pictures", images

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx:
            return
        module = cast(Any, pl_module)
        shown = run_on_all(trainer, "reconstruct", batch["input"][: self.images])
        if not trainer.is_global_zero:
            return
        rows = [module.normalise.undo(row.float()).cpu() for row in shown]
        path = self.folder / f"step-{trainer.global_step:08d}.png"
        picture = reconstruction_grid(rows, list(type(shown)._fields), path)
        show_in_tensorboard(trainer, "reconstruction", picture)


def show_in_tensorboard(trainer: L.Trainer, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """A picture beside the scalars of the last step."""
    # Under the number of steps before it, as they are: a resume drops what has a later one.
    step = trainer.global_step - 1
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")


class LiveEvaluation(L.Callback):
    """Linear probe and k-NN on held-out labels at each validation, outside the engine.

    The bank is the first `bank` training samples, centre-cropped; the questions are the held-out
    samples. Nothing of it touches the model's gradients or a random generator, so the loss curve is
    bit-equal with it on or off.

    Args:
        bank: labelled training samples to fit on.
    """

    def __init__(self, bank: int, k: int = 20) -> None:
        if bank < k:
            raise ValueError(f"live_probe {bank} must be at least {k}, the neighbours of its k-NN")
        self.size, self.k = bank, k
        self.bank: ShardIndex | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the bank, and find out now, not hours later, whether it can be used."""
        data = cast(ShardData, cast(Any, trainer).datamodule)
        assert data.val_index is not None
        chosen = permutation(0, "bank", len(data.index))[: self.size]
        self.bank = data.index.choose(chosen.sort().values)
        labels = self.bank.require_labels("live_probe")
        data.val_index.require_labels("live_probe")
        if len(labels) < self.k or len(labels.unique()) < 2:
            raise ValueError(f"live_probe needs {self.k} samples of two classes or more")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data = cast(Any, pl_module), cast(ShardData, cast(Any, trainer).datamodule)
        assert data.val_index is not None and self.bank is not None

        def features(index: ShardIndex) -> tuple[Tensor, Tensor]:
            return embed(
                lambda images: run_on_all(trainer, "encode", images.to(module.device)),
                data.evaluation(index, labelled=True),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                workers=data.num_workers,
            )

        train, labels = features(self.bank)
        test, truth = features(data.val_index)
        # Lightning validates in inference mode, whose tensors no gradient can be taken of.
        with torch.inference_mode(False), torch.enable_grad():
            probed = linear_probe(train.clone(), labels.clone(), test.clone(), truth.clone())
        values = {
            "val_probe": probed,
            "val_knn": knn_accuracy(test, truth, train, labels, k=self.k),
        }
        pl_module.log_dict(values, rank_zero_only=False, sync_dist=False, prog_bar=True)
