"""Pretraining through the command line: stop and go on, what a run folder keeps, what is
refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs import (
    SGD,
    TINY,
    assert_close_weights,
    assert_same_weights,
    column,
    cut_back,
    pretrain_tiny_model,
    weights,
)

Run = Callable[..., int]


TWO_EPOCHS = ["--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 1]
TWO_EPOCHS += ["--keep_every_steps", 1]


@pytest.fixture(scope="module")
def never_stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("never-stopped") / "run"
    assert pretrain_tiny_model(shards, run, *TWO_EPOCHS) == 0
    return run


@pytest.mark.parametrize("step", [4, 6, 11], ids=["mid-epoch", "at validation", "near an end"])
def test_resume_equals_never_stopped(
    tmp_path: Path, never_stopped: Path, pretrain_tiny: Run, step: int
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(never_stopped, cut)
    cut_back(cut, step)
    assert pretrain_tiny(cut, *TWO_EPOCHS, "--resume") == 0
    assert_same_weights(never_stopped, cut)
    for name in ("loss", "val_loss", "lr"):
        assert column(cut, name) == column(never_stopped, name)
    assert [step for step, _ in column(cut, "loss")] == list(range(12))


def test_resume_with_other_accumulation_goes_on_with_the_samples_that_were_due(
    tmp_path: Path, pretrain_tiny: Run
) -> None:
    """Same global batches: the losses agree to the order of summation."""
    length = ["--trainer.max_steps", 8, "--keep_every_steps", 1, *SGD]
    assert pretrain_tiny(tmp_path / "whole", *length) == 0
    assert pretrain_tiny(tmp_path / "cut", *length, "--trainer.accumulate_grad_batches", 3) == 0
    cut_back(tmp_path / "cut", 3)
    assert (
        pretrain_tiny(tmp_path / "cut", *length, "--trainer.accumulate_grad_batches", 2, "--resume")
        == 0
    )
    assert_close_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_can_be_made_longer(tmp_path: Path, pretrain_tiny: Run) -> None:
    flat = [
        "--optim.base_lr",
        0.0,
    ]  # the cosine knows the length, so equal steps need a flat schedule
    assert pretrain_tiny(tmp_path / "run", *flat, "--trainer.max_steps", 4) == 0
    assert pretrain_tiny(tmp_path / "run", *flat, "--trainer.max_steps", 9, "--resume") == 0
    assert pretrain_tiny(tmp_path / "whole", *flat, "--trainer.max_steps", 9) == 0
    assert column(tmp_path / "run", "loss") == column(tmp_path / "whole", "loss")


def test_live_probe_leaves_the_loss_curve_bit_equal(tmp_path: Path, pretrain_tiny: Run) -> None:
    length = ["--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 1]
    assert pretrain_tiny(tmp_path / "off", *length) == 0
    assert pretrain_tiny(tmp_path / "on", *length, "--live_probe", 100, "--pictures", 2) == 0
    assert column(tmp_path / "on", "loss") == column(tmp_path / "off", "loss")
    assert_same_weights(tmp_path / "on", tmp_path / "off")
    assert all(0.1 < value <= 1 for _, value in column(tmp_path / "on", "val_probe"))
    assert len(column(tmp_path / "on", "val_knn")) == 2
    pictures = sorted((tmp_path / "on" / "pictures").glob("*.png"))
    assert [p.name for p in pictures] == ["step-00000006.png", "step-00000012.png"]


def test_the_command_line_wins_over_a_checkpoint(
    tmp_path: Path, pretrain_tiny: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        pretrain_tiny(
            tmp_path, "--trainer.max_steps", 8, "--optim.base_lr", 1e-3, "--keep_every_steps", 4
        )
        == 0
    )
    cut_back(tmp_path, 4)
    assert (
        pretrain_tiny(tmp_path, "--trainer.max_steps", 8, "--optim.base_lr", 1e-2, "--resume") == 0
    )
    assert "optim.base_lr: 0.001 -> 0.01" in capsys.readouterr().out
    lrs = dict(column(tmp_path, "lr"))
    # Warm-up of 6 steps to base_lr * 24 / 256, then two steps of cosine.
    assert lrs[3] == pytest.approx(1e-3 * 24 / 256 * 3 / 6, rel=1e-5)
    assert lrs[5] == pytest.approx(1e-2 * 24 / 256 * 5 / 6, rel=1e-5)


def test_what_is_applied_is_printed(
    tmp_path: Path, pretrain_tiny: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_tiny(tmp_path / "r", "--trainer.max_epochs", 1, "--optim.base_lr", 2.56e-3) == 0
    out = capsys.readouterr().out
    for said in (
        "150 samples in 4 shards",
        "6 left out of each epoch",
        "batch         24 = 24 x 1 processes x 1 accumulated",
        "6 steps, 1 epochs of 6",
        "lr            0.00024 = base_lr 0.00256 x 24 / 256",
        "ratio 0.6: 6 of 16 patches visible",
        "weight decay 0.05",
        "precision     32-true",
    ):
        assert said in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--data.image_size", "[30, 28]"], "image size 30x28 must be divisible by patch size 4"),
        (
            ["--data.global_batch", 100, "--trainer.accumulate_grad_batches", 3],
            "batch 100 is not divisible by 1",
        ),
        (["--data.train", "nowhere/*.tar"], "no shard matches nowhere/*.tar"),
        (["--data.global_batch", 151], "global batch 151 is larger than the 150 samples"),
        (["--optim.base_lr", "fast"], "optim.base_lr"),
        (["--model.mask_ration", 0.5], "mask_ration"),
        (["--model.mask_ratio", 1.0], "leaves 0 of 16 patches visible"),
        (["-c", "mae/digit"], "no config file mae/digit"),
        (["--model.encoder", "resnet18"], "resnet18"),
        (["--trainer.max_epochs", "null"], "set trainer.max_epochs or max_steps"),
        (["--resume", "--overwrite"], "not both"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path,
    pretrain_tiny: Run,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    line: str,
) -> None:
    assert pretrain_tiny(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(
    tmp_path: Path, pretrain_tiny: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_tiny(tmp_path / "run", "--trainer.max_steps", 2) == 0
    before = weights(tmp_path / "run")
    assert pretrain_tiny(tmp_path / "run", "--trainer.max_steps", 2) == 2
    assert "--resume to go on with it, --overwrite to delete it" in capsys.readouterr().err
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run").items())
    assert pretrain_tiny(tmp_path / "run", "--trainer.max_steps", 3, "--overwrite") == 0
    assert [step for step, _ in column(tmp_path / "run", "loss")] == [0, 1, 2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("do not delete")
    assert pretrain_tiny(tmp_path / "other", "--overwrite") == 2
    assert (tmp_path / "other" / "thesis.tex").read_text() == "do not delete"


def test_another_order_of_samples_is_not_resumed(
    tmp_path: Path, pretrain_tiny: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_tiny(tmp_path, "--trainer.max_steps", 2) == 0
    assert (
        pretrain_tiny(tmp_path, "--trainer.max_steps", 4, "--data.global_batch", 16, "--resume")
        == 2
    )
    assert "global_batch was 24 and is 16" in capsys.readouterr().err


def test_mixed_precision_and_clipping_train(tmp_path: Path, pretrain_tiny: Run) -> None:
    options = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", 1.0]
    assert pretrain_tiny(tmp_path, *options, "--trainer.max_epochs", 10) == 0
    losses = [loss for _, loss in column(tmp_path, "loss")]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_a_step_and_goes_on(
    tmp_path: Path, shards: Path, pretrain_tiny: Run, number: signal.Signals
) -> None:
    """A real process with loader workers gets it in its whole group, as from a terminal."""
    length = ["--trainer.max_steps", "150", "--checkpoint_every_steps", "1000000"]
    command = [
        sys.executable,
        "-m",
        "maepretrain",
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
    ]
    command += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    command += ["--run", str(tmp_path / "cut"), "--data.num_workers", "2", *tiny_options(), *length]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "cut" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "with a checkpoint; go on with the same command and --resume" in out
    assert "Traceback" not in out
    stopped_at = torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)[
        "global_step"
    ]
    assert 0 < stopped_at < 150
    assert pretrain_tiny(tmp_path / "cut", *length, "--resume") == 0
    assert pretrain_tiny(tmp_path / "whole", *length) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert column(tmp_path / "cut", "loss") == column(tmp_path / "whole", "loss")


def tiny_options() -> list[str]:
    options = list(TINY)
    workers = options.index("--data.num_workers")
    return options[:workers] + options[workers + 2 :]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, shards: Path, pretrain_tiny: Run) -> None:
    """Real DDP on gloo: the same global batches, so the same losses up to the order of summation;
    then 2 -> 1 on a resume."""
    options = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    options += [*tiny_options(), *SGD, "--data.num_workers", "1", "--keep_every_steps", "1"]
    command = [
        sys.executable,
        "-m",
        "maepretrain",
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        *options,
    ]
    command += ["--run", str(tmp_path / "two"), "--trainer.max_steps", "9"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "24 = 12 x 2 processes" in done.stdout
    length = ["--trainer.max_steps", 9, *SGD]
    assert pretrain_tiny(tmp_path / "one", *length) == 0
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    cut_back(tmp_path / "two", 5)
    assert pretrain_tiny(tmp_path / "two", *length, "--resume") == 0
    assert_close_weights(tmp_path / "one", tmp_path / "two")


def test_the_norm_of_gradients_is_what_steps_tell(tmp_path: Path, pretrain_tiny: Run) -> None:
    """Of SGD without momentum or decay a step is lr times the gradient; clipping comes after."""
    sgd = [*SGD, "--optim.momentum", "1e-7", "--optim.weight_decay", 0, "--optim.warmup_epochs", 0]
    both = [*sgd, "--trainer.max_steps", 2, "--keep_every_steps", 1]
    both += ["--trainer.accumulate_grad_batches", 2]
    for name, more in (("free", []), ("clipped", ["--trainer.gradient_clip_val", 0.01])):
        assert pretrain_tiny(tmp_path / name, *both, *more) == 0
        steps = [
            torch.load(tmp_path / name / f"checkpoints/step={n}.ckpt", weights_only=True)
            for n in (1, 2)
        ]
        one, two = (step["state_dict"] for step in steps)
        moved = torch.stack([(two[key] - one[key]).norm() for key in one]).norm()
        told = float(moved) / column(tmp_path / name, "lr")[1][1]
        norms = [norm for _, norm in column(tmp_path / name, "grad_norm")]
        assert len(norms) == 2 and norms[1] > 0.05
        assert told == pytest.approx(norms[1] if name == "free" else 0.01, rel=1e-3)


def test_logging_leaves_the_weights_bit_equal(tmp_path: Path, pretrain_tiny: Run) -> None:
    for every in (1, 1000):
        options = ["--trainer.max_steps", 8, "--trainer.log_every_n_steps", every]
        assert pretrain_tiny(tmp_path / str(every), *options) == 0
    assert len(column(tmp_path / "1", "grad_norm")) == 8
    assert len(column(tmp_path / "1000", "grad_norm")) <= 1
    assert_same_weights(tmp_path / "1", tmp_path / "1000")
