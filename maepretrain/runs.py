"""The run folder: config.yaml, metrics.csv, TensorBoard events, checkpoints and pictures of one
run, and nothing of another.

RUN/config.yaml  metrics.csv  events.out.tfevents.*  checkpoints/{last,best,...}.ckpt  pictures/
"""

import csv
import fcntl
import shutil
from io import StringIO
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from maepretrain.distributed import is_rank_zero, say
from maepretrain.files import replacing

# What a run that failed before its first checkpoint may leave.
LEFT_BEHIND = {".lock", "metrics.csv", "hparams.yaml", "pictures"}


class RunFolder:
    """Claims a folder for one run; a context manager that holds a lock while the run writes.

    Args:
        path: the folder, made where it is missing.
        resume: go on with the run that it holds; `resume_from` is its last checkpoint, None where
            there is none yet.
        overwrite: delete the run that it holds.
        config: the run's configuration, written to config.yaml.

    Raises:
        ValueError: the folder holds another run, or a process that is still writing.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool, config: str) -> None:
        if resume and overwrite:
            raise ValueError("take either --resume or --overwrite, not both")
        self.path = path
        self._resume, self._overwrite, self._config = resume, overwrite, config
        self._lock: IO[str] | None = None
        self.resume_from: Path | None = None

    def __enter__(self) -> "RunFolder":
        # Other ranks come later, when rank zero has claimed the folder, and find its own files
        # there.
        if is_rank_zero():
            self._claim()
        last = self.path / "checkpoints" / "last.ckpt"
        self.resume_from = last if self._resume and last.exists() else None
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._lock is None:
            return
        if error is not None and not (self.path / "checkpoints").exists():
            self._leave()
        self._lock.close()

    def _leave(self) -> None:
        """A run that failed before its first checkpoint leaves a folder that the next try can
        take."""
        for name in ("config.yaml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _claim(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing into run folder {self.path}") from None
        saved = self.path / "config.yaml"
        if saved.exists():
            self._existing_run(saved)
        elif any(
            p.name not in LEFT_BEHIND and "tfevents" not in p.name for p in self.path.iterdir()
        ):
            raise ValueError(f"folder {self.path} is not empty and holds no run: take another one")
        with replacing(saved) as file:
            file.write(self._config.encode())

    def _existing_run(self, saved: Path) -> None:
        if self._overwrite:
            for name in ("config.yaml", "metrics.csv", "results.json"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("checkpoints", "pictures"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for events in self.path.glob("events.out.tfevents.*"):
                events.unlink()
        elif self._resume:
            for line in changes(saved.read_text(), self._config):
                say(f"resumed with  {line}")
        else:
            raise ValueError(
                f"run folder {self.path} holds a run already: add --resume to go on with "
                "it, --overwrite to "
                f"delete it, or take another --run"
            )

    def loggers(self) -> list[Logger]:
        """CSV (appends on a resume) and TensorBoard, both straight in the run folder."""
        step = None
        if self.resume_from is not None:
            # mmap: only the counter is wanted, not gigabytes of weights
            try:
                state = torch.load(
                    self.resume_from, map_location="cpu", weights_only=True, mmap=True
                )
                step = int(state["global_step"])
            except Exception as error:
                raise ValueError(
                    f"checkpoint {self.resume_from} cannot be read ({type(error).__name__}); put "
                    f"another one of {self.resume_from.parent} in its place"
                ) from error
        folder = str(self.path)
        return [
            AppendingCSVLogger(folder, keep_until=step),
            TensorBoardLogger(folder, name="", version="", purge_step=step),
        ]


def changes(before: str, now: str) -> list[str]:
    """`key: old -> new` for every value that differs between two YAML configurations."""
    old, new = (_flat(yaml.safe_load(text) or {}) for text in (before, now))
    ignored = {"resume", "overwrite"}
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ignored
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that take their name when they are whole, in the same folder.

    Lightning's own go through the system's temporary folder: where that is another disk, a full
    disk or a kill leaves half a file under the name of the last good checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save to a temporary name beside `path` and rename."""
        whole = Path(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        with replacing(whole) as file:
            torch.save(checkpoint, file)


class AppendingCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which deletes an existing metrics.csv, made to go on with it.

    Args:
        save_dir: the run folder; the file is `save_dir/metrics.csv`.
        keep_until: the step that is resumed. Rows written after it belong to steps that will run
            again and go.
    """

    def __init__(self, save_dir: str, keep_until: int | None) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._keep_until = keep_until

    @property
    def experiment(self) -> Any:
        if self._experiment is None and is_rank_zero():
            self._experiment = _AppendingWriter(self.log_dir, self._keep_until)
        return super().experiment


class _AppendingWriter(ExperimentWriter):
    def __init__(self, log_dir: str, keep_until: int | None) -> None:
        self._keep_until = keep_until
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if self._keep_until is None or not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            # A row carries the number of steps before its own.
            rows = [row for row in reader if int(row["step"]) < self._keep_until]
            self.metrics_keys = list(reader.fieldnames or [])
        text = StringIO()
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())
