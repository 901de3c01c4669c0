"""A pretrained run that evaluations take their encoder from."""

import sys
from pathlib import Path

import pytest
from support.runs import TINY


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny pretraining."""
    from maepretrain.cli.main import main

    folder = tmp_path_factory.mktemp("probed") / "run"
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    argv = ["pretrain", "-c", "mae/digits", *data, "--run", str(folder), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["maepretrain"])
        assert main([*argv, "--trainer.max_steps", "6"]) == 0
    return folder
