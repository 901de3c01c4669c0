"""The first seconds of a run: what it imports, and what it refuses before it reads anything."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from support.servers import FaultServer

# Beside what torch, torchvision, lightning, timm and jsonargparse[signatures] bring along.
OWN = {"maepretrain", "jaxtyping", "braceexpand", "docstring_parser", "attr", "attrs"}
IMPORTS = """
import json, sys
import torch, torchvision, lightning.pytorch, timm, jsonargparse
tops = lambda: {name.partition(".")[0] for name in sys.modules}
before = tops()
from maepretrain.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(tops() - before)]))
"""


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer()
    yield server
    server.close()


@pytest.mark.slow
def test_imports_are_what_torch_and_lightning_cost() -> None:
    # To the first look at the data, which is not there: all that a pretraining imports.
    words = [
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--run",
        "never",
        "--data.train",
        "none-*.tar",
    ]
    command = [sys.executable, "-c", IMPORTS, *words, "--data.val", "none-*.tar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "no shard matches" in done.stderr
    code, brought = json.loads(done.stdout.splitlines()[-1])
    assert code == 2
    assert set(brought) - set(sys.stdlib_module_names) == OWN


MISTAKES = [
    ("--model.mask_ratio 2", "mask_ratio 2.0 leaves"),
    ("--model.patch_size 5", "divisible by patch size 5"),
    ("--model.decoder_heads 5", "not divisible by 5 heads"),
    ("--data.image_size 18", "divisible by patch size 4"),
    ("--data.global_batch 0", "global batch 0"),
    ("--data.order.streams 3", "not divisible by 3 streams"),
    ("--data.max_errors 3", "max_errors 3.0"),
    (
        "--data.low_resolution.image_size 10 --data.low_resolution.epochs 1",
        "divisible by patch size 4",
    ),
    ("--optim.base_lr=-1", "base_lr -1.0"),
    ("--optim.betas [0.9,1.5]", "betas"),
    ("--optim.base_lrr 1", "base_lrr"),
    ("--trainer.max_epochs many", "trainer.max_epochs"),
    ("--checkpoint_every_steps 0", "checkpoint_every_steps 0"),
    ("--nonfinite 0", "nonfinite 0"),
    ("--resume --overwrite", "not both"),
]


@pytest.mark.parametrize(("mistake", "line"), MISTAKES)
def test_a_wrong_configuration_is_refused_before_anything_is_read(
    mistake: str,
    line: str,
    server: FaultServer,
    run_cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = ["--data.train", server.url("/a.tar"), "--data.val", server.url("/b.tar")]
    words = [
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--trainer.strategy",
        "ddp",
        "--run",
        "never",
        *shards,
    ]
    assert run_cli(*words, *mistake.split()) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert server.log == [] and not torch.distributed.is_initialized()


def test_without_a_mistake_the_shards_are_asked_for(
    server: FaultServer, run_cli: Callable[..., int]
) -> None:
    shards = ["--data.train", server.url("/a.tar"), "--data.val", server.url("/b.tar")]
    assert (
        run_cli(
            "pretrain", "-c", "data/digits", "-c", "recipe/mae_digits", "--run", "never", *shards
        )
        == 2
    )
    assert server.log
