"""Pictures of the geometry of codes: vector fields, directions, maps and curves, as PNG."""

from pathlib import Path

from jaxtyping import Float, Int64, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from maepretrain.plots.canvas import save_png


def draw_field(
    path: Path,
    points: Float[Tensor, "n 2"],
    field: Float[Tensor, "n 2"],
    data: Float[Tensor, "m 2"],
    title: str,
) -> None:
    """Arrows of a vector field over the samples that it was learnt from, as PNG."""
    figure = Figure(figsize=(6, 6), dpi=100, layout="constrained")
    ax = figure.subplots()
    ax.scatter(data[:, 0].numpy(), data[:, 1].numpy(), s=4, color="tab:orange")
    x, y = points.T.numpy()
    dx, dy = field.T.numpy()
    ax.quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, width=0.003, color="tab:blue")
    ax.set(aspect="equal", title=title)
    save_png(figure, path)


def draw_rows(path: Path, rows: dict[str, Float[Tensor, "n c h w"]], *, symmetric: bool) -> None:
    """Rows of images, one row a name, as PNG.

    Args:
        path: where the PNG goes; its folder is made.
        rows: images of one channel; all rows are of one length.
        symmetric: colour around 0, each image by its own largest value (directions), not gray
            values in 0..1 (images).
    """
    n = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.4 + n, 1.1 * len(rows)), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), n, squeeze=False)
    for (name, images), line in zip(rows.items(), grid, strict=True):
        for image, ax in zip(images, line, strict=True):
            if symmetric:
                _show_symmetric(ax, image[0])
            else:
                _show_gray(ax, image[0])
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    save_png(figure, path)


def _show_gray(ax: Axes, pixels: Float[Tensor, "h w"]) -> None:
    ax.imshow(pixels.detach().numpy(), cmap="gray", vmin=0, vmax=1)


def _show_symmetric(ax: Axes, pixels: Float[Tensor, "h w"]) -> None:
    """Red below 0, blue above, white at 0."""
    largest = float(pixels.abs().max()) or 1.0
    ax.imshow(pixels.detach().numpy(), cmap="RdBu", vmin=-largest, vmax=largest)


def draw_maps(
    path: Path, maps: dict[str, Float[Tensor, "n 2"]], labels: Int64[Tensor, "n"]
) -> None:
    """Flat maps side by side, coloured by class, as PNG."""
    figure = Figure(figsize=(4 * len(maps), 4), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, (name, points) in zip(axes, maps.items(), strict=True):
        x, y = points.T.numpy()
        ax.scatter(x, y, c=labels.numpy(), cmap="tab10", s=5)
        ax.set(xticks=[], yticks=[], title=name)
    save_png(figure, path)


def draw_lines(
    path: Path, lines: dict[str, Shaped[Tensor, "n"]], x: Shaped[Tensor, "n"], axes: tuple[str, str]
) -> None:
    """Curves over one logarithmic axis, as PNG."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    ax = figure.subplots()
    for name, y in lines.items():
        ax.semilogx(x.numpy(), y.detach().numpy(), label=name)
    ax.set(xlabel=axes[0], ylabel=axes[1])
    ax.legend()
    save_png(figure, path)
