"""Progress of a run: a bar on a terminal, lines in a log file."""

import sys
import time
from typing import Any, cast

import lightning as L
import torch

from maepretrain.lightning_internals import TrainingBar
from maepretrain.ranks import say
from maepretrain.training.callbacks.throughput import Throughput


class Bar(TrainingBar):
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


class Lines(L.Callback):
    """Progress for a log file, where a bar would be noise: one line every so many seconds."""

    def __init__(self, throughput: Throughput, seconds: float = 30.0) -> None:
        self._throughput = throughput
        self._seconds = seconds
        self._first_step = 0
        self._started_at = 0.0
        self._printed_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started_at = time.perf_counter()
        self._printed_at = self._started_at

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        step = trainer.global_step
        if now - self._printed_at < self._seconds and step < trainer.max_steps:
            return
        self._printed_at = now
        seconds_per_step = (now - self._started_at) / max(1, step - self._first_step)
        seconds_left = (trainer.max_steps - step) * seconds_per_step
        epoch = step / cast(Any, pl_module).steps_per_epoch
        loss = trainer.callback_metrics.get("loss", torch.tensor(float("nan")))
        say(
            f"step {step:,}/{trainer.max_steps:,}  epoch {epoch:.1f}  loss {loss:.4f}  "
            f"{self._throughput.img_per_s:.0f} img/s  wait {self._throughput.data_wait:.0%}  "
            f"{seconds_left / 60:.1f} min left"
        )


def progress(throughput: Throughput) -> L.Callback:
    """A bar on a terminal, lines in a file."""
    return Bar(throughput) if sys.stdout.isatty() else Lines(throughput)
