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
from maepretrain.models.mae.model import MaskedAutoencoder

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
    """The linear layers of a step that computes nothing in vain (see maepretrain/models/mae): mask
    tokens have queries, keys and values of the first decoder block once a place, and its last block
    puts out masked patches alone."""
    n = model.grid[0] * model.grid[1]
    visible = model.masking.visible(model.grid)
    seen = batch * (model.prefix + visible)
    every = batch * (model.prefix + n)
    masked = batch * (n - visible)
    depth = len(model.decoder_blocks)
    pixels = model.channels * model.patch_size**2
    width = model.width
    decoder = model.decoder_embed.out_features
    first, last = model.decoder_blocks[0], model.decoder_blocks[-1]
    if depth < 2:
        raise ValueError("a decoder of one block is its first and its last: take two or more")
    return [
        Product("patch embedding", batch * visible, pixels, width, 1),
        *_of_block("encoder", model.encoder.blocks[0], seen, seen, model.depth),
        Product("decoder embedding", seen, width, decoder, 1),
        *_of_block("first decoder block's", first, seen + n, every, 1),
        *_of_block("decoder", first, every, every, depth - 2),
        Product("last decoder block's queries", masked, decoder, decoder, 1),
        Product("last decoder block's keys, values", every, decoder, 2 * decoder, 1),
        *_of_block("last decoder block's", last, 0, masked, 1),
        Product("prediction", masked, decoder, pixels, 1),
    ]


def _of_block(where: str, block: Any, computed: int, rows: int, times: int) -> list[Product]:
    """`computed` rows of queries, keys and values, `rows` of the rest."""
    layers = {"qkv": block.attn.qkv, "proj": block.attn.proj}
    layers |= {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    found = [
        Product(f"{where} {name}", computed if name == "qkv" else rows, *size, times)
        for name, size in sizes.items()
    ]
    return [product for product in found if product.rows and product.times]


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
