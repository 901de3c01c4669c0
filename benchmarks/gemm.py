"""The machine's own rate of matrix products, for the shapes of a training step: its upper limit.

One thread, fp32, into memory that is there already. Every linear layer's three products are timed:
forward, gradient of the input, gradient of the weight.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import cpu_seconds, entry, interleaved, positive, progress, table
from maepretrain.models.mae import MaskedAutoencoder

# (name, arguments of MaskedAutoencoder, batch)
SIZES: list[tuple[str, dict[str, Any], int]] = [
    ("ViT-S", {"encoder": "vit_small_patch16_224", "decoder_width": 256, "decoder_heads": 8}, 8),
    ("ViT-B", {"encoder": "vit_base_patch16_224"}, 4),
]


class Product(NamedTuple):
    """A linear layer on so many rows, and how often a step has it."""

    layer: str
    rows: int
    inputs: int
    outputs: int
    times: int

    @property
    def flops(self) -> int:
        """Of its three products, once."""
        return 3 * 2 * self.rows * self.inputs * self.outputs


def products(model: MaskedAutoencoder, batch: int) -> list[Product]:
    """The linear layers of a step that computes nothing in vain but for whole decoder blocks."""
    n = model.grid[0] * model.grid[1]
    seen, every = batch * (model.prefix + model.visible), batch * (model.prefix + n)
    found = []
    for where, rows, blocks in (
        ("encoder", seen, model.encoder.blocks),
        ("decoder", every, model.decoder_blocks),
    ):
        block: Any = next(iter(blocks))
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        for name, layer in zip(("qkv", "proj", "fc1", "fc2"), layers, strict=True):
            size = (layer.in_features, layer.out_features)
            found.append(Product(f"{where} {name}", rows, *size, len(list(blocks))))
    pixels, width = model.channels * model.patch_size**2, model.width
    decoder = model.decoder_embed.out_features
    return [
        Product("patch embedding", batch * model.visible, pixels, width, 1),
        *found,
        Product("decoder embedding", seen, width, decoder, 1),
        Product("prediction", batch * (n - model.visible), decoder, pixels, 1),
    ]


def runner(product: Product) -> Callable[[], None]:
    """A call of its three products."""
    x = torch.randn(product.rows, product.inputs)
    weight = torch.randn(product.outputs, product.inputs)
    gradient = torch.randn(product.rows, product.outputs)
    y, dx, dw = torch.empty_like(gradient), torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.T, out=y)
        torch.mm(gradient, weight, out=dx)
        torch.mm(gradient.T, x, out=dw)

    return run


class Rate:
    """FLOPs per second over all products of a step, each as often as the step has it."""

    def __init__(self, model: MaskedAutoencoder, batch: int) -> None:
        self.products = products(model, batch)
        self.runners = [runner(product) for product in self.products]
        for run in self.runners:
            run()

    def measure(self) -> float:
        """Once; each product alone, its time counted as often as the step has it."""
        seconds = sum(
            product.times * cpu_seconds(run)
            for product, run in zip(self.products, self.runners, strict=True)
        )
        return sum(product.times * product.flops for product in self.products) / seconds


def main(argv: list[str]) -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gemm", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=9)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, sizes, batch in SIZES:
        progress(name)
        found = products(MaskedAutoencoder(**sizes), batch)
        times = interleaved({p.layer: runner(p) for p in found}, arguments.rounds)
        median = {layer: statistics.median(seconds) for layer, seconds in times.items()}
        rows = [
            (
                p.layer,
                p.rows,
                p.inputs,
                p.outputs,
                p.times,
                f"{p.flops / median[p.layer] / 1e9:.1f}",
            )
            for p in found
        ]
        total = sum(p.times * p.flops for p in found)
        rate = total / sum(p.times * median[p.layer] for p in found)
        print(f"{name}, batch {batch}: **{rate / 1e9:.1f} GFLOP/s** over a step's products.\n")
        titles = ("layer", "rows", "inputs", "outputs", "in a step", "GFLOP/s")
        print(table(titles, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    entry(main)
