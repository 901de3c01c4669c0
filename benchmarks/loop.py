"""The whole training loop against the bare step on the same batches: what loader, Lightning,
callbacks and run folder take.

One process of one thread on JPEG shards; CPU time of the process and its loader workers. The ways
take turns, each for some steps in a round; start and end of a run are left out. The bare step
normalises, runs forward and backward, and steps fused AdamW.
"""

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.photographs import make_jpegs
from benchmarks.timing import entry, positive, progress, table, workers_seconds
from maepretrain.data.batch import Batch
from maepretrain.data.module import ShardData
from maepretrain.data.shards.sources import find_source
from maepretrain.data.shards.write import write_shards
from maepretrain.models.mae.model import MaskedAutoencoder
from maepretrain.training.optimizer import Optimization
from maepretrain.training.pretrain import Pretrain
from maepretrain.workflows.pretrain import pretrain

GOAL = 0.05
Way = Callable[[MaskedAutoencoder, int], object]


class Clock:
    """Notes CPU time where forward and backward begin and end, step by step.

    "outside" is what passes outside of both, workers included: optimizer, normalisation and all
    that is not the step. Next to whole steps it is small, so that it can be compared between runs
    that the machine's neighbours disturb.
    """

    def __init__(self, model: nn.Module) -> None:
        self.begins: list[float] = []  # of each forward
        self.workers: list[float] = []  # CPU time of the workers then
        self.outside: list[float] = []  # of each step
        self._ended = self._outside = 0.0
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins),
            model.register_forward_hook(self._forward_ends),
            # The last gradient that is ready ends the backward pass.
            *(p.register_post_accumulate_grad_hook(self._ends) for p in model.parameters()),
        ]

    def _forward_begins(self, *_: Any) -> None:
        now = time.process_time()
        self.outside.append(self._outside + now - self._ended)
        self.begins.append(now)
        self.workers.append(workers_seconds())

    def _forward_ends(self, _: nn.Module, given: Any, losses: Batch) -> None:
        self._ends()
        losses["loss"].register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self._outside = time.process_time() - self._ended

    def _ends(self, *_: Any) -> None:
        self._ended = time.process_time()

    def close(self) -> tuple[float, float, float]:
        """Mean seconds of a step, of what is outside, and of the workers' part of it; the first
        step, in which memory is taken and workers fill their queue, is left out."""
        for hook in self._hooks:
            hook.remove()
        # A worker is two batches ahead: in the last two steps it has no more to do.
        steps = len(self.begins) - 4
        workers = (self.workers[-3] - self.workers[1]) / steps
        step = (self.begins[-3] - self.begins[1]) / steps
        return step + workers, statistics.mean(self.outside[2:-2]) + workers, workers


def bare(data: ShardData, batches: Callable[[int], Iterable[Batch]]) -> Way:
    """A loop of nothing but the step, over batches that it is given."""

    def run(model: MaskedAutoencoder, steps: int) -> None:
        module = Pretrain(model, Optimization(), data, steps)
        groups = Optimization().groups([], model.parameters())
        optimizer = Optimization().make(groups, data.global_batch)
        for batch in batches(steps):
            images = module.normalise(batch["input"])
            model(batch | {"input": images})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def in_lightning(data: ShardData, held: list[Batch]) -> Way:
    """Lightning's loop and our LightningModule, without our callbacks, over batches from memory."""

    def run(model: MaskedAutoencoder, steps: int) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(cast(Any, held[:steps]), batch_size=None)
        trainer.fit(Pretrain(model, Optimization(), data, steps), loader)

    return run


def whole(data: ShardData, folder: Path) -> Way:
    """`maepretrain pretrain`, without held-out data."""

    def run(model: MaskedAutoencoder, steps: int) -> None:
        trainer: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": steps}
        pretrain(model, data, Optimization(), trainer, folder / "run", overwrite=True)

    return run


def loaded(data: ShardData) -> Callable[[int], Iterable[Batch]]:
    """Batches of our loader."""

    def batches(steps: int) -> Iterable[Batch]:
        data.plan(steps, 1, 1)
        return data.train_dataloader()

    return batches


def measure(
    ways: dict[str, Way], make: Callable[[], MaskedAutoencoder], steps: int, rounds: int
) -> dict[str, list[tuple[float, float, float]]]:
    """For each way and round (seconds of a step, of them outside, of them in workers).

    Raises:
        ValueError: fewer than one round, or than five steps.
    """
    if rounds < 1 or steps < 5:
        raise ValueError(f"rounds {rounds} must be at least 1, and steps {steps} at least 5")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            model = make()
            clock = Clock(model)
            with contextlib.redirect_stdout(sys.stderr):  # runs print what they do
                ways[name](model, steps)
            found[name].append(clock.close())
        progress(f"round {number + 1} of {rounds}")
    return found


def hottest(way: Way, model: MaskedAutoencoder, steps: int, lines: int = 40) -> str:
    """Python functions of a run by the time in them and below."""
    profile = cProfile.Profile()
    with contextlib.redirect_stdout(sys.stderr):
        profile.runcall(way, model, steps)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(lines)
    return text.getvalue()


def report(found: dict[str, list[tuple[float, float, float]]], base: str) -> str:
    """Milliseconds of the medians, and what each way takes over the bare step, as its share."""
    medians = {
        name: [1000 * statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    inside = medians[base][0]
    rows = []
    for name, (step, outside, workers) in medians.items():
        over = statistics.median(
            mine[0] / its[0] - 1 for mine, its in zip(found[name], found[base], strict=True)
        )
        more = (outside - medians[base][1]) / inside
        cells = [name, f"{step:,.0f}", f"{outside:.1f}", f"{workers:.1f}"]
        rows.append([*cells, f"{100 * more:+.2f} %", f"{100 * over:+.1f} %"])
    titles = (
        "loop",
        "CPU ms a step",
        "outside",
        "of it workers",
        "outside, over bare",
        "whole step",
    )
    return table(titles, rows)


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loop", description=__doc__)
    parser.add_argument("--encoder", default="vit_tiny_patch16_224")
    parser.add_argument("--decoder-width", type=positive, default=128)
    parser.add_argument("--decoder-depth", type=positive, default=4)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--images", type=positive, default=512, help="JPEGs that are made")
    parser.add_argument(
        "--steps", type=positive, default=12, help="of each way in a round, 5 or more"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--profile", action="store_true", help="Python functions outside the step")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    def make() -> MaskedAutoencoder:
        torch.manual_seed(0)
        width, depth = arguments.decoder_width, arguments.decoder_depth
        return MaskedAutoencoder(
            arguments.encoder, decoder_width=width, decoder_depth=depth, decoder_heads=4
        )

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        make_jpegs(folder / "jpeg", arguments.images)
        source = find_source(str(folder / "jpeg"), None, "train")
        with contextlib.redirect_stdout(sys.stderr):
            write_shards(source, folder / "shards", samples_per_shard=128)

        def data(workers: int) -> ShardData:
            shards = f"{folder}/shards/train-*.tar"
            return ShardData(shards, global_batch=arguments.batch, num_workers=workers)

        held = list(loaded(data(0))(arguments.steps))
        ways: dict[str, Way] = {
            "bare step, batches from memory": bare(data(0), lambda steps: held[:steps]),
            "bare step, our loader": bare(data(0), loaded(data(0))),
            "bare step, our loader, 1 worker": bare(data(0), loaded(data(1))),
            "Lightning, batches from memory": in_lightning(data(0), held),
            "**maepretrain pretrain**": whole(data(0), folder),
            "**maepretrain pretrain, 1 worker**": whole(data(1), folder),
        }
        if arguments.profile:
            print(f"```\n{hottest(ways['**maepretrain pretrain**'], make(), arguments.steps)}```")
            return
        found = measure(ways, make, arguments.steps, arguments.rounds)
    base = next(iter(ways))
    costs = [
        statistics.median(row[1] for row in found[name])
        - statistics.median(row[1] for row in found[base])
        for name in list(ways)[-2:]
    ]
    share = max(costs) / statistics.median(row[0] for row in found[base])
    print(
        f"{arguments.encoder}, decoder {arguments.decoder_width} x {arguments.decoder_depth}, "
        f"batch {arguments.batch} of 500 x 375 JPEGs, {arguments.rounds} rounds of "
        f'{arguments.steps} steps. "Outside" is what passes outside of forward and backward, '
        "workers included; of the bare step that is normalisation and AdamW. It is known well, "
        "whereas whole steps of different runs differ by the machine's noise.\n\n"
        f"{report(found, base)}\n\nLoader, Lightning, callbacks and run folder together take "
        f"{100 * share:.1f} % of the bare step. Goal: under {100 * GOAL:.0f} %: "
        f"{'met' if share < GOAL else 'missed'}."
    )


if __name__ == "__main__":
    entry(main)
