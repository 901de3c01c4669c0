"""The run folder: what a full disk, a damaged file and a second process leave behind."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from maepretrain.checkpoints.whole import WholeCheckpointIO
from maepretrain.runs import folder as runs
from maepretrain.runs.configuration import changes
from maepretrain.runs.folder import RunFolder
from maepretrain.runs.loggers import make_loggers

RESUME: Any = {"resume": True, "overwrite": False, "config": "seed: 0\n"}


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """A limit on the size of files fails like a full disk does: in the middle of the write."""
    path, io = tmp_path / "checkpoints" / "last.ckpt", WholeCheckpointIO()
    io.save_checkpoint({"global_step": 1, "weights": torch.zeros(10)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            io.save_checkpoint({"global_step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"half of it")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with (
        pytest.raises(ValueError, match=r"last\.ckpt cannot be read"),
        RunFolder(tmp_path, resume=True, overwrite=False, config="seed: 0\n"),
    ):
        pass
    # The folder is free again, and another checkpoint takes its place.
    torch.save({"global_step": 7}, tmp_path / "checkpoints" / "best.ckpt")
    with RunFolder(tmp_path, resume=True, overwrite=False, config="seed: 0\n") as folder:
        assert folder.resume_from == tmp_path / "checkpoints" / "best.ckpt"


def test_a_resume_takes_the_checkpoint_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in (("best", 3), ("last", 5), ("step=9", 9)):
        torch.save({"global_step": step}, folder / f"{name}.ckpt")
    chosen = {"auto": "last", "last": "last", "best": "best", str(folder / "last.ckpt"): "last"}
    for asked, name in chosen.items():
        with RunFolder(tmp_path, **RESUME, ckpt_path=asked) as run:
            assert run.resume_from == folder / f"{name}.ckpt", asked
    with (
        pytest.raises(ValueError, match="there is no elsewhere"),
        RunFolder(tmp_path, **RESUME, ckpt_path="elsewhere"),
    ):
        pass
    with pytest.raises(ValueError, match="add --resume"):
        RunFolder(tmp_path, resume=False, overwrite=False, config="seed: 0\n", ckpt_path="best")


def test_two_processes_do_not_write_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0)
    with RunFolder(tmp_path / "run", resume=False, overwrite=False, config="a: 1\n") as folder:
        folder.begin()
        (folder.path / "checkpoints").mkdir()
        with (
            pytest.raises(ValueError, match="another process is writing"),
            RunFolder(tmp_path / "run", resume=True, overwrite=False, config="a: 1\n"),
        ):
            pass
    with RunFolder(tmp_path / "run", resume=True, overwrite=False, config="a: 2\n") as folder:
        folder.begin()
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 2\n"


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_trace(
    tmp_path: Path, begun: bool
) -> None:
    with (
        pytest.raises(RuntimeError),
        RunFolder(tmp_path / "run", resume=False, overwrite=False, config="a: 1\n") as folder,
    ):
        if begun:
            folder.begin()
            folder.loggers()[0].log_metrics({"loss": 1.0}, 0)
        raise RuntimeError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(True, False), (False, True)])
def test_a_refused_run_changes_nothing(tmp_path: Path, resume: bool, overwrite: bool) -> None:
    """Whatever is found wrong before training starts, the run that is there stays as it is."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "metrics.csv").write_text("loss,step\n1,0\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with (
        pytest.raises(ValueError),
        RunFolder(tmp_path, resume=resume, overwrite=overwrite, config="a: 2\n"),
    ):
        raise ValueError
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    for name in ("config.yaml", "results.json", "notes.txt", "events.out.tfevents.1"):
        (tmp_path / name).write_text("old")
    (tmp_path / "status.json").write_text('{"state": "done", "starts": 3, "saved_step": 9}')
    (tmp_path / "pictures").mkdir()
    with RunFolder(tmp_path, resume=False, overwrite=True, config="new") as folder:
        folder.begin()
    left = {p.name: p.read_text() for p in tmp_path.iterdir() if p.name != ".lock"}
    status = json.loads(left.pop("status.json"))
    assert [start["after"] for start in json.loads(left.pop("starts.json"))] == [None]
    assert left == {"config.yaml": "new", "notes.txt": "old"}
    assert status.items() >= {"state": "running", "starts": 1}.items() and len(status) == 3


def test_half_a_row_does_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step\n0.5,0\n0.4,1\n0.3")
    logger, _ = make_loggers(tmp_path, step=2)
    logger.log_metrics({"loss": 0.3}, 2)
    assert (tmp_path / "metrics.csv").read_text().split()[1:] == ["0.5,0", "0.4,1", "0.3,2"]


def test_changes_name_every_value_that_differs() -> None:
    before = "optim: {base_lr: 1, betas: [1, 2]}\nresume: false\nseed: 0\n"
    now = "optim: {base_lr: 2, betas: [1, 3]}\nresume: true\nrun: a\nseed: 0\n"
    assert changes(before, now) == [
        "optim.base_lr: 1 -> 2",
        "optim.betas: [1, 2] -> [1, 3]",
        "run: None -> a",
    ]


def test_metrics_go_on_after_the_resumed_step(tmp_path: Path) -> None:
    first, _ = make_loggers(tmp_path, step=0)
    for step in range(4):
        first.log_metrics({"loss": float(step)}, step)
    second, _ = make_loggers(tmp_path, step=2)
    second.log_metrics({"loss": 20.0, "new": 1.0}, 2)
    rows = (tmp_path / "metrics.csv").read_text().split()
    assert rows == ["loss,new,step", "0.0,,0", "1.0,,1", "20.0,1.0,2"]


def test_names_of_an_older_version_are_no_changes() -> None:
    """A job that always resumes goes on with a run from before classes and options moved."""
    before = (
        "model:\n  class_path: maepretrain.models.mae.MaskedAutoencoder\n"
        "data:\n  max_faults: 0.001\n  scale: [0.2, 1.0]\n"
    )
    now = (
        "model:\n  class_path: maepretrain.models.mae.model.MaskedAutoencoder\n"
        "data:\n  max_errors: 0.001\n  crop:\n    scale: [0.2, 1.0]\n"
    )
    assert changes(before, now) == []
    assert changes(before, now.replace("0.001", "0.1")) == ["data.max_errors: 0.001 -> 0.1"]
