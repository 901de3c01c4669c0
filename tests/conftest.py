"""Fixtures for all tests: small real shards, and small pretrainings through the command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# One thread: a second one makes small models slower, and bit-equal sums need a fixed number.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest

# Types and shapes of every call are checked. Not by jaxtyping's option for pytest: the processes of
# pytest-xdist do not get it. Torch and Lightning are imported in the fixtures, for its first
# process, which only hands out the tests, needs neither.
jaxtyping.install_import_hook("maepretrain", "beartype.beartype")


def pytest_runtest_teardown() -> None:
    """End the processes that a test, or a fixture that failed, left behind."""
    if "support.recorder" in sys.modules:
        sys.modules["support.recorder"].end_all()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits: 150 to train on in 4 uneven shards (train-*.tar), 50 held out (test-*.tar)."""
    from maepretrain.data.shards.sources import Arrays
    from maepretrain.data.shards.write import write_shards
    from maepretrain.workflows.quickstart import digits

    folder = tmp_path_factory.mktemp("shards")
    train, test = digits()
    write_shards(Arrays(train.images[:150], train.labels[:150]), folder, "train", 43)
    write_shards(Arrays(test.images[:50], test.labels[:50]), folder, "test", 43)
    return folder


@pytest.fixture
def run_cli() -> Callable[..., int]:
    """`maepretrain ...` in this process: importing torch and lightning anew costs ten seconds."""
    from support.runs import call_cli

    return call_cli


@pytest.fixture
def pretrain_tiny(shards: Path) -> Callable[..., int]:
    """`maepretrain pretrain` of recipe/mae_digits with a tiny model on the small shards; 6 steps an
    epoch."""
    from support.runs import pretrain_tiny_model

    return lambda run, *more: pretrain_tiny_model(shards, run, *more)


@pytest.fixture(scope="session")
def tiny_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 6 steps of that model. Tests read it; one that writes copies it first."""
    from support.runs import pretrain_tiny_model

    run = tmp_path_factory.mktemp("tiny") / "run"
    assert pretrain_tiny_model(shards, run, "--trainer.max_steps", 6) == 0
    return run


@pytest.fixture(scope="session")
def applied(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a few steps of a config on the small shards, of pixels in 0..1; made once for all
    tests."""
    from support.runs import call_cli

    from maepretrain.parsing.configs import config_words

    folder, made = tmp_path_factory.mktemp("applied"), {}

    def make(name: str, *more: object) -> Path:
        if (name, more) not in made:
            run = made[name, more] = folder / f"{len(made)}-{Path(name).name}"
            command = ["pretrain", *config_words(name), "--run", run, "--pictures", 0]
            command += ["--data.train", f"{shards}/train-*.tar"]
            command += ["--data.val", f"{shards}/test-*.tar"]
            command += ["--data.image_size", 8, "--data.global_batch", 30, "--data.crop.flip", 0]
            command += ["--data.mean", "[0.0]", "--data.std", "[1.0]", "--data.num_workers", 0]
            command += ["--optim.warmup_epochs", 0, "--optim.base_lr", "2e-2"]
            command += ["--trainer.max_steps", 15, "--trainer.check_val_every_n_epoch", 100]
            assert call_cli(*command, *more) == 0
        return made[name, more]

    return make
