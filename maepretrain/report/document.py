"""The elements that a page about runs is made of. `report` puts them into HTML, the model card of
`export` into Markdown.
"""

from collections.abc import Sequence
from typing import NamedTuple

from maepretrain.data.errors import printable


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind = "text"


class Table(NamedTuple):
    """Rows under a head; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    kind = "table"


class Code(NamedTuple):
    """Text as it is; folded away where it is `long`."""

    title: str
    text: str
    long: bool = False
    language: str = ""
    kind = "code"


class Picture(NamedTuple):
    """A picture as a data URI; `shape` is how the page lays it out: as a "curve", on "paper", on
    "wide paper" or on the "paper" of a "grid"."""

    uri: str
    alt: str
    caption: str = ""
    shape: str = "paper"


class PictureGroup(NamedTuple):
    """Pictures of one run, under its name where there are several runs."""

    title: str
    pictures: list[Picture]


class SideBySide(NamedTuple):
    """The pictures of runs side by side; `legend` has names and colours."""

    groups: list[PictureGroup]
    legend: Sequence[tuple[str, str]] = ()
    kind = "side by side"


Element = Text | Table | Code | SideBySide


class Section(NamedTuple):
    """A heading with its elements; `name` is its anchor."""

    name: str
    title: str
    elements: list[Element]


def printable_lines(text: str) -> str:
    """Text of several lines that any file can hold: bytes that are no UTF-8 and control characters
    are spelt."""
    return "\n".join(printable(line) for line in text.split("\n"))


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 run", "2 runs"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def markdown(elements: Sequence[Element]) -> str:
    """Texts, tables and code in Markdown; pictures are left out."""
    shown = [element for element in elements if not isinstance(element, SideBySide)]
    return "\n\n".join(_markdown(element) for element in shown)


def _markdown(element: Text | Table | Code) -> str:
    if isinstance(element, Table):
        lines = [element.head, ["---"] * len(element.head), *element.rows]
        return "\n".join(_markdown_row(line) for line in lines)
    if isinstance(element, Code):
        fence = "````" if "```" in element.text else "```"
        return f"{element.title}:\n\n{fence}{element.language}\n{element.text}\n{fence}"
    return element.text.replace("<", "&lt;")


def _markdown_row(cells: list[str]) -> str:
    escaped = [
        cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>") for cell in cells
    ]
    return f"| {' | '.join(escaped)} |"
