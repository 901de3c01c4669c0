"""`maepretrain quickstart`: real handwritten digits to shards, to a pretrained encoder, to the
numbers that say how good it is.

Everything goes through the same functions as the verbs `shards write`, `pretrain` and `probe`.
"""

import csv
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maepretrain.data.shards.write import Arrays, write_shards
from maepretrain.evaluate.probe import probe_command
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
    shards, run = dst / "shards", dst / "run"
    train, test = digits()
    write_shards(train, shards, "train", samples_per_shard=500)
    write_shards(test, shards, "test", samples_per_shard=500)
    command = [
        "pretrain",
        "-c",
        "data/digits",
        "-c",
        "recipe/mae_digits",
        "--run",
        str(run),
        "--overwrite",
    ]
    command += ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    command += ["--trainer.max_epochs", str(epochs)] if epochs else []
    print("\nmaepretrain " + shlex.join(command))
    code = pretrain_command(command[1:])
    if code:
        return code
    command = ["probe", "--encoder", str(run), "--baselines"]
    print("\nmaepretrain " + shlex.join(command))
    probe_command(command[1:])
    probed = json.loads((run / "results.json").read_text())["probe"]["rows"]
    gain = probed["pretrained"]["top1"] - probed["random encoder"]["top1"]
    rows = read_metrics(run)
    speed = [float(row["img_per_s"]) for row in rows if row.get("img_per_s")]
    losses = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    minutes = (time.perf_counter() - began) / 60
    print(
        f"held-out loss {losses[-1]:.4f}, {np.median(speed):.0f} img/s, {minutes:.1f} minutes "
        f"in all;\nthe linear probe gains {100 * gain:.1f} points over the same encoder at random "
        "initialisation"
    )
    picture = max((run / "pictures").glob("step-*.png"))
    for what, path in (
        ("shards", shards),
        ("run folder", run),
        ("metrics", run / "metrics.csv"),
        ("checkpoint", run / "checkpoints/last.ckpt"),
        ("picture", picture),
        ("figures", run / "results.json"),
        ("confusion", run / "pictures/probe-confusion.png"),
    ):
        print(f"{what:<11} {path}")
    print(f"next: maepretrain probe --encoder {run} --baselines --label_fraction 0.035 --seeds 5")
    return 0


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
