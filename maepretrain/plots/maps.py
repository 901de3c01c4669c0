"""Flat maps of features, as PNG."""

from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from maepretrain.plots.canvas import save_png
from maepretrain.plots.confusion import NUMBERED_CLASSES

# Of more points t-SNE takes minutes, and a map shows no more.
MAP_POINTS = 5000


def embedding_map(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    path: Path,
    method: Literal["pca", "tsne"] = "pca",
) -> Float[Tensor, "m 2"]:
    """Draw features as points of a plane, coloured by class, and save them as PNG.

    Args:
        features: at most MAP_POINTS of them are drawn, evenly spaced.
        labels: their classes; those without (-1) are gray.
        path: where the PNG goes; its folder is made.
        method: "pca", the two directions of largest variance; "tsne" (van der Maaten and Hinton
            2008), neighbours stay together and distances say nothing; scikit-learn's.

    Returns:
        The points that were drawn.
    """
    # Here, for scikit-learn would cost every pretraining half a second at its start.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    shown = torch.linspace(0, len(features) - 1, min(MAP_POINTS, len(features))).long()
    x = features[shown].double().numpy()
    if method == "pca":
        title = "PCA"
        points = PCA(2, random_state=0).fit_transform(x)
    else:
        title = "t-SNE"
        perplexity = min(30.0, (len(x) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
    figure = Figure(figsize=(7, 6), dpi=100, layout="constrained")
    ax = figure.subplots()
    _scatter(ax, points, labels[shown].numpy(), int(labels.max()) + 1)
    ax.set(xticks=[], yticks=[], title=f"{title} of {len(x):,} features")
    save_png(figure, path)
    return torch.from_numpy(points).float()


def _scatter(ax: Axes, points: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Points coloured by class with a colour bar; those without a class are gray."""
    unknown = points[labels < 0]
    ax.scatter(unknown[:, 0], unknown[:, 1], color="0.85", s=6)
    if classes < 1:
        return
    known = points[labels >= 0]
    drawn = ax.scatter(
        known[:, 0],
        known[:, 1],
        c=labels[labels >= 0],
        cmap=matplotlib.colormaps["tab10" if classes <= 10 else "turbo"].resampled(classes),
        s=6,
        vmin=-0.5,
        vmax=classes - 0.5,
    )
    ticks = range(classes) if classes <= NUMBERED_CLASSES else None
    ax.figure.colorbar(drawn, ax=ax, label="class", ticks=ticks)
