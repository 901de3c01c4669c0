"""Loggers of a run folder: metrics.csv that goes on after a resume."""

import csv
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from maepretrain.files import replacing
from maepretrain.ranks import is_rank_zero


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which deletes an existing metrics.csv, made to go on with it.

    Args:
        save_dir: the run folder; the file is `save_dir/metrics.csv`.
        keep_until: the step that is resumed. Rows written after it belong to steps that will run
            again and go.
    """

    def __init__(self, save_dir: str, keep_until: int) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._keep_until = keep_until

    @property
    def experiment(self) -> Any:
        if self._experiment is None and is_rank_zero():
            self._experiment = _AppendingWriter(self.log_dir, self._keep_until)
        return super().experiment


class _AppendingWriter(ExperimentWriter):
    def __init__(self, log_dir: str, keep_until: int) -> None:
        self._keep_until = keep_until
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            # A row carries the number of steps before its own.
            rows = [row for row in reader if self._survives(row["step"])]
            self.metrics_keys = list(reader.fieldnames or [])
        text = StringIO()
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())

    def _survives(self, step: str | None) -> bool:
        """Not a row of steps that will run again, nor half a row that a full disk left."""
        return step is not None and step.isdigit() and int(step) < self._keep_until
