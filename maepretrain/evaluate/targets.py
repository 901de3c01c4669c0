"""Targets beyond one class: several classes of an image at once, or numbers, from a table by sample
key. A shard's index holds one whole number only, which becomes the row in the table.

Axes: n samples, m rows of the table, k outputs.
"""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from maepretrain.data.samples import ShardIndex
from maepretrain.data.shards.index import Columns, Shard

Task = Literal["classes", "multilabel", "regression"]


class Targets(nn.Module):
    """Loss and figures of a multi-label or regression task; a batch's labels are rows of its table.

    Args:
        path: CSV without a header, a sample a line: its key, then its class numbers (multilabel;
            with none it is of no class) or its values (regression).
        task: "multilabel" or "regression".
        outputs: number of classes or values; default those of the table.

    Raises:
        ValueError: a file that cannot be read so, or a key that comes twice.
    """

    rows: Tensor

    def __init__(self, path: Path, task: Task, outputs: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.task = task
        with path.open(newline="") as file:
            lines = [line for line in csv.reader(file) if line]
        self.row = {line[0]: number for number, line in enumerate(lines)}
        if not lines or len(self.row) < len(lines):
            raise ValueError(
                f"targets {path}: {len(lines)} samples, {len(self.row)} different keys"
            )
        read_rows = _class_rows if task == "multilabel" else _value_rows
        try:
            rows = read_rows([line[1:] for line in lines], outputs)
        except ValueError as error:
            raise ValueError(f"targets {path}: {error}") from error
        self.register_buffer("rows", rows, persistent=False)
        # Of the values as they are in the file: value = mean + std * what is predicted.
        self.mean = [0.0] * rows.shape[1]
        self.std = [1.0] * rows.shape[1]

    @property
    def outputs(self) -> int:
        """Numbers to predict for each sample."""
        return self.rows.shape[1]

    def of(self, index: ShardIndex) -> "RowIndex":
        """The same samples, whose labels are rows of this table.

        Raises:
            ValueError: samples that the table does not have.
        """
        missing = [
            key
            for s in range(len(index.shards))
            for key in index.columns(s).keys
            if key not in self.row
        ]
        if missing:
            raise ValueError(
                f"targets {self.path}: {len(missing)} samples are missing, such as "
                + ", ".join(missing[:3])
            )
        return RowIndex(index.shards, self.row)

    def standardise(self, index: ShardIndex) -> None:
        """Standardise the values of a regression to mean 0 and variance 1 over these samples, for
        heads start at 0; `mean` and `std` lead back to the file's values."""
        if self.task == "regression":
            trained = self.rows[index.labels()]
            mean = trained.mean(0)
            std = trained.std(0)
            std = torch.where(std > 0, std, 1.0)
            self.rows.sub_(mean).div_(std)
            self.mean = mean.tolist()
            self.std = std.tolist()

    def loss(self, logits: Float[Tensor, "b k"], labels: Int64[Tensor, "b"]) -> Tensor:
        """Mean binary cross-entropy or squared error."""
        rows = self.rows[labels.to(self.rows.device)].to(logits.device)
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, rows)
        return F.mse_loss(logits, rows)

    def scores(self, logits: Float[Tensor, "n k"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
        """`mAP`, the mean over classes that occur of the average precision, or `r2`, the mean over
        values of the coefficient of determination (both scikit-learn's); `n`."""
        # Here, for scikit-learn would cost every pretraining half a second at its start.
        from sklearn.metrics import average_precision_score, r2_score

        predicted = logits.numpy()
        rows = self.rows.cpu()[labels].numpy()
        if self.task == "regression":
            return {"r2": float(r2_score(rows, predicted)), "n": len(rows)}
        occurs = rows.any(0)
        figure = cast(Any, average_precision_score(rows[:, occurs], predicted[:, occurs]))
        return {"mAP": float(figure), "n": len(rows)}


class RowIndex(ShardIndex):
    """A shard index whose labels are rows of a table of targets.

    A sample that takes the place of an unreadable one brings its own row along.
    """

    def __init__(self, shards: list[Shard], row: dict[str, int]) -> None:
        super().__init__(shards)
        self._row = row

    def columns(self, shard: int) -> Columns:
        """The columns of a shard, with rows for labels."""
        if shard in self._columns:
            return self._columns[shard]
        columns = super().columns(shard)
        rows = np.array([self._row[key] for key in columns.keys], dtype=np.int64)
        self._columns[shard] = replace(columns, label=rows)
        return self._columns[shard]


def _class_rows(lines: list[list[str]], outputs: int | None) -> Float[Tensor, "m k"]:
    numbers = [[int(word) for word in line if word] for line in lines]
    used = [number for line in numbers for number in line]
    count = outputs or max(used, default=-1) + 1
    if not used or not 0 <= min(used) <= max(used) < count:
        raise ValueError(f"class numbers must be in 0..{count - 1}, and one must occur")
    rows = torch.zeros(len(lines), count)
    for row, line in zip(rows, numbers, strict=True):
        row[line] = 1
    return rows


def _value_rows(lines: list[list[str]], outputs: int | None) -> Float[Tensor, "m k"]:
    count = outputs or len(lines[0])
    wrong = [line for line in lines if len(line) != count]
    if wrong or not count:
        raise ValueError(f"every sample needs {count or 'one or more'} values, one has {wrong[:1]}")
    rows = torch.tensor([[float(word) for word in line] for line in lines])
    if not rows.isfinite().all():
        raise ValueError("a value is not finite")
    return rows
