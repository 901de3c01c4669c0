"""What options of the masked autoencoder cost: time and FLOPs of a training step against the
default.

Each option takes turns with the default: one thread, CPU time, medians of the rounds' ratios. They
change what is learned, so that these rows are no like-for-like comparison.
"""

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import entry, interleaved, positive, progress, ratio, table
from maepretrain.models.flops import flops
from maepretrain.models.mae.model import MaskedAutoencoder

# (label, arguments of MaskedAutoencoder besides the default's). A line more is a row more.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("decoder depth 4", {"decoder_depth": 4}),
    ("decoder depth 2", {"decoder_depth": 2}),
    ("decoder width 256", {"decoder_width": 256}),
    ("mask ratio .85", {"mask_ratio": 0.85}),
    ("mask ratio .90", {"mask_ratio": 0.9}),
    ("mask ratio .90, decoder depth 2", {"mask_ratio": 0.9, "decoder_depth": 2}),
    ("160 pixels", {"image_size": 160}),
    ("128 pixels", {"image_size": 128}),
    ("cross-attention decoder", {"decoder": "cross"}),
    ("cross-attention, a third predicted", {"decoder": "cross", "reconstruct": 1 / 3}),
    (
        "cross-attention, a third predicted, depth 12",
        {"decoder": "cross", "reconstruct": 1 / 3, "decoder_depth": 12},
    ),
    ("two masks an image", {"masks_per_image": 2}),
    ("mask tokens in the encoder", {"mask_tokens_in_encoder": True}),
    ("activation checkpointing", {"activation_checkpointing": True}),
]


def stepper(
    model: MaskedAutoencoder, batch: int, autocast: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """A call of one training step with fused AdamW, on noise for images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    height, width = model.encoder.patch_embed.img_size
    images = torch.randn(batch, model.channels, height, width)
    given = {"input": images, "position": torch.arange(batch)}
    if compiled:
        model.compile()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(given)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cost(model: MaskedAutoencoder, batch: int) -> float:
    """FLOPs of a sample, what is recomputed included."""
    size = (batch, model.channels, *model.encoder.patch_embed.img_size)
    images = torch.empty(size, device="meta")
    found = flops(model, {"input": images, "position": torch.arange(batch)})
    return found.training + found.recomputed


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks options", description=__doc__)
    parser.add_argument("--encoder", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    default = MaskedAutoencoder(arguments.encoder)
    base, base_cost = stepper(default, arguments.batch), cost(default, arguments.batch)
    how: list[tuple[str, dict[str, Any], dict[str, bool]]] = [
        *((label, changes, {}) for label, changes in OPTIONS),
        ("bf16 autocast", {}, {"autocast": True}),
        *([("torch.compile", {}, {"compiled": True})] if arguments.compile else []),
    ]
    rows, of_base = [], []
    for label, changes, kind in how:
        progress(label)
        model = MaskedAutoencoder(arguments.encoder, **changes)
        run = stepper(model, arguments.batch, **kind)
        times = interleaved({"option": run, "default": base}, arguments.rounds)
        of_base += times["default"]
        share = cost(model, arguments.batch) / base_cost
        rows.append((label, f"{ratio(times['option'], times['default']):.2f}", f"{share:.2f}"))
        del model, run
        gc.collect()
    print(
        f"{arguments.encoder}, batch {arguments.batch}, {arguments.rounds} rounds. The default "
        f"step takes {1000 * statistics.median(of_base):,.0f} ms and "
        f"{arguments.batch * base_cost / 1e9:.1f} GFLOP.\n"
    )
    print(table(("option", "time", "FLOPs"), rows))
    if not arguments.compile:
        print("\ntorch.compile is left out: it compiles for minutes; `--compile` adds it.")


if __name__ == "__main__":
    entry(main)
