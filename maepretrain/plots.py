"""Pictures, drawn with Matplotlib."""

from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


def reconstruction_grid(
    rows: list[Tensor], names: list[str], path: Path, columns: list[str] | None = None
) -> np.ndarray:
    """Draw rows of images or signals side by side, one row a kind, and save them as PNG.

    Args:
        rows: for each name (n, c, h, w) pixels in 0..1, or (n, c, t) signals of any range, of which
            each column has its own; on the CPU.
        names: what stands left of each row.
        path: where the PNG goes; its folder is made.
        columns: what stands above each column.

    Returns:
        The picture, uint8 (height, width, 3).
    """
    n, signals = len(rows[0]), rows[0].ndim == 3
    # Signals are drawn two inches wide, images one inch.
    h, w = (50, 100) if signals else rows[0].shape[2:]
    side = 2 if signals else 1
    size = (1.1 + side * n, side * len(rows) * h / w)
    figure = Figure(figsize=size, dpi=max(100, w), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), n, squeeze=False, sharey="col" if signals else "none")
    for row, name, line in zip(rows, names, axes, strict=True):
        for image, ax in zip(row, line, strict=True):
            if signals:
                ax.plot(image.T.numpy(), linewidth=0.8)
            else:
                _show(ax, image)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for title, ax in zip(columns or [], axes[0], strict=columns is not None):
        ax.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# Of more points t-SNE takes minutes, and a map shows no more.
MAP_POINTS = 5000
# Up to so many classes a cell of the confusion matrix has room for its number.
NUMBERED_CLASSES = 20
# Letters of a class's name that are drawn.
LABEL = 14
# Sides to which small images are enlarged.
TILE = 64


def confusion_matrix(
    truth: Int64[Tensor, "n"],
    predicted: Int64[Tensor, "n"],
    classes: int,
    path: Path,
    names: list[str] | None = None,
) -> Int64[Tensor, "classes classes"]:
    """Draw which class (row) was taken for which (column), each row as shares of its class, and
    save it as PNG.

    Args:
        truth: the right classes.
        predicted: the predicted classes.
        classes: how many there are.
        path: where the PNG goes; its folder is made.
        names: of the classes; without one for each they are numbers.

    Returns:
        The counts.
    """
    counts = (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, 2.5 + 0.35 * classes)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    ax = figure.subplots()
    ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="predicted", ylabel="truth", title=f"{len(truth):,} test images")
    if classes <= NUMBERED_CLASSES:
        labels = _labels(names, classes)
        ax.set_xticks(range(classes), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
        ax.set_yticks(range(classes), labels)
        for row, column in counts.nonzero().tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            number = str(int(counts[row, column]))
            ax.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)
    return counts


def _labels(names: list[str] | None, classes: int) -> list[str]:
    if names is None or len(names) < classes:
        return [str(number) for number in range(classes)]
    return [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in names[:classes]]


def most_confused(
    images: list[Tensor],
    truth: list[int],
    predicted: list[int],
    confidence: list[float],
    path: Path,
    names: list[str] | None = None,
) -> None:
    """Draw images that were taken for another class with the most confidence, and save them as
    PNG.

    Args:
        images: each (c, h, w) pixels in 0..1.
        truth: their right classes.
        predicted: what they were taken for.
        confidence: the probability given to the prediction.
        path: where the PNG goes; its folder is made.
        names: of the classes; without one for each they are numbers.
    """
    found = zip(truth, predicted, confidence, strict=True)
    labels = _labels(names, max([*truth, *predicted], default=0) + 1)
    between = " taken for " if max(map(len, labels)) <= 3 else "\ntaken for "
    titles = [f"{labels[right]}{between}{labels[wrong]}\n{p:.0%}" for right, wrong, p in found]
    titled_images(images, titles, min(8, max(1, len(images))), path)


def titled_images(images: list[Tensor], titles: list[str], columns: int, path: Path) -> None:
    """Draw images under their titles, row by row, and save them as PNG.

    Args:
        images: each (c, h, w) pixels in 0..1.
        titles: what stands above each.
        columns: images of a row.
        path: where the PNG goes; its folder is made.
    """
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, image, title in zip(axes, images, titles, strict=False):
        _show(ax, image)
        ax.set_title(title, fontsize=8)
    _save(figure, path)


def tiles(images: Float[Tensor, "n c h w"], columns: int, path: Path) -> Image.Image:
    """Images side by side, row by row, and nothing else, as PNG.

    Small ones are enlarged by a whole number, so that each of their pixels is a square.

    Args:
        images: pixels in 0..1; of more than three channels the first three are drawn.
        columns: images of a row.
        path: where the PNG goes; its folder is made.

    Returns:
        The picture.
    """
    n, c, h, w = images.shape
    enlarged = max(1, round(TILE / max(h, w)))
    shown = images[:, : 3 if c >= 3 else 1]
    shown = shown.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    grid = make_grid(shown, nrow=min(n, columns), padding=2, pad_value=1.0)
    picture = to_pil_image((grid * 255).round().to(torch.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture


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

    chosen = torch.linspace(0, len(features) - 1, min(MAP_POINTS, len(features))).long()
    x, y = features[chosen].double().numpy(), labels[chosen]
    if method == "pca":
        points = PCA(2, random_state=0).fit_transform(x)
    else:
        perplexity = min(30.0, (len(x) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
    figure = Figure(figsize=(7, 6), dpi=100, layout="constrained")
    ax = figure.subplots()
    known, classes = (y >= 0).numpy(), int(labels.max()) + 1
    ax.scatter(*points[~known].T, color="0.85", s=6)
    if classes > 0:
        colours = matplotlib.colormaps["tab10" if classes <= 10 else "turbo"].resampled(classes)
        limits = {"vmin": -0.5, "vmax": classes - 0.5}
        drawn = ax.scatter(*points[known].T, c=y.numpy()[known], cmap=colours, s=6, **limits)
        ticks = range(classes) if classes <= NUMBERED_CLASSES else None
        figure.colorbar(drawn, ax=ax, label="class", ticks=ticks)
    title = "PCA" if method == "pca" else "t-SNE"
    ax.set(xticks=[], yticks=[], title=f"{title} of {len(x):,} features")
    _save(figure, path)
    return torch.from_numpy(points).float()


# Of curves: they stand out from white and from black.
COLOURS = ("#3d7fd9", "#e0752d", "#3f9f5a", "#cc4778", "#8a6fd1", "#1aa0a8", "#b58b00", "#808890")
# A curve of more points is drawn as means of its parts.
CURVE_POINTS = 600
# From this ratio of largest to smallest on, a scale is logarithmic.
LOGARITHMIC = 100
# Stands for the colour of the text until the drawing is done.
INK = "#010203"
# A picture in a page follows the reader's choice of light or dark by itself.
STYLE = (
    b"<style>:root{color:#333}@media (prefers-color-scheme:dark){:root{color:#ccc}}"
    b"text{font-family:system-ui,sans-serif}</style>"
)


class Line(NamedTuple):
    """A curve."""

    steps: list[int]
    values: list[float]
    colour: str
    dashed: bool = False


def curve_panel(lines: list[Line], marks: list[tuple[int, str]], log: bool) -> bytes:
    """Draw curves over steps as SVG, with no text but numbers.

    Args:
        lines: values that are no numbers leave gaps.
        marks: steps and colours of dotted verticals.
        log: on a logarithmic scale, where the values span so much.

    Returns:
        The file.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "maepretrain",
        "text.color": INK,
    }
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK}
    settings |= {"xtick.color": INK, "ytick.color": INK, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        for line in lines:
            steps, values = _thinned(line)
            style, dot = "--" if line.dashed else "-", "o" if len(steps) <= 30 else ""
            ax.plot(steps, values, style, c=line.colour, lw=1.5, marker=dot, ms=3)
        for step, colour in marks:
            ax.axvline(step, color=colour, linestyle=":", linewidth=1)
        values = [v for line in lines for v in line.values if np.isfinite(v)]
        if log and values and 0 < LOGARITHMIC * min(values) < max(values):
            ax.set_yscale("log")
        else:
            ax.yaxis.set_major_formatter(_number)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(_number)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color=INK, alpha=0.15, linewidth=0.6)
        file = BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue().replace(INK.encode(), b"currentColor")
    head, defs, rest = svg.partition(b"<defs>")
    return head + STYLE + defs + rest


def _number(x: float, _: object) -> str:
    """7,000 and 0.003; what is far from 1 with its power of ten."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def _thinned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of at most CURVE_POINTS points."""
    steps, values = np.array(line.steps, float), np.array(line.values, float)
    values[~np.isfinite(values)] = np.nan
    parts = np.array_split(np.arange(len(steps)), min(CURVE_POINTS, len(steps)))
    if len(parts) == len(steps):
        return steps, values
    means = [np.array([of[part].mean() for part in parts]) for of in (steps, values)]
    return means[0], means[1]


def _show(ax: Axes, image: Float[Tensor, "c h w"]) -> None:
    """Gray, gray of a second channel's picture, or RGB; what lies beyond them is not shown."""
    shown = image[:1] if len(image) < 3 else image[:3]
    pixels = shown.permute(1, 2, 0).numpy()
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
