"""Confusion matrix and confused images, as PNG."""

from pathlib import Path

from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from maepretrain.plots.canvas import save_png
from maepretrain.plots.images import titled_images

# Up to so many classes a cell of the confusion matrix has room for its number.
NUMBERED_CLASSES = 20
# Letters of a class's name that are drawn.
LETTERS = 14
# Labels of more letters are turned by 90 degrees, or stand on a line of their own.
SHORT_LABEL = 3


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
        labels = _class_labels(names, classes)
        ax.set_xticks(range(classes), labels, rotation=0 if _all_short(labels) else 90)
        ax.set_yticks(range(classes), labels)
        _write_counts(ax, counts, share)
    save_png(figure, path)
    return counts


def _write_counts(
    ax: Axes, counts: Int64[Tensor, "classes classes"], share: Float[Tensor, "classes classes"]
) -> None:
    for row, column in counts.nonzero().tolist():
        colour = "white" if share[row, column] > 0.5 else "black"
        number = str(int(counts[row, column]))
        ax.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)


def _class_labels(names: list[str] | None, classes: int) -> list[str]:
    if names is None or len(names) < classes:
        return [str(number) for number in range(classes)]
    return [_shortened(name) for name in names[:classes]]


def _shortened(name: str) -> str:
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def _all_short(labels: list[str]) -> bool:
    return max(len(label) for label in labels) <= SHORT_LABEL


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
    labels = _class_labels(names, max([*truth, *predicted], default=0) + 1)
    between = " taken for " if _all_short(labels) else "\ntaken for "
    titles = []
    for right, wrong, probability in zip(truth, predicted, confidence, strict=True):
        titles.append(f"{labels[right]}{between}{labels[wrong]}\n{probability:.0%}")
    titled_images(images, titles, min(8, max(1, len(images))), path)
