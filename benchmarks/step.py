"""The training step against its peers: forward, backward and AdamW of one and the same masked
autoencoder, with the same weights and the same masks.

One thread, fp32, CPU time, interleaved, medians. Losses are compared before anything is timed.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemm import SIZES, Rate
from benchmarks.peers import Official, Side, available, ours
from benchmarks.timing import Times, cpu_seconds, entry, positive, progress, ratio, table
from maepretrain.models.flops import flops
from maepretrain.models.mae.model import MaskedAutoencoder

OURS, BASE = "**maepretrain**", "official arrangement"
EQUAL = 1e-6  # relative difference of losses, fp32
# Ours over the official arrangement when all have fused AdamW, and over the best peer as it ships.
GOALS = (0.97, 0.92)


def differences(
    model: MaskedAutoencoder, sides: dict[str, Side], images: Tensor, noise: Tensor
) -> dict[str, float]:
    """Each side's loss against ours, relative; stable-pretraining's against the official
    arrangement without a class token in the decoder, which is what it computes."""
    with torch.no_grad():
        whole = ours(model).loss(images, noise).item()
        expected = dict.fromkeys(sides, whole)
        if "stable-pretraining" in sides:
            without = Official(model, decode_class_token=False)
            expected["stable-pretraining"] = without(images, noise).item()
        return {
            name: abs(side.loss(images, noise).item() / expected[name] - 1)
            for name, side in sides.items()
        }


class Step:
    """A side with its optimizer. AdamW runs fused or as a loop, by a flag."""

    def __init__(self, side: Side, images: Tensor, noise: Tensor) -> None:
        self.side, self.images, self.noise = side, images, noise
        trained = [p for p in side.module.parameters() if p.requires_grad]
        # One learning rate for all, so small that rounds do not change what is computed.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05)

    def compute(self) -> None:
        """Forward and backward."""
        self.side.loss(self.images, self.noise).backward()

    def update(self, fused: bool) -> None:
        """The optimizer's step, on gradients that stay."""
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self.optimizer.step()

    def clear(self) -> None:
        """Let the gradients go."""
        self.optimizer.zero_grad()


def measure(
    steps: dict[str, Step], rate: Callable[[], float], rounds: int
) -> tuple[dict[str, Times], float]:
    """CPU seconds of each side in each round: "compute", "fused" and "loop" (AdamW); and the median
    rate of products, which is measured in each round as well.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    names = list(steps)
    times: dict[str, Times] = {
        k: {name: [] for name in names} for k in ("compute", "fused", "loop")
    }
    rates = []
    for number in range(-1, rounds):  # the first round warms up
        first = number % len(names)
        for name in names[first:] + names[:first]:
            step = steps[name]
            seconds = {
                "compute": cpu_seconds(step.compute),
                "fused": cpu_seconds(lambda step=step: step.update(True)),
                "loop": cpu_seconds(lambda step=step: step.update(False)),
            }
            step.clear()
            for kind, value in seconds.items() if number >= 0 else ():
                times[kind][name].append(value)
        rates.append(rate())
        progress(f"round {number + 1} of {rounds}")
    return times, statistics.median(rates[1:])


def totals(times: dict[str, Times], steps: dict[str, Step], as_shipped: bool) -> Times:
    """Seconds of whole steps, with every AdamW fused or each as its own script runs it."""
    return {
        name: [
            a + b
            for a, b in zip(
                times["compute"][name],
                times["fused" if step.side.fused or not as_shipped else "loop"][name],
                strict=True,
            )
        ]
        for name, step in steps.items()
    }


def report(whole: Times, steps: dict[str, Step], lean: float, rate: float, as_shipped: bool) -> str:
    """A table, and whether the goal is met.

    Args:
        whole: seconds of each side's steps.
        steps: the sides.
        lean: FLOPs of a step that computes nothing in vain.
        rate: FLOPs per second of the machine's products.
        as_shipped: with AdamW as each side's own script runs it.
    """
    rows = []
    for name, seconds in whole.items():
        median = statistics.median(seconds)
        fused = not as_shipped or steps[name].side.fused
        cells = [name, "fused" if fused else "loop", f"{1000 * median:,.0f}"]
        cells += [f"{ratio(seconds, whole[BASE]):.3f}", f"{100 * lean / median / rate:.0f} %"]
        rows.append(cells)
    limit, base = lean / rate, statistics.median(whole[BASE])
    rows.append(
        ["limit: the products alone", "", f"{1000 * limit:,.0f}", f"{limit / base:.3f}", "100 %"]
    )
    titles = ("step", "AdamW", "CPU ms", "x official", "MFU")
    peers = [name for name in whole if name not in (OURS, BASE)]
    best = min(peers or [BASE], key=lambda name: statistics.median(whole[name]))
    to_best, to_base = ratio(whole[OURS], whole[best]), ratio(whole[OURS], whole[BASE])
    line = f"Ours over the official arrangement {to_base:.3f}, over the best peer ({best}) "
    if as_shipped:
        goal = f"Goal: at most {GOALS[1]:.2f} of the best peer"
        met = to_best <= GOALS[1]
    else:
        goal = f"Goal: at most {GOALS[0]:.2f} of the official arrangement, 1.00 of the best peer"
        met = to_base <= GOALS[0] and to_best <= 1
    return f"{table(titles, rows)}\n\n{line}{to_best:.3f}. {goal}: {'met' if met else 'missed'}."


def compare(name: str, sizes: dict[str, Any], batch: int, rounds: int) -> str:
    """Both tables of one size.

    Raises:
        ValueError: losses that are not equal.
    """
    torch.manual_seed(0)
    model = MaskedAutoencoder(**sizes)
    images = torch.randn(batch, model.channels, *model.encoder.patch_embed.img_size)
    noise = torch.rand(batch, model.grid[0] * model.grid[1])
    peers, missing = available(model)
    sides = {OURS: ours(model), **peers}
    found = differences(model, peers, images, noise)
    for peer, difference in found.items():
        if not difference <= EQUAL:
            raise ValueError(f"{name}: the loss of {peer} differs from ours by {difference:.1e}")
    position = torch.arange(batch)
    lean = batch * flops(model, {"input": images, "position": position}).training
    steps = {side: Step(sides[side], images, noise) for side in sides}
    times, rate = measure(steps, Rate(model, batch).measure, rounds)
    parts = [
        f"### {name}, batch {batch}",
        f"{lean / 1e9:.1f} GFLOP a step, products at {rate / 1e9:.1f} GFLOP/s. Losses differ from "
        f"ours by {', '.join(f'{d:.1e} ({peer})' for peer, d in found.items())}, relative.",
        "(i) every AdamW fused",
        report(totals(times, steps, False), steps, lean, rate, False),
        "(ii) AdamW as each side's own script runs it",
        report(totals(times, steps, True), steps, lean, rate, True),
        *(f"{peer} is left out: {reason}." for peer, reason in missing.items()),
    ]
    return "\n\n".join(parts)


def versions() -> str:
    """Of those that are installed."""
    found = []
    for package in ("timm", "transformers", "lightly", "stable-pretraining"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main(argv: list[str]) -> None:
    """Print two tables for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=9)
    names = [name for name, _, _ in SIZES]
    parser.add_argument("--sizes", nargs="+", choices=names, default=names)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        f"Medians of {arguments.rounds} rounds. {versions()}. MFU: FLOPs of our step, which "
        "computes nothing in vain, over time and over the rate of the machine's own products of "
        "these shapes, measured in the same rounds. stable-pretraining's decoder leaves the class "
        "token out and is so compared with the official arrangement without it; its eps of "
        "LayerNorm is set to the others'. Hugging Face's Trainer runs AdamW fused; the official "
        "script and the examples of lightly and stable-pretraining give no flag, which on the CPU "
        "is a loop over tensors.",
        flush=True,
    )
    for name, sizes, batch in SIZES:
        if name in arguments.sizes:
            progress(name)
            print("\n" + compare(name, sizes, batch, arguments.rounds), flush=True)
            gc.collect()


if __name__ == "__main__":
    entry(main)
