"""The run folder: config.yaml, metrics.csv, TensorBoard events, checkpoints and pictures of one
run, and nothing of another.

RUN/config.yaml  status.json  starts.json  metrics.csv  events.out.tfevents.*  pictures/
    checkpoints/{last,best,...}.ckpt
"""

import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import Logger

from maepretrain.checkpoints.choose import choose
from maepretrain.checkpoints.folder import await_recovery, recover
from maepretrain.checkpoints.saved import read_meta
from maepretrain.files import replacing
from maepretrain.ranks import is_rank_zero, say
from maepretrain.runs.configuration import changes
from maepretrain.runs.loggers import make_loggers
from maepretrain.runs.status import read_status, versions, write_start, write_status

# Seconds to wait for the lock: a killed run's loader processes may hold it until they notice.
LOCK_PATIENCE = 8
# What may differ where a resume is asked for the same configuration: how long the run is, where it
# runs, and what it keeps.
ELSEWHERE = (
    *("threads:", "compile:", "allow_reorder:", "live_probe:", "pictures:"),
    *("checkpoint_every", "keep_every", "run:", "data.num_workers:", "data.cache"),
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy"),
    *("trainer.accumulate_grad_batches", "trainer.max_", "trainer.log_every", "trainer.profiler"),
)
# They stay when a run fails before its first checkpoint: they may be the reason.
LISTS = ("errors.csv", "faults.csv", "nonfinite.csv")  # older runs have faults.csv
NAMES = {
    *("config.yaml", "status.json", "starts.json", "metrics.csv", "hparams.yaml", "results.json"),
    *LISTS,
    *("checkpoints", "pictures"),
}


def _of_a_run(path: Path) -> bool:
    """Whether a run makes something of this name."""
    return path.name in NAMES or path.name.startswith("events.out.tfevents.")


class RunFolder:
    """Claims a folder for one run; a context manager that holds a lock while the run writes.

    Args:
        path: the folder, made where it is missing.
        resume: go on with the run that it holds; `resume_from` is its last checkpoint, None where
            there is none yet.
        overwrite: delete the run that it holds.
        config: the run's configuration, written to config.yaml.
        ckpt_path: which checkpoint a resume takes: "last", "best", a path, or "auto", which is
            last or, where that cannot be read, the one of most steps.
        same_config: a resume refuses a run that computes something else than `config` does; how
            long it is and where it runs may differ (ELSEWHERE).

    Raises:
        ValueError: the folder holds another run, or a process that is still writing; a checkpoint
            that is not there or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume: bool,
        overwrite: bool,
        config: str,
        ckpt_path: str = "auto",
        same_config: bool = False,
    ) -> None:
        if resume and overwrite:
            raise ValueError("take either --resume or --overwrite, not both")
        self.path = path
        if ckpt_path != "auto" and not resume:
            raise ValueError(f"ckpt_path {ckpt_path} is for a run that goes on: add --resume")
        self._resume, self._overwrite, self._config = resume, overwrite, config
        self._ckpt_path, self._same_config = ckpt_path, same_config
        self._lock = FileLock(path / ".lock")
        self._old: list[Path] = []
        self._began = self._ended = False
        self.resume_from: Path | None = None

    def __enter__(self) -> "RunFolder":
        # Other ranks come later, when rank zero has claimed the folder, and find its own files.
        if is_rank_zero():
            self._claim()
        folder = self.path / "checkpoints"
        try:
            if self._resume:
                (recover if is_rank_zero() else await_recovery)(folder)
            self.resume_from = choose(folder, self._ckpt_path) if self._resume else None
        except ValueError:
            self._lock.release()
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._lock.is_locked:
            return
        if error is not None and not (self.path / "checkpoints").exists():
            self._leave()
        elif error is not None and self._began and not self._ended:
            # A full disk may be the failure, and must not hide it.
            with suppress(OSError, ValueError):
                # Lightning makes a SystemExit of a second Ctrl-C.
                at_once = issubclass(error, KeyboardInterrupt | SystemExit)
                self.mark(state="stopped" if at_once else "failed")
        self._lock.release()

    def _claim(self) -> None:
        """Lock the folder and look at what it holds; nothing in it changes before `begin()`."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        saved = self.path / "config.yaml"
        before = [path for path in self.path.iterdir() if path.name != ".lock"]
        if not saved.exists() and not all(_of_a_run(path) for path in before):
            raise ValueError(f"folder {self.path} is not empty and holds no run: take another one")
        self._take_lock()
        if saved.exists() and not (self._resume or self._overwrite):
            self._lock.release()
            raise ValueError(
                f"run folder {self.path} holds a run already: add --resume to go on with it, "
                "--overwrite to delete it, or take another --run"
            )
        if saved.exists() and self._resume and self._same_config:
            self._refuse_another(saved.read_text())
        self._old = [path for path in before if _of_a_run(path)] if not self._resume else []

    def _refuse_another(self, before: str) -> None:
        """A job that always resumes must not go on with another experiment's run by mistake."""
        differs = [line for line in changes(before, self._config) if not line.startswith(ELSEWHERE)]
        if differs:
            self._lock.release()
            raise ValueError(
                f"run folder {self.path} belongs to another configuration: {'; '.join(differs)}; "
                "take another --run, or go on with what has changed by --same_config false"
            )

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            raise ValueError(f"another process is writing into run folder {self.path}") from None

    def begin(self, step: int = 0, applied: dict[str, str] | None = None) -> None:
        """Training starts: delete the run that is overwritten, write down this one's configuration.

        What can be refused has been by now, so a mistake costs nobody a run.

        Args:
            step: that training goes on from.
            applied: what it printed of itself, by name.
        """
        if not is_rank_zero():
            return
        for path in self._old:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        saved = self.path / "config.yaml"
        if self._resume and saved.exists():
            for line in changes(saved.read_text(), self._config):
                say(f"resumed with  {line}")
        with replacing(saved) as file:
            file.write(self._config.encode())
        before = read_status(self.path) if self._resume else {}
        about = {"step": step, "after": before.get("state"), "applied": applied or {}}
        write_start(self.path, not self._resume, **about, versions=environment())
        self.mark(state="running", starts=before.get("starts", 0) + 1)
        self._began = True

    def mark(self, **changed: Any) -> None:
        """Change some values of status.json, on rank zero."""
        self._ended = changed.get("state", "running") != "running"
        if is_rank_zero():
            write_status(self.path, **changed)

    def _leave(self) -> None:
        """A run that failed before its first checkpoint leaves what was there before it."""
        known = [path for path in self.path.iterdir() if _of_a_run(path) or path.name == ".lock"]
        for path in known:
            written = self._began or path not in self._old
            if written and path.is_file() and path.name not in LISTS:
                path.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def state(self) -> dict[str, Any] | None:
        """The checkpoint that the run goes on from, None at its start.

        Raises:
            ValueError: a file that is no checkpoint.
        """
        if self.resume_from is None:
            return None
        return read_meta(self.resume_from)

    def loggers(self) -> list[Logger]:
        """CSV (appends on a resume) and TensorBoard, both straight in the run folder."""
        state = self.state()
        return make_loggers(self.path, step=0 if state is None else int(state["global_step"]))


def environment() -> dict[str, str]:
    """Versions of what computes here, and the device."""
    found = {"python": platform.python_version()} | versions() | {"system": platform.platform()}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    return found
