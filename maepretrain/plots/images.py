"""Grids of images and signals, as PNG."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from maepretrain.plots.canvas import save_png, show_image

# Small images are enlarged to about this side.
TILE_SIDE = 64


def reconstruction_grid(
    rows: list[Tensor], names: list[str], path: Path, columns: list[str] | None = None
) -> np.ndarray:
    """Draw rows of images or signals side by side, one row a kind, and save them as PNG.

    Args:
        rows: for each name (n, c, h, w) pixels in 0..1, or (n, c, t) signals of any range, of which
            each column has its own; on the CPU.
        names: the text left of each row.
        path: where the PNG goes; its folder is made.
        columns: the text above each column.

    Returns:
        The picture, uint8 (height, width, 3).
    """
    n = len(rows[0])
    figure = Figure(layout="constrained")
    if rows[0].ndim == 3:
        # A signal is drawn two inches wide and one inch high.
        figure.set(size_inches=(1.1 + 2 * n, len(rows)), dpi=100)
        axes = figure.subplots(len(rows), n, squeeze=False, sharey="col")
        show = _show_signal
    else:
        h, w = rows[0].shape[2:]
        figure.set(size_inches=(1.1 + n, len(rows) * h / w), dpi=max(100, w))
        axes = figure.subplots(len(rows), n, squeeze=False)
        show = show_image
    for row, name, row_axes in zip(rows, names, axes, strict=True):
        for image, ax in zip(row, row_axes, strict=True):
            show(ax, image)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    if columns is not None:
        for title, ax in zip(columns, axes[0], strict=True):
            ax.set_title(title, fontsize=9)
    return save_png(figure, path)


def _show_signal(ax: Axes, signal: Float[Tensor, "c t"]) -> None:
    ax.plot(signal.T.numpy(), linewidth=0.8)


def titled_images(images: list[Tensor], titles: list[str], columns: int, path: Path) -> None:
    """Draw images under their titles, row by row, and save them as PNG.

    Args:
        images: each (c, h, w) pixels in 0..1.
        titles: the text above each.
        columns: images of a row.
        path: where the PNG goes; its folder is made.
    """
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, image, title in zip(axes, images, titles, strict=False):
        show_image(ax, image)
        ax.set_title(title, fontsize=8)
    save_png(figure, path)


def tiles(images: Float[Tensor, "n c h w"], columns: int, path: Path) -> Image.Image:
    """Save images side by side, row by row, and nothing else, as PNG.

    Small ones are enlarged by a whole number, so that each of their pixels is a square.

    Args:
        images: pixels in 0..1; of more than three channels the first three are drawn.
        columns: images of a row.
        path: where the PNG goes; its folder is made.

    Returns:
        The picture.
    """
    n, c, h, w = images.shape
    shown = images[:, :3] if c >= 3 else images[:, :1]
    factor = max(1, round(TILE_SIDE / max(h, w)))
    shown = shown.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(shown, nrow=min(n, columns), padding=2, pad_value=1.0)
    picture = to_pil_image((grid * 255).round().to(torch.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture
