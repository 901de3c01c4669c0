"""Tables of figures, on a terminal or in a log."""

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Headings of figures by their keys.
HEADINGS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "per class",
    "knn": "k-NN",
    "n": "n",
    "seeds": "seeds",
    "minutes": "min",
    "img_per_s": "img/s",
}


def print_table(rows: dict[str, dict[str, Any]], *, recipes: bool = True) -> None:
    """Print the table for people; columns that no row fills are left out.

    Args:
        rows: name of the features -> figures as `spread` gives them (top1, top1_std, ...), with
            `knn`, `seeds`, `recipe`, `minutes` and `img_per_s` where they are known.
        recipes: print those of the rows under it.
    """
    known = {key for row in rows.values() for key in row}
    shown = {key: heading for key, heading in HEADINGS.items() if key in known}
    console = print_columns("features", shown, rows, cell_text)
    for name, row in rows.items():
        if recipes and "recipe" in row:
            console.print(f"  {name}: {row['recipe']}", highlight=False, markup=False)


def print_columns(
    first: str,
    columns: dict[str, str],
    rows: dict[str, dict[str, Any]],
    cell: Callable[[dict[str, Any], str], str],
) -> Console:
    """A table on the terminal or, as wide as it needs to be, in a log.

    Args:
        first: heading of the rows' names.
        columns: heading of each key.
        rows: name -> values by key.
        cell: the text of a row's key.

    Returns:
        The console, for what is printed below.
    """
    table = Table(box=box.SIMPLE, padding=0, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(cell(row, key) for key in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # rich takes 80 columns for a log, and cuts
    console.print(table)
    return console


def cell_text(row: dict[str, Any], key: str) -> str:
    """A figure of a row with its spread, as a table shows it; empty where there is none."""
    value = row.get(key)
    if value is None:
        return ""
    if key in ("n", "seeds", "img_per_s"):
        return f"{value:,.0f}"
    if key == "minutes":
        return f"{value:.1f}"
    std = row.get(f"{key}_std")
    return f"{value:.4f}" + ("" if std is None else f" ± {std:.4f}")
