"""`maepretrain quickstart`: real handwritten digits to shards, to a pretrained encoder, to the
numbers that say how good it is.

Everything goes through the same functions as the verbs `shards write`, `pretrain` and `probe`;
their details go to a log file.
"""

import csv
import shlex
import statistics
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maepretrain.data.shards.sources import Arrays
from maepretrain.data.shards.write import write_shards
from maepretrain.evaluate.frozen_features import PRETRAINED, ResultTable
from maepretrain.evaluate.probe import probe, probe_parser
from maepretrain.parsing.parser import make_parser, parse
from maepretrain.ranks import details_to, say_detail
from maepretrain.runs.tables import cell_text, print_columns
from maepretrain.workflows.pretrain import pretrain_command


def digits() -> tuple[Arrays, Arrays]:
    """The 1,797 handwritten digits that scikit-learn ships, uint8 8x8: 1,437 to train on, 360 held
    out, balanced by class."""
    data: Any = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    numbers = np.arange(len(images))
    train, test = train_test_split(numbers, test_size=360, random_state=0, stratify=data.target)
    return Arrays(images[train], data.target[train]), Arrays(images[test], data.target[test])


def quickstart(dst: Path = Path("quickstart"), epochs: int | None = None) -> int:
    """Pretrain a small masked autoencoder on handwritten digits and see that it learnt.

    No data, network or GPU needed.

    Args:
        dst: folder for shards and run; a run that is there already is overwritten.
        epochs: length of the pretraining; default as the config recipe/mae_digits says.
    """
    began = time.perf_counter()
    shards = dst / "shards"
    run = dst / "run"
    log = dst / "log.txt"
    dst.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    with details_to(log):
        _announce(1, f"writing 1,797 handwritten digits of 8 x 8 pixels as shards into {shards}")
        _write_shards(shards, log)
        _announce(2, "pretraining a small masked autoencoder: it draws the hidden parts of images")
        code = _pretrain(shards, run, epochs)
        if code:
            return code
        _announce(3, "testing the encoder by a linear probe and k-NN, beside three baselines")
        rows = _probe(run, log)
    _print_result(rows, run, (time.perf_counter() - began) / 60)
    _print_places(run, log)
    return 0


def _announce(stage: int, text: str) -> None:
    print(f"[{stage}/3] {text}", flush=True)
    say_detail(f"\n[{stage}/3] {text}")


def _write_shards(shards: Path, log: Path) -> None:
    train, test = digits()
    with log.open("a") as file, redirect_stdout(file):
        write_shards(train, shards, "train", samples_per_shard=500)
        write_shards(test, shards, "test", samples_per_shard=500)


def _pretrain(shards: Path, run: Path, epochs: int | None) -> int:
    options = ["-c", "data/digits", "-c", "recipe/mae_digits", "--run", str(run), "--overwrite"]
    options += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    if epochs:
        options += ["--trainer.max_epochs", str(epochs)]
    say_detail(shlex.join(["maepretrain", "pretrain", *options]))
    return pretrain_command(options)


def _probe(run: Path, log: Path) -> ResultTable:
    options = ["--encoder", str(run), "--baselines"]
    say_detail(shlex.join(["maepretrain", "probe", *options]))
    # Advice on the sweep's grids is for whoever tunes a probe; the bar is on standard error.
    with log.open("a") as file, redirect_stdout(file):
        return probe(**parse(probe_parser(make_parser("probe")), options))


def _print_result(rows: ResultTable, run: Path, minutes: float) -> None:
    """Print the table, the gain of the pretraining, and its time."""
    columns = {"top1": "linear probe", "knn": "k-NN", "n": "test images"}
    print_columns("features", columns, rows, cell_text)
    random = rows["random encoder"]
    probe_gain = 100 * (rows[PRETRAINED]["top1"] - random["top1"])
    knn_gain = 100 * (rows[PRETRAINED]["knn"] - random["knn"])
    metrics = read_metrics(run)
    speed = statistics.median(float(row["img_per_s"]) for row in metrics if row.get("img_per_s"))
    print(
        f"Pretraining gained {probe_gain:.1f} points of the linear probe and {knn_gain:.1f} of "
        "k-NN over the same\nencoder at random initial values "
        f"({minutes:.1f} minutes in all, {speed:.0f} img/s in training).\n"
    )


def _print_places(run: Path, log: Path) -> None:
    places = {
        "picture": max((run / "pictures").glob("step-*.png")),
        "checkpoint": run / "checkpoints" / "last.ckpt",
        "results": run / "results.json",
        "details": log,
    }
    for name, path in places.items():
        print(f"{name:<11} {path}")
    few_labels = "--label_fraction 0.035 --seeds 5"
    print(f"next        maepretrain probe --encoder {run} --baselines {few_labels}")
    print("            (the same table with five labels of each digit)")


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
