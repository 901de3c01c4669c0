"""The names in a run folder."""

from pathlib import Path

# Lists of samples that were left out. They stay when a run fails before its first checkpoint: they
# may be the reason.
SAMPLE_LISTS = frozenset(
    {
        "errors.csv",
        "faults.csv",  # of older runs
        "nonfinite.csv",
    }
)
RUN_NAMES = SAMPLE_LISTS | {
    "config.yaml",
    "status.json",
    "starts.json",
    "metrics.csv",
    "hparams.yaml",
    "results.json",
    "checkpoints",
    "pictures",
}
LOCK_NAME = ".lock"


def is_of_a_run(path: Path) -> bool:
    """Return whether a run makes a file or folder of this name."""
    return path.name in RUN_NAMES or path.name.startswith("events.out.tfevents.")


def contents(folder: Path) -> list[Path]:
    """The files and folders in a folder, but for the lock."""
    return [path for path in folder.iterdir() if path.name != LOCK_NAME]
