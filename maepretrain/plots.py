"""Pictures, drawn with Matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def reconstruction_grid(rows: list[Tensor], names: list[str], path: Path) -> np.ndarray:
    """Draw rows of images side by side, one row a kind, and save them as PNG.

    Args:
        rows: for each name (n, c, h, w) pixels in 0..1, on the CPU.
        names: what stands left of each row.
        path: where the PNG goes; its folder is made.

    Returns:
        The picture, uint8 (height, width, 3).
    """
    n, _, h, w = rows[0].shape
    figure = Figure(figsize=(1.1 + n, len(rows) * h / w), dpi=max(100, w), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), n, squeeze=False)
    for row, name, line in zip(rows, names, axes, strict=True):
        for image, ax in zip(row, line, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            ax.imshow(
                pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1
            )
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
