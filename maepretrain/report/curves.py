"""Curves over the steps of a training: a panel for each column of metrics.csv."""

import math
from collections.abc import Iterator

from maepretrain.data.errors import printable
from maepretrain.plots.curves import COLOURS, Line, curve_panel
from maepretrain.report.document import Element, Picture, PictureGroup, SideBySide, Text
from maepretrain.report.pictures import data_uri
from maepretrain.report.records import Points, Record, names_of

TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "probe": "Linear probe during training, top-1",
    "knn": "k-NN during training, top-1",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "img_per_s": "Images a second",
    "data_wait": "Share of the time spent waiting for data",
    "skipped": "Micro-batches left out, their loss was not finite",
}
# They may be drawn on a logarithmic scale.
LOGARITHMIC = ("loss", "grad_norm")
RESTART_COLOUR = "gray"


def curves(records: list[Record]) -> list[Element]:
    """A panel for each column of metrics.csv, with the held-out values of the same name."""
    if not any(record.metrics for record in records):
        return [Text("No step has been logged yet.")]
    names = _ordered_names(records)
    drawn = [name for name in names if _has_two_points(records, name)]
    elements: list[Element] = []
    if caption := _caption(records):
        elements.append(Text(caption))
    if drawn:
        panels = [_panel(records, name) for name in drawn]
        elements.append(SideBySide([PictureGroup("", panels)], _legend(records)))
    # A single point is better said.
    elements += [Text(_in_words(records, name)) for name in names if name not in drawn]
    return elements


def _ordered_names(records: list[Record]) -> list[str]:
    """Names of the columns: those of TITLES in its order, the others after the loss."""
    names = {name.removeprefix("val_") for record in records for name in record.metrics}
    known = [name for name in TITLES if name in names]
    others = sorted(names - TITLES.keys())
    after_loss = known.index("loss") + 1 if "loss" in known else 0
    return [*known[:after_loss], *others, *known[after_loss:]]


def _has_two_points(records: list[Record], name: str) -> bool:
    """True where any curve of a panel has two points or more."""
    return any(len(points) > 1 for record in records for _, points in _curves_of(record, name))


def _curves_of(record: Record, name: str) -> Iterator[tuple[bool, Points]]:
    """The curves of a panel that a run has: of the training, then of held-out data (True)."""
    for held_out, column in ((False, name), (True, f"val_{name}")):
        points = record.metrics.get(column, [])
        if points:
            yield held_out, points


def _legend(records: list[Record]) -> list[tuple[str, str]]:
    if len(records) == 1:
        return [("training", COLOURS[0]), ("held out", COLOURS[1])]
    return list(zip(names_of(records), _colours(records), strict=True))


def _colours(records: list[Record]) -> list[str]:
    """A colour for each run."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(records))]


def _caption(records: list[Record]) -> str:
    lines = []
    if len(records) > 1:
        lines.append("Solid lines: training; dashed: held out.")
    if any(len(record.starts) > 1 for record in records):
        lines.append("Dotted verticals: restarts.")
    return " ".join(lines)


def _panel(records: list[Record], name: str) -> Picture:
    several = len(records) > 1
    lines = []
    restarts = []
    for record, run_colour in zip(records, _colours(records), strict=True):
        for held_out, points in _curves_of(record, name):
            colour = run_colour if several else COLOURS[int(held_out)]
            steps, values = zip(*points, strict=True)
            lines.append(Line([*steps], [*values], colour, dashed=several and held_out))
        for start in record.starts[1:]:
            colour = run_colour if several else RESTART_COLOUR
            restarts.append((int(start.get("step", 0)), colour))
    svg = curve_panel(lines, restarts, log=name in LOGARITHMIC)
    return Picture(data_uri(svg, "image/svg+xml"), _in_words(records, name), _title(name), "curve")


def _title(name: str) -> str:
    return TITLES.get(name, printable(name.replace("_", " ").capitalize()))


def _in_words(records: list[Record], name: str) -> str:
    """The curves of a panel in words."""
    described = []
    for record in records:
        for held_out, points in _curves_of(record, name):
            kind = "held out" if held_out else "training"
            described.append(f"{record.name}, {kind}: {_points_in_words(points)}")
    return printable(f"{_title(name)} by step: {'; '.join(described)}.")


def _points_in_words(points: Points) -> str:
    first_step, first = points[0]
    if len(points) == 1:
        return f"{first:.4g} at step {first_step:,}"
    last_step, last = points[-1]
    ends = f"{first:.4g} at step {first_step:,}, {last:.4g} at step {last_step:,}"
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return ends
    return f"{ends}, between {min(finite):.4g} and {max(finite):.4g}"
