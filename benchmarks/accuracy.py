"""Time to accuracy: CPU seconds of pretraining after which a linear probe reaches fixed levels, on
Fashion-MNIST and on scikit-learn's digits.

The same encoder, pretrained (a) by the official recipe, (b) as lightly's MAE example does, (c) as
maepretrain's shipped config does. Each budget of CPU seconds is a run of its own, whose schedule
ends with it; decoding counts. Then the encoder is judged by `maepretrain probe`. Between budgets
the time of a level is interpolated on a logarithmic axis. Takes hours; a run that is there is not
made again.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import lightly
from benchmarks.timing import entry, positive, table
from maepretrain.checkpoints.weights import OWN_KEY
from maepretrain.data.module import ShardData
from maepretrain.data.settings import Crop
from maepretrain.data.shards.sources import Source, find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.evaluate.linear_sweep import LinearSweep
from maepretrain.evaluate.neighbours import NeighbourSweep
from maepretrain.evaluate.probe import probe
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.workflows.compare import compare
from maepretrain.workflows.quickstart import digits

HERE = Path(__file__).parent
OFFICIAL, LIGHTLY, OURS = "official recipe", "lightly, its own settings", "**maepretrain**"
# The same small sweep for all sides: there are many encoders to judge.
SWEEP: dict[str, Any] = {"lrs": (0.1,), "penalties": (1.0, 10.0), "epochs": 5}
NEIGHBOURS: dict[str, Any] = {"ks": (20,), "choose_on": 100}
PROBE = [f"--sweep.{name}={json.dumps(value)}" for name, value in SWEEP.items()]
PROBE += [f"--neighbours.{name}={json.dumps(value)}" for name, value in NEIGHBOURS.items()]


class Task(NamedTuple):
    """A data set, the sizes of the encoder on it, budgets and levels.

    `lightly` has the sizes of its example, MAE's ViT-B/32 with a decoder of one block of 2/3 of its
    width, in proportion; images are normalised by `mean` and `std`.
    """

    config: str
    official: Path
    sizes: dict[str, Any]
    mean: float
    std: float
    budgets: tuple[float, ...]
    levels: tuple[float, ...]


FASHION = {"image_size": 28, "encoder_width": 128, "encoder_depth": 3, "decoder_width": 84}
DIGITS = {"image_size": 16, "encoder_width": 64, "encoder_depth": 4, "decoder_width": 44}
COMMON: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "patch_size": 4,
    "channels": 1,
    "encoder_heads": 4,
    "decoder_heads": 4,
    "decoder_depth": 1,
    "norm_pix": False,
}
TASKS = {
    "fashion_mnist": Task(
        "data/fashion_mnist+recipe/mae_small+overlay/quick",
        HERE / "recipes/official_fashion_mnist.yaml",
        COMMON | FASHION,
        0.286,
        0.353,
        (60, 120, 240),
        (0.78, 0.80, 0.82, 0.84, 0.86),
    ),
    "digits": Task(
        "data/digits+recipe/mae_digits",
        HERE / "recipes/official_digits.yaml",
        COMMON | DIGITS,
        0.305,
        0.376,
        (10, 20, 40),
        (0.85, 0.88, 0.90, 0.92, 0.94, 0.96),
    ),
}


def train_lightly(task: Task, shards: Path, seconds: float, out: Path) -> None:
    """lightly's MAE example: its modules, transform, AdamW of lr 1.5e-4 without a schedule, batches
    of 256, raw pixels as targets; on images in memory. The encoder goes to a file that `--encoder`
    takes.

    Args:
        task: sizes.
        shards: of the training images, which are read and decoded before the time begins.
        seconds: CPU time.
        out: the file.
    """
    transforms = import_module("lightly.transforms.mae_transform")
    torch.manual_seed(0)
    data = _data(task, shards)
    images = data.evaluation(data.index).__getitems__(list(range(len(data.index))))["input"]
    side = lightly(MaskedAutoencoder(**task.sizes))
    normalise: Any = {"mean": [task.mean] * 3, "std": [task.std] * 3}
    transform = transforms.MAETransform(input_size=task.sizes["image_size"], normalize=normalise)
    optimizer = torch.optim.AdamW(side.module.parameters(), lr=1.5e-4)
    n = (task.sizes["image_size"] // task.sizes["patch_size"]) ** 2
    batches = DataLoader(
        TensorDataset(images),
        batch_size=256,
        shuffle=True,
        drop_last=True,
        # Its transform makes three channels of gray images; the encoder has one.
        collate_fn=lambda rows: torch.stack(
            [transform(Image.fromarray(x[0].numpy()).convert("RGB"))[0][:1] for (x,) in rows]
        ),
    )
    began = time.process_time()
    while time.process_time() - began < seconds:
        for batch in batches:
            optimizer.zero_grad()
            side.loss(batch, torch.rand(len(batch), n)).backward()
            optimizer.step()
            if time.process_time() - began >= seconds:
                break
    model = MaskedAutoencoder(**task.sizes)
    backbone = cast(Any, side.module)[0].vit.state_dict()
    own = {k: backbone[k] for k in model.encoder.state_dict()}
    model.encoder.load_state_dict(own)
    save_file(model.state_dict(), out, {OWN_KEY: json.dumps(model.arguments)})


def judge(encoder: Path, task: Task, shards: Path) -> float:
    """Accuracy of the linear probe."""
    data = _data(task, shards)
    sweeps = LinearSweep(**SWEEP), NeighbourSweep(**NEIGHBOURS)
    rows = probe(str(encoder), data, *sweeps, encoder.parent)
    return rows["pretrained"]["top1"]


def _data(task: Task, shards: Path) -> ShardData:
    return ShardData(
        f"{shards}/train-*.tar",
        f"{shards}/test-*.tar",
        global_batch=1,
        image_size=task.sizes["image_size"],
        channels=1,
        crop=Crop(val_share=1.0),
        mean=(task.mean,),
        std=(task.std,),
        num_workers=0,
    )


def seconds_to(level: float, found: dict[float, float]) -> float | None:
    """CPU seconds at which a level is reached, log-linearly between budgets; None where it is not
    reached by the largest. What the smallest budget reaches, it reaches then."""
    budgets = sorted(found)
    for before, budget in zip([None, *budgets], budgets, strict=False):
        if found[budget] < level:
            continue
        if before is None:
            return budget
        share = (level - found[before]) / (found[budget] - found[before])
        return math.exp(math.log(before) + share * math.log(budget / before))
    return None


def measure(name: str, out: Path, factor: int) -> dict[str, dict[float, float]]:
    """Probe accuracy of each side by budget; official's and lightly's budgets go on to `factor`
    times ours.

    Args:
        name: of a task.
        out: folder of all runs and shards.
        factor: a power of two.
    """
    task, shards = TASKS[name], out / name / "shards"
    for split in ("train", "test"):
        write_shards(_images(name, split), shards, split)
    options = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    longer = [*task.budgets]
    while longer[-1] < factor * task.budgets[-1]:
        longer.append(2 * longer[-1])
    found: dict[str, dict[float, float]] = {OFFICIAL: {}, LIGHTLY: {}, OURS: {}}
    for budget in longer:
        folder = out / name / f"{budget:g}"
        configs = {OFFICIAL: str(task.official)}
        if budget in task.budgets:
            configs[OURS] = task.config
        for side, config in configs.items():
            rows = compare([config], folder, budget, None, 1, 0, None, options, PROBE)
            (row,) = rows.values()
            found[side][budget] = row["probe"]
        encoder = folder / "lightly" / "model.safetensors"
        kept = encoder.with_name("accuracy.json")
        if not kept.exists():
            encoder.parent.mkdir(parents=True, exist_ok=True)
            train_lightly(task, shards, budget, encoder)
            kept.write_text(json.dumps(judge(encoder, task, shards)))
        found[LIGHTLY][budget] = json.loads(kept.read_text())
    return found


def report(name: str, found: dict[str, dict[float, float]]) -> str:
    """Markdown: accuracy by budget, and seconds to each level with the ratio to ours."""
    budgets = sorted({budget for one in found.values() for budget in one})
    lines = [f"### {name}", "", "Linear probe after so many CPU seconds of pretraining", ""]
    accuracies = [
        [side, *(f"{one[b]:.3f}" if b in one else "" for b in budgets)]
        for side, one in found.items()
    ]
    lines.append(table(["", *(f"{b:g} s" for b in budgets)], accuracies))
    levels = TASKS[name].levels
    lines += ["", "CPU seconds until the linear probe reaches", ""]
    times = []
    ours = {x: seconds_to(x, found[OURS]) for x in levels}
    for side, one in found.items():
        cells = []
        for level in levels:
            needed, best = seconds_to(level, one), ours[level]
            if needed is None:
                cells.append(f"not in {max(one):g}")
            else:
                cells.append(f"{needed:.0f}" + (f" ({needed / best:.1f}x)" if best else ""))
        times.append([side, *cells])
    lines.append(table(["", *(f"{x:.2f}" for x in levels)], times))
    return "\n".join(lines)


def _images(name: str, split: str) -> Source:
    if name == "digits":
        return digits()[split == "test"]
    return find_source("/usr/share/datasets/fashion-mnist", None, split)


def main(argv: list[str]) -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/accuracy"), help="folder of all runs"
    )
    parser.add_argument(
        "--factor", type=positive, default=4, help="how much longer the others may take"
    )
    asked = parser.parse_args(argv)
    for name in asked.tasks:
        # What runs say on their way is not the table.
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(name, asked.out, asked.factor)
        print(report(name, found) + "\n")


if __name__ == "__main__":
    entry(main)
