"""The folder of a run's checkpoints: each takes its name when it is whole; a kill is mended
afterwards."""

import shutil
import time
from pathlib import Path


def partial_of(path: Path) -> Path:
    """The path of a checkpoint until it is whole."""
    return path.with_name(f".{path.name}.partial")


def take_name(partial: Path, path: Path) -> None:
    """Put a whole checkpoint, file or folder, in the place of another."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Mend a folder of checkpoints after a kill: half-written ones go, and one that was just being
    replaced takes its name again.

    Args:
        folder: of checkpoints; no process may be writing into it.
    """
    for partial in _half_written(folder):
        _remove(partial)
    for path, old in being_replaced(folder):
        if path.exists():
            _remove(old)
        else:
            old.rename(path)


def await_recovery(folder: Path, seconds: float = 60.0) -> None:
    """Wait until another process has mended a folder: until then checkpoints change their names.

    Args:
        folder: of checkpoints.
        seconds: after which no process is taken to be mending.
    """
    deadline = time.monotonic() + seconds
    while (_half_written(folder) or being_replaced(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _half_written(folder: Path) -> list[Path]:
    """The files and folders that a kill left of checkpoints that were being written."""
    return [*folder.glob(".*.partial"), *folder.glob("*.part")]


def being_replaced(folder: Path) -> list[tuple[Path, Path]]:
    """(name, path until then) of checkpoints that were just being replaced."""
    pairs: list[tuple[Path, Path]] = []
    for old in folder.glob(".*.old"):
        name = old.name.removeprefix(".").removesuffix(".old")
        pairs.append((folder / name, old))
    return pairs
