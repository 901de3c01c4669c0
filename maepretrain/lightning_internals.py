"""Private names of Lightning: each use of one, and why no public name serves.

No other module may use them. Written for Lightning 2.6: pyproject.toml caps the version, and
`test_lightning_internals.py` states what is relied on. The module stands at the package's top since
runs, strategies and training need it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from maepretrain.ranks import is_rank_zero


def is_logging_step(trainer: L.Trainer) -> bool:
    """Return whether Lightning logs the current step; only its logger connector knows."""
    return cast(Any, trainer)._logger_connector.should_update_logs


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Set the number under which Lightning logs the current step.

    Lightning counts it apart from `global_step`, and after a resume it can be one behind.
    """
    cast(Any, trainer).fit_loop.epoch_loop._batches_that_stepped = step


def disable_signal_handlers(trainer: L.Trainer) -> None:
    """Leave the signal handlers as they are during `fit`.

    Lightning's handler of SIGTERM broadcasts to the other ranks wherever they are, in the middle of
    a step too, and no argument of the Trainer leaves it out.
    """
    cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None


def validate_in_inference_mode(trainer: L.Trainer, *, enabled: bool) -> None:
    """Choose inference mode for the validations inside `fit`.

    The Trainer's argument is for `validate()` and `test()` too, and is fixed when it is made.
    """
    cast(Any, trainer).fit_loop.epoch_loop.val_loop.inference_mode = enabled


def call_through_wrapper(strategy: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the LightningModule inside the forward pass of what wraps it.

    Strategies do so for training_step and its like, and for no other method.
    """
    redirection = strategy._forward_redirection
    return redirection(strategy.model, strategy.lightning_module, method, *arguments)


def set_progress(checkpoint: dict[str, Any], *, micro_batches: int, steps: int) -> None:
    """Set how far a checkpoint's loops are, before Lightning loads them.

    Lightning counts micro-batches. They may have another size after a resume.

    Args:
        checkpoint: as Lightning saved it; changed in place.
        micro_batches: that are done.
        steps: optimizer steps that are done.
    """
    loops = checkpoint["loops"]["fit_loop"]
    _shift(loops["epoch_loop.batch_progress"], micro_batches, "processed")
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name in ("step", "zero_grad"):
        _shift(optimizer[name], steps, "completed")


def _shift(progress: dict[str, dict[str, int]], done: int, counted: str) -> None:
    """Shift all counts of a progress tracker so that `done` are done."""
    shift = done - progress["total"][counted]
    for counts in (progress["current"], progress["total"]):
        for name in counts:
            counts[name] += shift


def repeat_validation(checkpoint: dict[str, Any]) -> None:
    """Mark a checkpoint's validation as cut off in its first batch: Lightning runs it anew.

    Args:
        checkpoint: as Lightning saved it; changed in place.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for counts in ("total", "current"):
        progress[counts] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class TrainingBar(RichProgressBar):
    """A progress bar that names no epoch: a run is one epoch of Lightning."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which deletes an existing metrics.csv, made to go on with it.

    Args:
        save_dir: the folder; the file is `save_dir/metrics.csv`.
        prepare: puts an existing file in order and returns its columns.
    """

    def __init__(self, save_dir: str, prepare: Callable[[Path], list[str]]) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._prepare = prepare

    @property
    def experiment(self) -> Any:
        """The writer; on other ranks than zero Lightning's stand-in for it."""
        if self._experiment is None and is_rank_zero():
            self._experiment = _AppendingWriter(self.log_dir, self._prepare)
        return super().experiment


class _AppendingWriter(ExperimentWriter):
    def __init__(self, log_dir: str, prepare: Callable[[Path], list[str]]) -> None:
        self._prepare = prepare
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Take over the file that Lightning would delete here."""
        path = Path(self.metrics_file_path)
        if path.exists():
            self.metrics_keys = self._prepare(path)
