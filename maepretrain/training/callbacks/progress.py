"""Progress of a run: a bar on a terminal, lines in a log file."""

import sys
import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar

from maepretrain.ranks import say
from maepretrain.training.callbacks.throughput import Throughput


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
