"""Run folders read for a report: configuration, status, starts, metrics, results."""

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from maepretrain.data.errors import printable
from maepretrain.runs.results import read_results
from maepretrain.runs.status import read_starts, read_status

# Of a metric: (steps done, value), in the order of the file.
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Record:
    """The contents of a run folder.

    Args:
        path: the folder.
        name: of the run on the page.
        config: the resolved configuration.
        status: of status.json.
        starts: of starts.json.
        metrics: of metrics.csv, by column.
        results: of results.json.
    """

    path: Path
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: dict[str, Points]
    results: dict[str, Any]

    @property
    def applied(self) -> dict[str, str]:
        """Settings that the last start really applied."""
        return self.starts[-1].get("applied", {}) if self.starts else {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions that the last start found."""
        return self.starts[-1].get("versions", {}) if self.starts else {}

    @property
    def verb(self) -> str:
        """The verb that made the run."""
        return "finetune" if "encoder" in self.config else "pretrain"


def read_run(path: Path) -> Record:
    """Read a run folder; files that it lacks are empty.

    Raises:
        ValueError: it holds no run, or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} holds no run: it has no config.yaml")
    return Record(
        path=path,
        name=str(path),
        config=_read_config(path / "config.yaml"),
        status=read_status(path),
        starts=read_starts(path),
        metrics=read_metrics(path / "metrics.csv"),
        results=read_results(path / "results.json"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is no configuration") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration")
    return config


def read_metrics(path: Path) -> dict[str, Points]:
    """The columns of metrics.csv. Half a row, which a full disk left, is no row."""
    columns: dict[str, Points] = {}
    for row in read_rows(path):
        if not (row.get("step") or "").isdigit():
            continue
        for name, text in row.items():
            try:
                value = float(text or "")
            except (ValueError, TypeError):
                continue
            if name not in ("step", "epoch"):
                # A row carries the number of steps before its own.
                columns.setdefault(name, []).append((int(row["step"]) + 1, value))
    return columns


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="", errors="surrogateescape") as file:
        # What a row has beyond the head is under None.
        return [{k: v for k, v in row.items() if k} for row in csv.DictReader(file)]


def runs_below(paths: list[Path]) -> list[Path]:
    """Run folders; a folder of several seeds stands for its runs, and each is named once."""
    runs: list[Path] = []
    for path in paths:
        seeds = sorted(config.parent for config in path.glob("seed-*/config.yaml"))
        if seeds and not (path / "config.yaml").is_file():
            runs += seeds
        else:
            runs.append(path)
    return list(dict.fromkeys(runs))


def names_of(records: list[Record]) -> list[str]:
    """The names of runs as a page shows them."""
    return [printable(record.name) for record in records]


def utc(seconds: Any) -> str:
    """A time for people, empty where there is none."""
    if not isinstance(seconds, int | float):
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
