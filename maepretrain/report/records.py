"""What run folders say, read for people: configuration, status, starts, metrics, results."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maepretrain.data.errors import printable
from maepretrain.runs.results import read_results
from maepretrain.runs.status import read_starts, read_status


@dataclass(frozen=True)
class Record:
    """What a run folder says.

    Args:
        path: the folder.
        name: of the run on the page.
        config: the resolved configuration.
        status: of status.json.
        starts: of starts.json.
        metrics: of metrics.csv, by column: (steps done, value).
        results: of results.json.
    """

    path: Path
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: dict[str, list[tuple[int, float]]]
    results: dict[str, Any]

    @property
    def applied(self) -> dict[str, str]:
        """What the last start really applied."""
        return self.starts[-1].get("applied", {}) if self.starts else {}

    @property
    def versions(self) -> dict[str, str]:
        """Of the last start."""
        return self.starts[-1].get("versions", {}) if self.starts else {}

    @property
    def verb(self) -> str:
        """The verb that made it."""
        return "finetune" if "encoder" in self.config else "pretrain"


def read_run(path: Path) -> Record:
    """Read a run folder; files that it lacks are empty.

    Raises:
        ValueError: it holds no run, or a file of it is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} holds no run: it has no config.yaml")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text()) or {}
        assert isinstance(config, dict)
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError):
        raise ValueError(f"{path / 'config.yaml'} is no configuration") from None
    return Record(
        path,
        str(path),
        config,
        read_status(path),
        read_starts(path),
        read_metrics(path / "metrics.csv"),
        read_results(path / "results.json"),
    )


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of metrics.csv: (steps done, value), in the order of the file. Half a row, which
    a full disk left, is no row."""
    columns: dict[str, list[tuple[int, float]]] = {}
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


def expanded(paths: list[Path]) -> list[Path]:
    """A folder of several seeds stands for its runs."""
    found: list[Path] = []
    for path in paths:
        seeds = sorted(folder.parent for folder in path.glob("seed-*/config.yaml"))
        found += [path] if (path / "config.yaml").is_file() or not seeds else seeds
    return list(dict.fromkeys(found))


def plain(text: str, keep: str = "") -> str:
    """Text that any file can hold: bytes that are no UTF-8 and control characters are spelt."""
    return "".join(c if c in keep else printable(c) for c in text)
