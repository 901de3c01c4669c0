"""Matplotlib figures as PNG files, and images on their axes."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def show_image(ax: Axes, image: Float[Tensor, "c h w"]) -> None:
    """Show an image of one or two channels as gray (the first channel), of three or more as RGB."""
    if len(image) < 3:
        ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        ax.imshow(image[:3].permute(1, 2, 0).numpy(), vmin=0, vmax=1)


def save_png(figure: Figure, path: Path) -> np.ndarray:
    """Draw a figure into a file, whose folder is made where it is missing.

    Returns:
        The picture, uint8 (height, width, 3).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(path)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
