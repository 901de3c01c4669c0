"""Images per second, time spent waiting for data, share of the devices' peak, and memory."""

import resource
import time
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch


class Throughput(L.Callback):
    """Logs the speed of training; must be the last callback.

    `img_per_s`; `data_wait`, the share of time between two steps, validation apart; `mfu`, the
    share of the devices' peak that the model's own FLOPs make (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B: what is recomputed does not count); `memory_gb`, the most that rank
    zero's device, or its process on CPU, has held (10^9 bytes).

    `seconds` is the time of the whole run, stops left out: it goes along in checkpoints.

    Args:
        global_batch: images in an optimizer step.
        share_of_peak: from a step to the share of all devices' peak that one image a second takes
            then; None logs no mfu.
    """

    def __init__(
        self, global_batch: int, share_of_peak: Callable[[int], float] | None = None
    ) -> None:
        self.global_batch = global_batch
        self.share_of_peak = share_of_peak
        self.img_per_s = 0.0
        self.data_wait = 0.0
        # Of the whole run: seconds before this start, and when it began (-1: it does not train).
        self._seconds_before = 0.0
        self._began_at = -1.0
        # Of the interval since the last logged step.
        self._first_step = 0
        self._interval_began_at = 0.0
        self._step_ended_at = 0.0
        self._waiting = 0.0
        self._validating = 0.0
        self._has_just_validated = False

    @property
    def seconds(self) -> float:
        """Time spent in training and validation so far, before a resume too."""
        if self._began_at < 0:
            return self._seconds_before
        return self._seconds_before + time.perf_counter() - self._began_at

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = float(state_dict["seconds"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began_at = time.perf_counter()
        self._begin_interval(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds_before = self.seconds
        self._began_at = -1.0

    def _begin_interval(self, step: int) -> None:
        self._first_step = step
        self._interval_began_at = time.perf_counter()
        self._step_ended_at = self._interval_began_at
        self._waiting = 0.0
        self._validating = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # After a validation the time also went into the best checkpoint, which is written last.
        if not self._has_just_validated:
            self._waiting += time.perf_counter() - self._step_ended_at
        self._has_just_validated = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validating -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self._validating += now
        self._step_ended_at = now
        self._has_just_validated = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self._step_ended_at = now
        step = trainer.global_step
        steps = step - self._first_step
        if not steps or step % cast(Any, trainer).log_every_n_steps:
            return
        training = max(1e-9, now - self._interval_began_at - self._validating)
        self.img_per_s = steps * self.global_batch / training
        self.data_wait = self._waiting / training
        values = {
            "img_per_s": self.img_per_s,
            "data_wait": self.data_wait,
            "memory_gb": _peak_memory_gb(cast(Any, trainer.strategy).root_device),
        }
        if self.share_of_peak is not None:
            values["mfu"] = self.img_per_s * self.share_of_peak(step - 1)
        for logger in trainer.loggers:
            logger.log_metrics(values, step - 1)
        self._begin_interval(step)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
