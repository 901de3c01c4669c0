"""Images per second, time spent waiting for data, share of the devices' peak, and memory."""

import resource
import time
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch


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
