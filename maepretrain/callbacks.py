"""What happens around the steps: checkpoints at step boundaries and on signals, speed, progress,
pictures, live evaluation."""

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from maepretrain.data.module import ShardData
from maepretrain.data.samples import Batch, ShardIndex
from maepretrain.distributed import is_rank_zero, run_on_all, say
from maepretrain.evaluate.features import embed
from maepretrain.evaluate.heads import linear_probe
from maepretrain.evaluate.neighbours import knn_accuracy
from maepretrain.plots import reconstruction_grid
from maepretrain.randomness import permutation
from maepretrain.runs import RunFolder


class LastCheckpoint(L.Callback):
    """Saves at step boundaries: every so many steps, at the end, and on Ctrl-C or SIGTERM.

    Lightning alone leaves in the middle of a step without a checkpoint. Where a validation is due
    at the same step, it runs first, so that a resume has nothing to repeat. A second Ctrl-C ends at
    once.

    Args:
        folder: the run folder.
        every: optimizer steps between two saves.
        keep_every: steps between two checkpoints `step=N.ckpt` that are kept; None keeps none.

    Raises:
        ValueError: a number of steps below 1.
    """

    def __init__(self, folder: RunFolder, every: int, keep_every: int | None = None) -> None:
        for name, steps in (("checkpoint_every_steps", every), ("keep_every_steps", keep_every)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name} {steps} must be at least 1")
        self.folder, self.every, self.keep_every = folder, every, keep_every
        self.stopped = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._saved = -1
        self._stop = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.begin()
        self._saved = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        again = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, again)
        if is_rank_zero():
            print("\nstopping at the next step with a checkpoint; again: at once", file=sys.stderr)

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
        self._stop = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        validates = trainer.enable_validation and cast(Any, trainer).val_check_batch
        if not validates or (batch_idx + 1) % validates:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        ended = step >= trainer.max_steps
        folder = self.folder.path / "checkpoints"
        if step != self._saved and (self._stop or ended or step % self.every == 0):
            trainer.save_checkpoint(folder / "last.ckpt")
        if step != self._saved and self.keep_every and step % self.keep_every == 0:
            trainer.save_checkpoint(folder / f"step={step}.ckpt")
        self._saved = step
        if self._stop and not ended:
            self.stopped = True
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class Throughput(L.Callback):
    """Logs `img_per_s` and `data_wait`, the share of time between two steps, validation apart. Must
    be the last callback.

    `seconds` is the time of the whole run, stops left out: it goes along in checkpoints.

    Args:
        global_batch: images in an optimizer step.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
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
            for logger in trainer.loggers:
                values = {"img_per_s": self.img_per_s, "data_wait": self.data_wait}
                logger.log_metrics(values, trainer.global_step - 1)
            self._restart(trainer.global_step)


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
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "reconstruction", picture, trainer.global_step, dataformats="HWC"
                )


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
