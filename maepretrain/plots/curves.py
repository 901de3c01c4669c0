"""Curves over steps, as SVG for a page."""

from io import BytesIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Of curves: they stand out from white and from black.
COLOURS = ("#3d7fd9", "#e0752d", "#3f9f5a", "#cc4778", "#8a6fd1", "#1aa0a8", "#b58b00", "#808890")
# A curve of more points is drawn as means of its chunks.
CURVE_POINTS = 600
# Up to so many points, each is marked.
FEW_POINTS = 30
# From this ratio of largest to smallest on, a scale is logarithmic.
LOGARITHMIC = 100
# Stands for the colour of the text until the drawing is done.
INK = "#010203"
# A picture in a page follows the reader's choice of light or dark by itself.
STYLE = (
    b"<style>:root{color:#333}@media (prefers-color-scheme:dark){:root{color:#ccc}}"
    b"text{font-family:system-ui,sans-serif}</style>"
)
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "maepretrain",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
}


class Line(NamedTuple):
    """A curve."""

    steps: list[int]
    values: list[float]
    colour: str
    dashed: bool = False


def curve_panel(lines: list[Line], marks: list[tuple[int, str]], *, log: bool) -> bytes:
    """Draw curves over steps as SVG, with no text but numbers.

    Args:
        lines: the curves; values that are not finite leave gaps.
        marks: steps and colours of dotted verticals.
        log: use a logarithmic scale where the values span much.

    Returns:
        The file.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.subplots()
        ax.patch.set_alpha(0)
        for line in lines:
            _draw_line(ax, line)
        for step, colour in marks:
            ax.axvline(step, color=colour, linestyle=":", linewidth=1)
        if log and _spans_much(lines):
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


def _draw_line(ax: Axes, line: Line) -> None:
    steps, values = _thinned(line)
    style = "--" if line.dashed else "-"
    marker = "o" if len(steps) <= FEW_POINTS else ""
    ax.plot(steps, values, style, c=line.colour, lw=1.5, marker=marker, ms=3)


def _spans_much(lines: list[Line]) -> bool:
    """The finite values are positive, and the largest is LOGARITHMIC times the smallest or more."""
    values = np.concatenate([line.values for line in lines]) if lines else np.empty(0)
    finite = values[np.isfinite(values)]
    return bool(len(finite) and 0 < LOGARITHMIC * finite.min() < finite.max())


def _number(x: float, _: object) -> str:
    """7,000 and 0.003; what is far from 1 with its power of ten."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def _thinned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of at most CURVE_POINTS points."""
    steps = np.array(line.steps, float)
    values = np.array(line.values, float)
    values[~np.isfinite(values)] = np.nan
    if len(steps) <= CURVE_POINTS:
        return steps, values
    return _means_of_chunks(steps), _means_of_chunks(values)


def _means_of_chunks(x: np.ndarray) -> np.ndarray:
    return np.array([chunk.mean() for chunk in np.array_split(x, CURVE_POINTS)])
