"""Stops at any moment, by Ctrl-C and by SLURM's signals: a checkpoint, the right exit code, and a
run that goes on as if it had never been stopped, its validations too."""

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recorder import Ranks, read_records
from support.recorder_runs import OPTIONS, write_pictures
from support.runs import by_step

from maepretrain.runs.folder import RunFolder
from maepretrain.training.preemption import listener
from maepretrain.training.stop_request import StopRequest

pytestmark = pytest.mark.slow

Run = Callable[..., int]
# 7 batches of validation after steps 3, 6 and 9.
RECIPE = [*OPTIONS, "--trainer.max_steps", "9", "--trainer.val_check_interval", "3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, "train", range(150), 43)
    write_pictures(folder, "test", range(1000, 1162), 200)
    return folder


def command(pictures: Path, run: Path, **how: object) -> list[object]:
    told = [word for key, value in how.items() for word in (f"--model.{key}", value)]
    data = ["--data.train", f"{pictures}/train-*.tar", "--data.val", f"{pictures}/test-*.tar"]
    model = ["--model", "support.signalled.Signalled", *told]
    return ["pretrain", *RECIPE, *data, "--data.num_workers", 0, *model, "--run", run]


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def assert_equal_runs(one: Path, two: Path) -> None:
    """Bit for bit: weights and every value of every step."""
    for name, value in checkpoint(one)["state_dict"].items():
        assert torch.equal(checkpoint(two)["state_dict"][name], value), name
    for name in ("loss", "val_loss", "lr"):
        assert by_step(one, name) == by_step(two, name)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The truth, never stopped."""
    from maepretrain.cli.main import main

    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([str(word) for word in command(pictures, run)]) == 0
    assert list(by_step(run, "val_loss")) == [2, 5, 8]
    assert state(run)["state"] == "done"
    return run


@pytest.mark.parametrize(
    ("at", "step", "due", "name", "slurm", "code", "word"),
    [
        ("train:2", 2, False, "SIGUSR1", True, 75, "preempted"),
        # A validation was due, and had not begun.
        ("train:3", 3, True, "SIGTERM", True, 75, "preempted"),
        ("validate:1", 3, True, "SIGUSR1", True, 75, "preempted"),
        ("validate:9", 6, True, "SIGTERM", True, 75, "preempted"),
        ("validate:9", 6, True, "SIGTERM", False, 130, "stopped"),
        ("validate:9", 6, True, "SIGINT", True, 130, "stopped"),
        ("validate:9", 6, True, "SIGINT", False, 130, "stopped"),
        # The last batch: nothing is left to cut off.
        ("validate:7", 4, False, "SIGUSR1", True, 75, "preempted"),
    ],
)
def test_a_stop_anywhere_equals_none(
    tmp_path: Path,
    pictures: Path,
    whole: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    step: int,
    due: bool,
    name: str,
    slurm: bool,
    code: int,
    word: str,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    run = tmp_path / "run"
    assert run_cli(*command(pictures, run, signal=name, at=at)) == code
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    saved = checkpoint(run)
    assert (saved["global_step"], saved["validation_is_due"]) == (step, due)
    assert (state(run)["state"], state(run)["saved_step"]) == (word, step)
    assert run_cli(*command(pictures, run), "--resume") == 0
    assert_equal_runs(run, whole)
    assert (state(run)["state"], state(run)["starts"], state(run)["steps"]) == ("done", 2, 9)


def test_the_last_validation_is_not_cut_off(
    tmp_path: Path, pictures: Path, whole: Path, run_cli: Run
) -> None:
    run = tmp_path / "run"
    assert run_cli(*command(pictures, run, signal="SIGTERM", at="validate:17")) == 0
    assert_equal_runs(run, whole)


def test_a_validation_that_is_cut_off_twice_runs_once(
    tmp_path: Path, pictures: Path, whole: Path, run_cli: Run
) -> None:
    run = tmp_path / "run"
    assert run_cli(*command(pictures, run, signal="SIGINT", at="validate:10")) == 130
    again = command(pictures, run, signal="SIGINT", at="validate:2")
    assert run_cli(*again, "--resume") == 130
    assert checkpoint(run)["validation_is_due"]
    assert run_cli(*command(pictures, run), "--resume") == 0
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("at", ["make", "train:1"])
def test_a_signal_before_the_first_step_is_heeded_after_it(
    tmp_path: Path,
    pictures: Path,
    whole: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    """Imports, shards and the process group take seconds; SLURM does not wait for them."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "run"
    assert run_cli(*command(pictures, run, signal="SIGUSR1", at=at)) == 75
    assert checkpoint(run)["global_step"] == 1
    assert run_cli(*command(pictures, run), "--resume") == 0
    assert not listener.received
    assert_equal_runs(run, whole)


def test_slurm_may_repeat_its_signals(
    tmp_path: Path, pictures: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preemption sends TERM at its beginning and at its end, the job script passes USR1 on."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    told = StopRequest._on_signal

    def thrice(last: Any, number: int, frame: Any) -> None:
        for _ in range(3):
            told(last, number, frame)
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN)

    monkeypatch.setattr(StopRequest, "_on_signal", thrice)
    assert run_cli(*command(pictures, tmp_path, signal="SIGTERM", at="train:2")) == 75


def test_checkpoints_by_the_clock(
    tmp_path: Path, pictures: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty steps of .1 s: a save each .25 s, and only at the end where the clock is slow."""
    saved: list[tuple[int, float]] = []
    mark = RunFolder.mark

    def noted(folder: Any, **changed: Any) -> None:
        if "saved_step" in changed:
            saved.append((changed["saved_step"], changed["saved_at"]))
        mark(folder, **changed)

    monkeypatch.setattr(RunFolder, "mark", noted)
    length = ["--trainer.max_steps", 30, "--trainer.val_check_interval", 30]
    options = [*length, "--checkpoint_every_minutes"]
    assert run_cli(*command(pictures, tmp_path / "a", pace=0.1), *options, 0.25 / 60) == 0
    assert saved[-1][0] == 30 and len(saved) > 4
    times = [at for _, at in saved[:-1]]
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.25
    saved.clear()
    assert run_cli(*command(pictures, tmp_path / "b"), *options, 10) == 0
    assert [step for step, _ in saved] == [30]
    assert run_cli(*command(pictures, tmp_path / "c"), *options, 0) == 2


@pytest.mark.parametrize("at", ["train:2", "validate:1", "validate:6"])
def test_one_rank_is_told_and_all_stop(
    tmp_path: Path, pictures: Path, whole: Path, at: str
) -> None:
    run = tmp_path / "run"
    told = command(pictures, run, signal="SIGTERM", at=at, rank=1)
    stopped = Ranks(tmp_path / "log-0", told, 2)
    assert stopped.wait() == [130, 0], stopped.output()
    assert checkpoint(run)["validation_is_due"] == at.startswith("validate")
    on = Ranks(tmp_path / "log-1", [*command(pictures, run), "--resume"], 2)
    assert on.wait() == [0, 0], on.output()
    assert not read_records(tmp_path / "log-1")
    for name in ("loss", "val_loss"):
        assert by_step(run, name) == pytest.approx(by_step(whole, name), abs=2e-6)


def test_a_folder_of_another_configuration_is_refused(
    tmp_path: Path, pictures: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_cli(*command(pictures, run), "--trainer.max_steps", 3) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = [*command(pictures, run), "--resume", "--same_config"]
    assert run_cli(*again, "--optim.base_lr", 2) == 2
    error = capsys.readouterr().err
    assert "belongs to another configuration: optim.base_lr: 1.0 -> 2.0;" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # Another length, place and pace are the same experiment.
    elsewhere = ["--trainer.max_steps", 6, "--data.num_workers", 1, "--threads", 1]
    assert run_cli(*again, *elsewhere, "--checkpoint_every_minutes", 3) == 0
    assert run_cli(*again, "--optim.base_lr", 2, "--same_config", "false") == 0
