"""The run folder: config.yaml, metrics.csv, TensorBoard events, checkpoints and pictures of one
run, and nothing of another.

RUN/config.yaml  status.json  starts.json  metrics.csv  events.out.tfevents.*  pictures/
    checkpoints/{last,best,...}.ckpt
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import Logger

from maepretrain.checkpoints.choose import choose
from maepretrain.checkpoints.folder import await_recovery, recover
from maepretrain.checkpoints.saved import read_meta
from maepretrain.files import replacing
from maepretrain.ranks import is_rank_zero, say
from maepretrain.runs.configuration import changes, changes_of_experiment
from maepretrain.runs.contents import LOCK_NAME, SAMPLE_LISTS, contents, is_of_a_run
from maepretrain.runs.environment import environment
from maepretrain.runs.loggers import make_loggers
from maepretrain.runs.status import read_status, write_start, write_status

# Seconds to wait for the lock: a killed run's loader processes may hold it until they notice.
LOCK_PATIENCE = 8


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
            long it is and where it runs may differ.

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
        if ckpt_path != "auto" and not resume:
            raise ValueError(f"ckpt_path {ckpt_path} is for a run that goes on: add --resume")
        self.path = path
        self.resume_from: Path | None = None
        self._resume = resume
        self._overwrite = overwrite
        self._config = config
        self._ckpt_path = ckpt_path
        self._same_config = same_config
        self._lock = FileLock(path / LOCK_NAME)
        # Of the run that is overwritten.
        self._old: list[Path] = []
        self._began = False
        self._ended = False

    def __enter__(self) -> "RunFolder":
        # Other ranks come later, when rank zero has claimed the folder, and see its own files.
        if is_rank_zero():
            self._claim()
        try:
            if self._resume:
                self.resume_from = self._choose_checkpoint()
        except ValueError:
            self._lock.release()
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._lock.is_locked:
            return
        if error is not None and not (self.path / "checkpoints").exists():
            self._restore_contents()
        elif error is not None and self._began and not self._ended:
            # The failure may be a full disk; another error must not replace it.
            with suppress(OSError, ValueError):
                # Lightning makes a SystemExit of a second Ctrl-C.
                is_stop = issubclass(error, KeyboardInterrupt | SystemExit)
                self.mark(state="stopped" if is_stop else "failed")
        self._lock.release()

    def _claim(self) -> None:
        """Lock the folder and look at its contents; nothing in it changes before `begin()`."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        before = contents(self.path)
        holds_run = (self.path / "config.yaml").exists()
        if not holds_run and not all(is_of_a_run(path) for path in before):
            raise ValueError(f"folder {self.path} is not empty and holds no run: take another one")
        self._take_lock()
        try:
            if holds_run:
                self._check_run()
        except ValueError:
            self._lock.release()
            raise
        if not self._resume:
            self._old = [path for path in before if is_of_a_run(path)]

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            raise ValueError(f"another process is writing into run folder {self.path}") from None

    def _check_run(self) -> None:
        """Refuse a folder that holds a run with which this one must not go on."""
        if not self._resume and not self._overwrite:
            raise ValueError(
                f"run folder {self.path} holds a run already: add --resume to go on with it, "
                "--overwrite to delete it, or take another --run"
            )
        if not self._resume or not self._same_config:
            return
        # A job that always resumes must not go on with another experiment's run by mistake.
        before = (self.path / "config.yaml").read_text()
        lines = changes_of_experiment(before, self._config)
        if lines:
            raise ValueError(
                f"run folder {self.path} belongs to another configuration: {'; '.join(lines)}; "
                "take another --run, or go on with what has changed by --same_config false"
            )

    def _choose_checkpoint(self) -> Path | None:
        folder = self.path / "checkpoints"
        if is_rank_zero():
            recover(folder)
        else:
            await_recovery(folder)
        return choose(folder, self._ckpt_path)

    def begin(self, step: int = 0, applied: dict[str, str] | None = None) -> None:
        """Begin training: delete the run that is overwritten, write down this one's configuration.

        All that can be refused has been by now, so a mistake costs nobody a run.

        Args:
            step: that training goes on from.
            applied: the lines that it printed of itself, by name.
        """
        if not is_rank_zero():
            return
        for path in self._old:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        before = self._write_config()
        write_start(
            self.path,
            anew=not self._resume,
            step=step,
            after=before.get("state"),
            applied=applied or {},
            versions=environment(),
        )
        self.mark(state="running", starts=before.get("starts", 0) + 1)
        self._began = True

    def _write_config(self) -> dict[str, Any]:
        """Write config.yaml, and print its changes; return the status of the start before."""
        saved = self.path / "config.yaml"
        if self._resume and saved.exists():
            for line in changes(saved.read_text(), self._config):
                say(f"resumed with  {line}")
        with replacing(saved) as file:
            file.write(self._config.encode())
        return read_status(self.path) if self._resume else {}

    def mark(self, **changed: Any) -> None:
        """Change some values of status.json, on rank zero."""
        self._ended = changed.get("state", "running") != "running"
        if is_rank_zero():
            write_status(self.path, **changed)

    def _restore_contents(self) -> None:
        """After a failure before the first checkpoint, delete the files that this run has made."""
        for path in list(self.path.iterdir()):
            is_ours = is_of_a_run(path) or path.name == LOCK_NAME
            is_new = self._began or path not in self._old
            if is_ours and is_new and path.is_file() and path.name not in SAMPLE_LISTS:
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
