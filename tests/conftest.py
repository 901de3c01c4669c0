"""Shared by all tests: small real shards, and a small pretraining through the command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Two noisy cores: more threads than one make small models slower, and bit-equality needs a fixed
# number.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from support.runs import TINY

from maepretrain.data.shards.write import Arrays, write_shards
from maepretrain.workflows.quickstart import digits

torch.set_num_threads(1)


def pytest_runtest_teardown() -> None:
    """A hook, not a fixture: a fixture of a module that fails may leave ranks behind too."""
    if "support.recorder" in sys.modules:
        sys.modules["support.recorder"].end_all()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits: 150 to train on in 4 uneven shards (train-*.tar), 50 held out (test-*.tar)."""
    folder = tmp_path_factory.mktemp("shards")
    train, test = digits()
    write_shards(Arrays(train.images[:150], train.labels[:150]), folder, "train", 43)
    write_shards(Arrays(test.images[:50], test.labels[:50]), folder, "test", 43)
    return folder


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`maepretrain ...` in this process: importing torch and lightning anew costs ten seconds."""
    from maepretrain.cli.main import main

    monkeypatch.setattr(sys, "argv", ["maepretrain"])
    return lambda *argv: main([str(a) for a in argv])


@pytest.fixture(scope="session")
def applied(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a few steps of a config on the small shards, of pixels in 0..1; made once for all
    tests."""
    from maepretrain.cli.main import main

    folder, made = tmp_path_factory.mktemp("applied"), {}

    def make(name: str, *more: object) -> Path:
        if (name, more) not in made:
            run = made[name, more] = folder / f"{len(made)}-{Path(name).name}"
            command = ["pretrain", "-c", name, "--run", str(run), "--data.image_size", "8"]
            command += ["--data.train", f"{shards}/train-*.tar", "--data.val"]
            command += [f"{shards}/test-*.tar", "--data.global_batch", "30", "--data.flip", "0"]
            command += ["--data.num_workers", "0", "--trainer.max_steps", "15"]
            command += ["--optim.warmup_epochs", "0", "--optim.base_lr", "2e-2"]
            command += ["--data.mean", "[0.0]", "--data.std", "[1.0]"]
            command += ["--trainer.check_val_every_n_epoch", "100", *map(str, more)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["maepretrain"])
                assert main(command) == 0
        return made[name, more]

    return make


@pytest.fixture
def pretrain_tiny(shards: Path, run_cli: Callable[..., int]) -> Callable[..., int]:
    """`maepretrain pretrain -c mae/digits` with a tiny model on the small shards; 6 steps an
    epoch."""

    def pretrain(run: Path, *more: object) -> int:
        data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
        return run_cli("pretrain", "-c", "mae/digits", *data, "--run", run, *TINY, *more)

    return pretrain
