"""Learnt image compression beside JPEG and WebP: rate and distortion on photographs held out.

    python examples/compression.py [--out compression] [--epochs N] [--docs docs]

Photographs of scikit-image and scikit-learn, which come with their packages: four in colour and
four in gray to train on, three to measure on; no photograph is in both. Three models of
recipe/compression for three rates, and one of recipe/compression_residual, which has all rates.
All sizes are those of whole files, headers too. Draws compression.png and writes the table
compression.md.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from maepretrain.compression.autoencoder import Compression
from maepretrain.compression.codec import Codec, psnr
from maepretrain.data.shards.sources import ImageFolder
from maepretrain.data.shards.write import write_shards
from maepretrain.parsing.configs import config_words
from maepretrain.workflows.pretrain import pretrain_command

TRAIN = ("astronaut", "rocket", "china", "flower")
TRAIN_GRAY = ("camera", "brick", "grass", "gravel")
HELD_OUT = ("chelsea", "coffee", "motorcycle")
# Side of the pieces that training crops, and the distance from one to the next.
TILE = 96
STEP = 48
WEIGHTS = (30, 100, 300)
QUALITIES = (5, 10, 20, 30, 50, 70, 85)
Pixels = UInt8[np.ndarray, "h w 3"]


class Point(NamedTuple):
    """Means over the held-out photographs."""

    bpp: float
    psnr: float
    ms_ssim: float


def photograph(name: str) -> Pixels:
    """One of the packages' photographs in RGB."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        return load_sample_image(f"{name}.jpg")
    if name == "motorcycle":  # the left one of two views
        return skimage.data.stereo_motorcycle()[0]
    image = getattr(skimage.data, name)()
    return np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image[..., :3]


def write(out: Path, names: dict[str, tuple[str, ...]]) -> None:
    """Shards of overlapping pieces of the photographs of each split."""
    for split, chosen in names.items():
        folder = out / "tiles" / split
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            image = photograph(name)
            h, w, _ = image.shape
            for i in range(0, h - TILE + 1, STEP):
                for j in range(0, w - TILE + 1, STEP):
                    tile = Image.fromarray(image[i : i + TILE, j : j + TILE])
                    tile.save(folder / f"{name}-{i:04d}-{j:04d}.png")
        write_shards(ImageFolder(folder), out / "shards", split)


def train(out: Path, config: str, run: Path, epochs: int | None, *more: str) -> None:
    """Train one run, unless the folder holds it already."""
    if (run / "checkpoints/last.ckpt").exists():
        print(f"{run} is there already")
        return
    shards = out / "shards"
    data = ["--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/test-*.tar"]
    command = [*config_words(config), "--run", str(run), *data, *more]
    if epochs is not None:
        command += ["--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", "1"]
    if pretrain_command(command):
        raise SystemExit("stopped")


def ms_ssim(a: Pixels, b: Pixels) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003), torchmetrics'."""
    # In float32: double takes twelve times as long, and differs in the sixth digit.
    x = to_tensor(a)[None].float() / 255
    y = to_tensor(b)[None].float() / 255
    similarity = multiscale_structural_similarity_index_measure(x, y, data_range=1.0)
    return float(cast(Tensor, similarity))


def to_tensor(image: Pixels) -> UInt8[Tensor, "3 h w"]:
    """Channels first."""
    return torch.from_numpy(image.copy()).movedim(2, 0)


def measure(images: list[Pixels], through: Callable[[Pixels], tuple[int, Pixels]]) -> Point:
    """Mean rate and distortion; `through` gives the size in bytes and the decoded image."""
    rows = []
    for image in images:
        size, decoded = through(image)
        bpp = 8 * size / image[..., 0].size
        ratio = psnr(to_tensor(image), to_tensor(decoded))
        rows.append((bpp, ratio, ms_ssim(image, decoded)))
    return Point(*np.mean(rows, 0).tolist())


def through_pillow(image: Pixels, kind: str, quality: int) -> tuple[int, Pixels]:
    """Pillow's JPEG or WebP, each with its encoder's full effort."""
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "JPEG" else {"method": 6}
    Image.fromarray(image).save(buffer, kind, quality=quality, **options)
    return len(buffer.getvalue()), np.asarray(Image.open(buffer).convert("RGB"))


def through_codec(image: Pixels, codec: Codec, iterations: int | None = None) -> tuple[int, Pixels]:
    """A file of a run's own, on disk and back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.mae"
        path.write_bytes(codec.encode(to_tensor(image), iterations).data)
        decoded = codec.pixels(codec.decode(path.read_bytes()))
        return path.stat().st_size, decoded.movedim(0, 2).numpy()


@torch.no_grad()
def steps_of_refinement(images: list[Pixels], codec: Codec) -> list[float]:
    """Mean PSNR of the plain decoder and after each step, from the same bits."""
    rows = []
    for image in images:
        pixels = to_tensor(image)
        h, w = image.shape[:2]
        model = cast(Compression, codec.model)
        decoded = model.steps(model.symbols(codec.normalise(pixels[None])))
        rows.append([psnr(pixels, codec.pixels(x[0, :, :h, :w])) for x in decoded])
    return np.mean(rows, 0).tolist()


def lead(point: Point, curve: list[Point]) -> float:
    """PSNR above a curve at the point's rate, in dB, on straight lines over the logarithm of the
    rate; NaN where the curve has no such rate."""
    rates = np.log([p.bpp for p in curve])
    other = np.interp(np.log(point.bpp), rates, [p.psnr for p in curve], np.nan, np.nan)
    return point.psnr - float(other)


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Two diagrams: PSNR and MS-SSIM over bits per pixel."""
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    names = {"psnr": "PSNR in dB", "ms_ssim": "MS-SSIM"}
    for ax, (measured, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for label, points in curves.items():
            style = "--" if label in ("JPEG", "WebP") else "-"
            rates = [point.bpp for point in points]
            values = [getattr(point, measured) for point in points]
            ax.plot(rates, values, style, marker="o", markersize=4, label=label)
        ax.set(xlabel="bits per pixel", ylabel=name, xscale="log")
        ticks = [0.1, 0.2, 0.5, 1, 2]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


INTRODUCTION = """\
# Learnt image compression beside JPEG and WebP

`python examples/compression.py`: means over {held_out}, which no model was trained on, of whole
files, written and read back. The models learnt from {train}: 820 steps of 16 crops for
each weight, 492 for the residual coder, minutes of one CPU core. Published coders take a million
steps, and lead JPEG; at this scale JPEG and WebP lead by far.

`maepretrain codec` and this example need `pip install 'maepretrain[compression]'`.

![Rate and distortion](compression.png)

"""
REFINEMENT = """
## Iterative decoding

PSNR of the same bits: after the plain decoder, and after each step of refinement.

"""


def table(curves: dict[str, list[Point]]) -> str:
    """Markdown: one row a point, with its lead over JPEG."""
    lines = ["| coder | bits per pixel | PSNR, dB | MS-SSIM | to JPEG at that rate, dB |"]
    lines.append("|---|---|---|---|---|")
    for name, points in curves.items():
        for p in points:
            gap = "" if name == "JPEG" else lead_in_words(p, curves["JPEG"])
            lines.append(f"| {name} | {p.bpp:.3f} | {p.psnr:.2f} | {p.ms_ssim:.4f} | {gap} |")
    return "\n".join(lines)


def lead_in_words(point: Point, curve: list[Point]) -> str:
    """The lead in dB, for a table."""
    gap = lead(point, curve)
    return "out of its range" if np.isnan(gap) else f"{gap:+.2f}"


def main(argv: list[str] | None = None) -> int:
    """Train and measure; 0 when all trainings came to their end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("compression"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, help="folder of the picture and table; default --out")
    parser.add_argument("--epochs", type=int, help="default: those of the configs")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = options.out
    docs = options.docs or out
    write(out, {"train": TRAIN + TRAIN_GRAY, "test": HELD_OUT})
    runs = {weight: out / f"weight-{weight}" for weight in WEIGHTS}
    for weight, run in runs.items():
        train(
            out,
            "data/photographs+recipe/compression",
            run,
            options.epochs,
            "--model.weight",
            str(weight),
        )
    train(out, "data/photographs+recipe/compression_residual", out / "residual", options.epochs)
    report([photograph(name) for name in HELD_OUT], list(runs.values()), out / "residual", docs)
    return 0


def report(images: list[Pixels], runs: list[Path], residual: Path, docs: Path) -> None:
    """Measure, print, draw and write."""
    codecs = {run.name: Codec.load(str(run)) for run in runs}
    curves = rate_distortion(images, list(codecs.values()), Codec.load(str(residual)))
    text = table(curves) + "\n" + REFINEMENT + refinement_table(images, codecs) + "\n"
    print(text)
    draw(curves, docs / "compression.png")
    held_out = ", ".join(HELD_OUT)
    trained_on = ", ".join(TRAIN + TRAIN_GRAY)
    introduction = INTRODUCTION.format(held_out=held_out, train=trained_on)
    (docs / "compression.md").write_text(introduction + text)


def rate_distortion(
    images: list[Pixels], codecs: list[Codec], recurrent: Codec
) -> dict[str, list[Point]]:
    """A curve for each coder: one point for each codec, number of iterations or quality."""
    curves: dict[str, list[Point]] = {}
    curves["convolutional, refined"] = [
        measure(images, partial(through_codec, codec=codec)) for codec in codecs
    ]
    curves["recurrent residual"] = [
        measure(images, partial(through_codec, codec=recurrent, iterations=iterations))
        for iterations in range(1, recurrent.model.iterations + 1)
    ]
    for name, kind in {"JPEG": "JPEG", "WebP": "WEBP"}.items():
        curves[name] = [
            measure(images, partial(through_pillow, kind=kind, quality=quality))
            for quality in QUALITIES
        ]
    return curves


def refinement_table(images: list[Pixels], codecs: dict[str, Codec]) -> str:
    """Markdown: PSNR of each run's plain decoder, and after each step of refinement."""
    lines = ["| run | plain decoder, dB | after each step, dB | gain, dB |", "|---|---|---|---|"]
    for name, codec in codecs.items():
        plain, *refined = steps_of_refinement(images, codec)
        each = " ".join(f"{value:.2f}" for value in refined)
        lines.append(f"| {name} | {plain:.2f} | {each} | {refined[-1] - plain:+.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
