"""The status of a run, without torch: RUN/status.json, RUN/starts.json and the verb `status`.

RUN/status.json alone says whether a run came to its end:

    state             running, preempted (SLURM took the nodes), stopped (by Ctrl-C), failed, done
    starts            how often the run was started; one more than its restarts
    steps             optimizer steps of the whole run
    steps_per_epoch   of them in an epoch
    global_batch      samples of a step
    saved_step        step of the last checkpoint, and `saved_at`, its time
    changed_at        of this file; times are seconds since 1970

A run that was killed still is "running"; how long its folder has been silent shows it.

RUN/starts.json has an object for each start:

    at                its time
    step              that it went on from
    after             the state that the start before left; "running" where it was killed
    command, folder   the command line, and its folder; no command where another program called
    host, job         machine of rank zero, number of the SLURM job
    applied           the lines that the run printed of itself
    versions          of Python, the packages, the system and the device
"""

import csv
import json
import os
import platform
import shlex
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from maepretrain.files import replacing

STATUS_NAME = "status.json"
STARTS_NAME = "starts.json"
PACKAGES = (
    "maepretrain",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "webdataset",
    "deepspeed",
    "transformers",
    "scikit-learn",
    "numpy",
)
# Columns of metrics.csv that are no figure of the model, or have a column of their own.
NO_FIGURES = frozenset(
    {
        "data_wait",
        "epoch",
        "grad_norm",
        "img_per_s",
        "lr",
        "memory_gb",
        "mfu",
        "skipped",
        "step",
    }
)


def read_status(run: Path) -> dict[str, Any]:
    """The values of RUN/status.json; empty where the run has not begun.

    Raises:
        ValueError: it is no status of a run.
    """
    path = run / STATUS_NAME
    if not path.exists():
        return {}
    try:
        status = json.loads(path.read_text())
        str(status["state"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no status of a run ({type(error).__name__})") from None
    return status


def write_status(run: Path, **changed: Any) -> None:
    """Change some values of RUN/status.json."""
    status = read_status(run) | changed | {"changed_at": time.time()}
    with replacing(run / STATUS_NAME) as file:
        file.write((json.dumps(status, indent=1) + "\n").encode())


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts in RUN/starts.json; empty where the run has not begun, or is older than the file.

    Raises:
        ValueError: it is no list of starts.
    """
    path = run / STARTS_NAME
    if not path.exists():
        return []
    try:
        starts = [dict(start) for start in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no list of starts ({type(error).__name__})") from None
    return starts


def write_start(run: Path, *, anew: bool, **about: Any) -> None:
    """Add a start to RUN/starts.json.

    Args:
        run: the run folder.
        anew: forget the starts of before.
        about: further values.
    """
    start: dict[str, Any] = {"at": time.time(), "folder": str(Path.cwd()), "host": platform.node()}
    if len(sys.argv) > 1:
        start["command"] = shlex.join(["maepretrain", *sys.argv[1:]])
    if "SLURM_JOB_ID" in os.environ:
        start["job"] = os.environ["SLURM_JOB_ID"]
    starts: list[dict[str, Any]] = []
    if not anew:
        with suppress(ValueError):  # a damaged list must not keep a run from going on
            starts = read_starts(run)
    with replacing(run / STARTS_NAME) as file:
        file.write(json.dumps([*starts, start | about], indent=1).encode() + b"\n")


def versions() -> dict[str, str]:
    """Versions of the packages that are installed and matter to a run."""
    installed: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def status(runs: list[Path], done: bool = False) -> int:
    """Print a row for each run.

    Args:
        runs: run folders.
        done: fail where a run has not come to its end, and say which.

    Returns:
        0, or with `done` 1 where a run has not come to its end.

    Raises:
        ValueError: a folder that holds no run.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = {str(run): describe(run) for run in runs}
    table = Table(box=box.SIMPLE, padding=0, collapse_padding=True)
    columns = list(next(iter(rows.values()), {}))
    for name in ("run", *columns):
        table.add_column(name, no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *row.values())
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # rich takes 80 columns for a log, and cuts
    console.print(table)
    unfinished = [
        f"{name} ({row['state']})" for name, row in rows.items() if row["state"] != "done"
    ]
    if not done or not unfinished:
        return 0
    print(f"not come to its end: {', '.join(unfinished)}")
    return 1


def describe(run: Path, now: float | None = None) -> dict[str, str]:
    """A run in words: state, step, epoch, img/s, ETA, restarts, last checkpoint, last metrics.

    Args:
        run: the run folder.
        now: seconds since 1970; default the present.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} holds no run: it has no config.yaml")
    now = time.time() if now is None else now
    saved = read_status(run)
    metrics = last_values(run / "metrics.csv")
    logged_steps = int(metrics["step"]) + 1 if "step" in metrics else 0
    step = max(logged_steps, int(saved.get("saved_step", 0)))
    steps = saved.get("steps", 0)
    state = saved.get("state", "not begun")
    rate = float(metrics.get("img_per_s", 0))
    row: dict[str, str] = dict.fromkeys(
        ("state", "step", "epoch", "img/s", "ETA", "restarts", "last checkpoint", "silent"), "-"
    )
    row["state"] = state
    row["step"] = f"{step:,}/{steps:,}" if steps else f"{step:,}"
    if "steps_per_epoch" in saved:
        row["epoch"] = f"{step / saved['steps_per_epoch']:.1f}"
    if rate:
        row["img/s"] = f"{rate:,.0f}"
    if rate and state == "running":
        row["ETA"] = duration((steps - step) * saved["global_batch"] / rate)
    if "starts" in saved:
        row["restarts"] = str(saved["starts"] - 1)
    if "saved_step" in saved:
        ago = duration(now - saved["saved_at"])
        row["last checkpoint"] = f"step {saved['saved_step']:,}, {ago} ago"
    if state == "running":
        row["silent"] = duration(now - _last_change(run))
    figures = {name: value for name, value in metrics.items() if name not in NO_FIGURES}
    row["last metrics"] = " ".join(f"{name} {float(v):.4g}" for name, v in figures.items())
    return row


def _last_change(run: Path) -> float:
    """The time of the last change of a run folder."""
    files = [run / name for name in (STATUS_NAME, "metrics.csv", "config.yaml")]
    return max(path.stat().st_mtime for path in files if path.exists())


def last_values(path: Path) -> dict[str, str]:
    """The last value of each column of metrics.csv."""
    values: dict[str, str] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                values |= {name: value for name, value in row.items() if name and value}
    return values


def duration(seconds: float) -> str:
    """A time for people: 42 s, 12 min, 3.5 h, 2.1 d."""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(0, seconds):.0f} s"
