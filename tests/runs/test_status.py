"""`maepretrain status`: what it says of a run folder, and that it needs no torch for it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from maepretrain.runs.status import (
    describe,
    duration,
    last_values,
    read_starts,
    read_status,
    write_start,
    write_status,
)

Run = Callable[..., int]


def make_run(folder: Path, **status: object) -> Path:
    """50 of 200 steps at 400 img/s; a validation after step 40."""
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.csv").write_text(
        "step,loss,val_loss,img_per_s,lr\n39,.5,,400,.1\n39,,.75,,\n49,.25,,,.1\n"
    )
    about = {"state": "running", "starts": 3, "steps": 200, "steps_per_epoch": 20}
    about |= {"global_batch": 128, "saved_step": 48, "saved_at": 1000.0}
    (folder / "status.json").write_text(json.dumps(about | status))
    return folder


def test_what_is_said_of_a_run(tmp_path: Path) -> None:
    said = describe(make_run(tmp_path / "run"), now=1000.0 + 600)
    said.pop("silent")
    assert said == {
        "state": "running",
        "step": "50/200",
        "epoch": "2.5",
        "img/s": "400",
        "ETA": "48 s",  # 150 steps of 128 images at 400 a second
        "restarts": "2",
        "last checkpoint": "step 48, 10 min ago",
        "last metrics": "loss 0.25 val_loss 0.75",
    }
    done = describe(make_run(tmp_path / "done", state="done", saved_step=200), now=1e9)
    assert (done["step"], done["ETA"], done["silent"]) == ("200/200", "-", "-")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert (describe(tmp_path)["state"], describe(tmp_path)["step"]) == ("not begun", "0")
    assert last_values(tmp_path / "metrics.csv") == {}
    with pytest.raises(ValueError, match="holds no run"):
        describe(tmp_path / "nowhere")
    (tmp_path / "status.json").write_text("[")
    with pytest.raises(ValueError, match=r"status\.json is no status"):
        read_status(tmp_path)


def test_values_are_changed_one_by_one(tmp_path: Path) -> None:
    write_status(tmp_path, state="running", starts=1)
    write_status(tmp_path, state="done")
    status = read_status(tmp_path)
    assert status.pop("changed_at") > 1e9
    assert status == {"state": "done", "starts": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_starts_are_added_until_the_run_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_starts(tmp_path) == []
    monkeypatch.setattr(sys, "argv", ["maepretrain", "pretrain", "--run", "my run"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_start(tmp_path, anew=False, step=0, after=None)
    monkeypatch.setattr(sys, "argv", ["maepretrain"])
    monkeypatch.delenv("SLURM_JOB_ID")
    write_start(tmp_path, anew=False, step=48, after="running")
    first, second = read_starts(tmp_path)
    assert first["command"] == "maepretrain pretrain --run 'my run'" and first["job"] == "17"
    assert (second["step"], second["after"], second["folder"]) == (48, "running", str(Path.cwd()))
    assert not {"command", "job"} & second.keys() and second["at"] >= first["at"] > 1e9
    write_start(tmp_path, anew=True, step=0)
    assert len(read_starts(tmp_path)) == 1
    (tmp_path / "starts.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"starts\.json is no list of starts"):
        read_starts(tmp_path)
    write_start(tmp_path, anew=False, step=50)
    assert [start["step"] for start in read_starts(tmp_path)] == [50]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1.0, "0 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (7199.0, "120 min"),
        (7200.0, "2.0 h"),
        (2e5, "2.3 d"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_table_of_runs_and_the_gate(
    tmp_path: Path, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", state="done")
    assert run_cli("status", one, two) == 0
    out = capsys.readouterr().out
    assert "last checkpoint" in out and str(one) in out and "val_loss 0.75" in out
    assert run_cli("status", two, "--done") == 0
    assert run_cli("status", one, two, "--done") == 1
    assert f"not come to its end: {one} (running)" in capsys.readouterr().out


def test_a_login_node_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from maepretrain.cli.main import main; "
        f"assert main(['status', {str(make_run(tmp_path / 'run'))!r}]) == 0; "
        "print('HEAVY', {'torch', 'lightning', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert "50/200" in done.stdout and "HEAVY set()" in done.stdout
