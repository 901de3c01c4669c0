"""Seconds until something happens: the help, a configuration's mistake, the first training step.

Wall-clock time of whole processes, files in the page cache, beside what importing torch,
torchvision, Lightning and timm alone takes, which is the limit.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import entry, positive, progress, table
from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.workflows.quickstart import digits

IMPORTS = "import torch, torchvision, lightning.pytorch, timm, jsonargparse"


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """What is timed, and the exit code that it must end with."""
    python = [sys.executable]
    words = [
        *python,
        "-m",
        "maepretrain",
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--overwrite",
    ]
    words += ["--data.train", f"{folder}/train-*.tar", "--data.val", f"{folder}/test-*.tar"]
    words += ["--run", str(folder / "run"), "--trainer.max_steps", "1"]
    return {
        "import torch, torchvision, lightning, timm, jsonargparse": ([*python, "-c", IMPORTS], 0),
        "`maepretrain --help`": ([*python, "-m", "maepretrain", "--help"], 0),
        "a mistake in the configuration is told": ([*words, "--model.mask_ratio", "2"], 2),
        "a run of one step, from its command to its end": (words, 0),
        "the same, two processes": (
            [
                *words,
                "--trainer.strategy",
                "ddp",
                "--trainer.devices",
                "2",
                "--trainer.max_steps",
                "1",
            ],
            0,
        ),
    }


def seconds(command: list[str], code: int) -> float:
    """Of a process.

    Raises:
        ValueError: it ended with another code.
    """
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - began


def main(argv: list[str]) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="processes of each")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results
            for name, images in zip(("train", "test"), digits(), strict=True):
                write_shards(Arrays(images.images, images.labels), folder, name)
        times: dict[str, list[float]] = {name: [] for name in commands(folder)}
        for number in range(asked.rounds + 1):
            for name, (command, code) in commands(folder).items():
                times[name].append(seconds(command, code))
            progress(f"round {number} of {asked.rounds}")  # the first reads files from the disk
    rows = [[name, f"{statistics.median(found[1:]):.1f}"] for name, found in times.items()]
    print(f"Medians of {asked.rounds} rounds.\n")
    print(table(["from the start of the process until", "seconds"], rows))


if __name__ == "__main__":
    entry(main)
