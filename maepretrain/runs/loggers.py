"""Loggers of a run folder: metrics.csv that goes on after a resume, and TensorBoard events."""

import csv
from functools import partial
from io import StringIO
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from maepretrain.files import replacing
from maepretrain.lightning_internals import AppendingCSVLogger


def make_loggers(run: Path, step: int) -> list[Logger]:
    """Make the two loggers of a run, straight in its folder.

    Args:
        run: the run folder.
        step: optimizer steps that are done. What was logged of later ones goes: they run again.
    """
    return [
        AppendingCSVLogger(str(run), partial(drop_later_rows, step=step)),
        TensorBoardLogger(str(run), name="", version="", purge_step=step or None),
    ]


def drop_later_rows(path: Path, step: int) -> list[str]:
    """Drop the rows of metrics.csv from a step on, and return its columns.

    A row of a step carries the number of steps before it. Half a row, which a full disk left, goes
    too.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if _is_before(row["step"], step)]
        columns = list(reader.fieldnames or [])
    text = StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())
    return columns


def _is_before(row_step: str | None, step: int) -> bool:
    return row_step is not None and row_step.isdigit() and int(row_step) < step
