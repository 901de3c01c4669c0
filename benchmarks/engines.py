"""Engines side by side: what each process holds, seconds of a step, of the start, of saving and of
resuming, and how two processes scale.

Each row is a real `maepretrain pretrain` on processes of one compute thread each, and a resume of
it. Two images a process; on CPU the numbers are fp32, and travel by gloo.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
# (strategy, processes)
ENGINES = [("ddp", 1), *((name, 2) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3"))]
STEPS, BATCH = 6, 2
NOTES = "ENGINES_NOTES"


def child(argv: list[str]) -> int:
    """`maepretrain`, with a note of every step, save and load; on each process."""
    import lightning as L
    from lightning.pytorch.trainer.connectors import checkpoint_connector

    from maepretrain.cli.main import main
    from maepretrain.strategies.sharded import ShardedStrategy, local_tensors
    from maepretrain.training.callbacks.throughput import Throughput

    def note(what: str, **values: float) -> None:
        with Path(os.environ[NOTES]).open("a") as file:
            file.write(json.dumps({"what": what, "at": time.time(), **values}) + "\n")

    def held(trainer: L.Trainer) -> dict[str, float]:
        strategy = cast(Any, trainer.strategy)
        weights = [t for p in trainer.lightning_module.parameters() for t in local_tensors(p)]
        optimizer = strategy if isinstance(strategy, ShardedStrategy) else None
        states = optimizer.optimizer_states() if optimizer else trainer.optimizers[0].state
        found = [local_tensors(v)[0] for state in states.values() for v in state.values()]
        return {"weights": _bytes(weights), "optimizer": _bytes(found)}

    save, stepped = L.Trainer.save_checkpoint, Throughput.on_train_batch_end

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        save(self, *args, **kwargs)
        note("save", seconds=time.perf_counter() - began, **held(self))

    connector = cast(Any, checkpoint_connector._CheckpointConnector)
    start = connector.resume_start, connector.resume_end

    def load_begins(self: Any, *args: Any, **kwargs: Any) -> None:
        self._noted = time.perf_counter()
        start[0](self, *args, **kwargs)

    def load_ends(self: Any) -> None:
        start[1](self)
        if self._ckpt_path:
            note("load", seconds=time.perf_counter() - self._noted)

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        stepped(self, *args, **kwargs)
        note("step")

    L.Trainer.save_checkpoint = saved
    connector.resume_start, connector.resume_end = load_begins, load_ends
    Throughput.on_train_batch_end = noted
    return main(argv)


def _bytes(tensors: list[Any]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def run(folder: Path, strategy: str, processes: int, argv: list[str]) -> list[dict[str, Any]]:
    """Notes of one run, in the order of time."""
    notes = folder / f"notes-{time.time()}"
    command = [
        sys.executable,
        __file__,
        "child",
        "pretrain",
        "-c",
        "data/imagenet",
        "-c",
        "recipe/mae_vit",
    ]
    if processes > 1 and strategy == "ddp":
        command += ["--trainer.strategy", "ddp"]
    elif processes > 1:
        command += ["-c", f"overlay/{strategy}"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes), *argv]
    command += ["--trainer.precision", "32-true", "--data.num_workers", "0"]
    command += ["--data.train", f"{folder}/shards/train-*.tar"]
    command += ["--data.global_batch", str(BATCH * processes), "--trainer.log_every_n_steps", "1"]
    began = time.time()
    environment = os.environ | {NOTES: str(notes), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    return sorted([{"what": "start", "at": began}, *found], key=lambda one: one["at"])


def measure(folder: Path, model: str, strategy: str, processes: int) -> dict[str, float]:
    """One row."""
    name = f"{model}-{strategy}-{processes}"
    argv = ["--model.encoder", model, "--run", str(folder / name)]
    first = run(folder, strategy, processes, [*argv, "--trainer.max_steps", str(STEPS)])
    again = run(
        folder, strategy, processes, [*argv, "--resume", "--trainer.max_steps", str(STEPS + 1)]
    )
    # Every process notes its steps; the last one to end a step ends it.
    steps = [one["at"] for one in first if one["what"] == "step"][processes - 1 :: processes]
    saves = [one for one in first if one["what"] == "save"]
    return {
        "weights": median(one["weights"] for one in saves) / 2**20,
        "optimizer": median(one["optimizer"] for one in saves) / 2**20,
        "step": median(b - a for a, b in pairwise(steps[1:])),
        "start": steps[0] - first[0]["at"],
        "save": max(one["seconds"] for one in saves),
        "load": max(one["seconds"] for one in again if one["what"] == "load"),
        "disk": sum(f.stat().st_size for f in _files(folder / name / "checkpoints")) / 2**20,
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def main(argv: list[str]) -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks engines", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm's names of ViTs")
    models = parser.parse_args(argv).models
    from PIL import Image

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        for i in range(64):
            pixels = np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)
            path = folder / "images" / "a" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        write = [sys.executable, "-m", "maepretrain", "shards", "write"]
        subprocess.run(
            [*write, folder / "images", folder / "shards"], check=True, stdout=sys.stderr
        )
        for model in models:
            print(f"\n{model}, decoder 512 x 8, {BATCH} images a process\n")
            titles = ("engine", "processes", "weights MiB", "optimizer MiB", "s/step", "scaling")
            titles = (*titles, "start s", "save s", "load s", "checkpoint MiB")
            print("| " + " | ".join(titles) + " |")
            print("|---" * len(titles) + "|")
            alone = 0.0
            for strategy, processes in ENGINES:
                row = measure(folder, model, strategy, processes)
                alone = row["step"] if processes == 1 else alone
                cells = [re.sub("ddp", "ddp" if processes > 1 else "none", strategy), processes]
                cells += [f"{row['weights']:.0f}", f"{row['optimizer']:.0f}", f"{row['step']:.2f}"]
                cells += [f"{alone / row['step']:.2f}", f"{row['start']:.0f}"]
                cells += [f"{row['save']:.1f}", f"{row['load']:.1f}", f"{row['disk']:.0f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.argv = [sys.argv[0], *sys.argv[1:]]
        sys.exit(child(sys.argv[2:]))
    main(sys.argv[1:])
