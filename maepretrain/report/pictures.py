"""Pictures that lie in run folders: reconstructions over a training, and confusions of its
evaluations."""

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image

from maepretrain.data.errors import printable
from maepretrain.report.document import Element, Picture, PictureGroup, SideBySide, Text
from maepretrain.report.evaluations import EVALUATORS, result_rows
from maepretrain.report.records import Record
from maepretrain.runs.tables import cell_text

# Pictures of reconstructions over a training: the first, the last and some between.
GRIDS = 6
# A larger picture is stored anew, at most so wide, so that a page stays one that can be mailed.
PICTURE_BYTES = 400_000
PICTURE_WIDTH = 1400
CONFUSIONS = {
    "confusion": "confusion matrix, rows are true and columns predicted classes",
    "most-confused": "test images taken for another class with most confidence",
}


def reconstructions(records: list[Record]) -> list[Element]:
    """Held-out images as the model saw them, from the first to the last validation."""
    groups = []
    for record in records:
        pictures = [_reconstruction(record, grid) for grid in _some_grids(record)]
        readable = [picture for picture in pictures if picture is not None]
        groups.append(PictureGroup(record.name, readable))
    return side_by_side(groups, "No reconstructions yet, they are drawn at each validation")


def _some_grids(record: Record) -> list[Path]:
    """At most GRIDS pictures, evenly over the training."""
    grids = sorted((record.path / "pictures").glob("step-*.png"))
    last = len(grids) - 1
    chosen = {round(i * last / (GRIDS - 1)) for i in range(GRIDS)}
    return [grids[i] for i in sorted(chosen)] if grids else []


def _reconstruction(record: Record, grid: Path) -> Picture | None:
    step = grid.stem.removeprefix("step-").lstrip("0") or "0"
    caption = f"step {int(step):,}" if step.isdigit() else step
    alt = f"Reconstructions of held-out images by {record.name} after step {step}"
    return read_picture(grid, alt, caption, shape="paper grid")


def confusions(records: list[Record]) -> list[Element]:
    """Confusion matrices and mistakes that evaluations drew."""
    groups = []
    for record in records:
        pictures = []
        for evaluator, title in EVALUATORS.items():
            pictures += _confusions_of(record, evaluator, title)
        groups.append(PictureGroup(record.name, pictures))
    return side_by_side(groups, "None was drawn yet, which probe, knn and finetune do")


def _confusions_of(record: Record, evaluator: str, title: str) -> list[Picture]:
    rows = result_rows(record.results.get(evaluator))
    figures = next(iter(rows.values()), {})
    score = f"; top-1 {cell_text(figures, 'top1')}" if "top1" in figures else ""
    pictures = []
    for kind, caption in CONFUSIONS.items():
        path = record.path / "pictures" / f"{evaluator}-{kind}.png"
        alt = f"{title} of {record.name}: {caption}{score}"
        shape = "wide paper" if kind == "most-confused" else "paper"
        picture = read_picture(path, alt, f"{title}: {caption}", shape)
        if picture is not None:
            pictures.append(picture)
    return pictures


def side_by_side(groups: list[PictureGroup], otherwise: str = "") -> list[Element]:
    """The pictures of runs beside each other.

    Args:
        groups: one of each run, under the run's name.
        otherwise: a line for the runs without pictures; empty for none.
    """
    several = len(groups) > 1
    full = [
        PictureGroup(printable(group.title) if several else "", group.pictures)
        for group in groups
        if group.pictures
    ]
    elements: list[Element] = [SideBySide(full)] if full else []
    empty = [group.title for group in groups if not group.pictures]
    if empty and otherwise:
        names = f"{', '.join(empty)}: " if several else ""
        elements.append(Text(printable(f"{names}{otherwise}.")))
    return elements


def read_picture(path: Path, alt: str, caption: str = "", shape: str = "paper") -> Picture | None:
    """A picture of a run folder, a large one stored anew; None where it is half written."""
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data)) as opened:
            opened.load()
            kind = {"PNG": "image/png", "JPEG": "image/jpeg"}.get(str(opened.format))
            if kind is None or len(data) > PICTURE_BYTES:
                data, kind = _smaller(opened), "image/jpeg"
    except (OSError, SyntaxError, ValueError):  # Pillow's errors of a file that is no picture
        return None
    return Picture(data_uri(data, kind), printable(alt), printable(caption), shape)


def _smaller(image: Image.Image) -> bytes:
    """A JPEG of at most PICTURE_WIDTH columns."""
    smaller = image.convert("RGB")
    smaller.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
    buffer = BytesIO()
    smaller.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """A file as an address that holds it.

    Args:
        data: the file.
        kind: its media type.
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
